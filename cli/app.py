"""The commands: flags → request → one call into the library → the result shown.

Parameters are read from `ctx.params`, so that flags and the config file go through the same door (settings.py).
The library is imported inside the commands: `--help` must not wait for it.
"""

from pathlib import Path
from typing import Any

import typer

from llmpare.cli import distilling, flags, pruning, requests, settings
from llmpare.cli.output import Output
from llmpare.cli.progress import Watcher
from llmpare.cli.settings import Settings
from llmpare.compress.errors import GateError
from llmpare.compress.request import QuantizeRequest

app = typer.Typer(
    help="Make a language model smaller, and know what it cost in accuracy.",
    add_completion=False,
    # Styled help would read '[/x]' in a text as markup; a styled traceback would hide what a bug report needs.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "token_normalize_func": settings.canonical,
    },
)


@app.callback()
def llmpare(version: flags.Version = False) -> None:
    pass


@app.command()
def quantize(
    ctx: typer.Context,
    model: flags.Model = None,
    out: flags.Out = None,
    scheme: flags.Scheme = None,
    bits: flags.Bits = None,
    group_size: flags.GroupSize = None,
    asym: flags.Asym = None,
    method: flags.Method = None,
    best: flags.Best = None,
    damping: flags.Damping = None,
    rounds: flags.Rounds = None,
    sweeps: flags.Sweeps = None,
    correction: flags.Correction = None,
    steps: flags.Steps = None,
    step_size: flags.StepSize = None,
    desc_act: flags.DescAct = None,
    format: flags.Format = None,
    ignore: flags.Ignore = None,
    dataset: flags.Dataset = None,
    nsamples: flags.Nsamples = None,
    seqlen: flags.Seqlen = None,
    chat_template: flags.ChatTemplate = None,
    route_all: flags.RouteAll = None,
    eval_dataset: flags.EvalDataset = None,
    eval_nsamples: flags.EvalNsamples = None,
    max_kl: flags.MaxKl = None,
    max_perplexity_increase: flags.MaxPerplexityIncrease = None,
    min_agreement: flags.MinAgreement = None,
    max_size: flags.MaxSize = None,
    device: flags.Device = None,
    dtype: flags.Dtype = None,
    seed: flags.Seed = None,
    max_memory: flags.MaxMemory = None,
    revision: flags.Revision = None,
    trust_remote_code: flags.TrustRemoteCode = None,
    allow_nonfinite: flags.AllowNonfinite = None,
    config: flags.Config = None,
    dry_run: flags.DryRun = None,
    force: flags.Force = None,
    restart: flags.Restart = None,
    strict: flags.Strict = None,
    json: flags.Json = None,
    quiet: flags.Quiet = None,
    no_color: flags.NoColor = None,
) -> None:
    """Store the weights of MODEL in a few bits each, and measure what that costs."""
    output, chosen = _begin(ctx, settings.QUANTIZE)
    request = requests.quantize_request(chosen)
    if chosen.get("dry-run"):
        _show_plan(output, request)
        return
    with Watcher(output) as watcher:
        from llmpare.compress.run import run_quantize

        report = run_quantize(request, watcher)
    _show_report(output, request.out, report)


@app.command()
def plan(
    ctx: typer.Context,
    model: flags.Model = None,
    out: flags.Out = None,
    scheme: flags.Scheme = None,
    bits: flags.Bits = None,
    group_size: flags.GroupSize = None,
    asym: flags.Asym = None,
    method: flags.Method = None,
    best: flags.Best = None,
    format: flags.Format = None,
    ignore: flags.Ignore = None,
    dataset: flags.Dataset = None,
    nsamples: flags.Nsamples = None,
    seqlen: flags.Seqlen = None,
    eval_dataset: flags.EvalDataset = None,
    eval_nsamples: flags.EvalNsamples = None,
    device: flags.Device = None,
    dtype: flags.Dtype = None,
    max_memory: flags.MaxMemory = None,
    revision: flags.Revision = None,
    trust_remote_code: flags.TrustRemoteCode = None,
    config: flags.Config = None,
    json: flags.Json = None,
    no_color: flags.NoColor = None,
) -> None:
    """Show what quantize would do with every tensor, and the memory, disk and time it would take."""
    output, chosen = _begin(ctx, settings.QUANTIZE)
    assumed = requests.beside(settings.required(chosen, "model", "MODEL"))
    _show_plan(output, requests.quantize_request(chosen, assumed))


@app.command()
def prune(
    ctx: typer.Context,
    model: flags.Model = None,
    out: flags.Out = None,
    ffn: flags.Ffn = None,
    heads: flags.Heads = None,
    hidden: flags.Hidden = None,
    layers: flags.Layers = None,
    drop_layers: flags.DropLayers = None,
    experts: flags.Experts = None,
    round_to: flags.RoundTo = None,
    target_params: flags.TargetParams = None,
    target_size: flags.TargetSize = None,
    sparsity: flags.Sparsity = None,
    pattern: flags.Pattern = None,
    allocation: flags.Allocation = None,
    method: flags.PruneMethod = None,
    refit: flags.Refit = None,
    damping: flags.PruneDamping = None,
    iterations: flags.Iterations = None,
    then: flags.Then = None,
    group_size: flags.ThenGroupSize = None,
    format: flags.ThenFormat = None,
    ignore: flags.Ignore = None,
    dataset: flags.Dataset = None,
    nsamples: flags.Nsamples = None,
    seqlen: flags.Seqlen = None,
    chat_template: flags.ChatTemplate = None,
    eval_dataset: flags.EvalDataset = None,
    eval_nsamples: flags.EvalNsamples = None,
    max_kl: flags.MaxKl = None,
    max_perplexity_increase: flags.MaxPerplexityIncrease = None,
    min_agreement: flags.MinAgreement = None,
    max_size: flags.MaxSize = None,
    device: flags.Device = None,
    dtype: flags.Dtype = None,
    seed: flags.Seed = None,
    max_memory: flags.MaxMemory = None,
    revision: flags.Revision = None,
    trust_remote_code: flags.TrustRemoteCode = None,
    allow_nonfinite: flags.AllowNonfinite = None,
    config: flags.Config = None,
    dry_run: flags.DryRun = None,
    force: flags.Force = None,
    restart: flags.Restart = None,
    strict: flags.Strict = None,
    json: flags.Json = None,
    quiet: flags.Quiet = None,
    no_color: flags.NoColor = None,
) -> None:
    """Remove channels, heads or blocks of MODEL, or set weights to zero, with the least loss without training."""
    output, chosen = _begin(ctx, settings.PRUNE)
    request = pruning.prune_request(chosen)
    if chosen.get("dry-run"):
        from llmpare.compress.plan import plan_prune

        planned = plan_prune(request)
        output.plan(planned)
        return
    with Watcher(output) as watcher:
        from llmpare.compress.run import run_prune

        report = run_prune(request, watcher)
    _show_report(output, request.out, report)


@app.command()
def distill(
    ctx: typer.Context,
    teacher: flags.Teacher = None,
    student: flags.Student = None,
    out: flags.Out = None,
    student_ffn: flags.StudentFfn = None,
    student_heads: flags.StudentHeads = None,
    student_hidden: flags.StudentHidden = None,
    student_layers: flags.StudentLayers = None,
    student_config: flags.StudentConfig = None,
    dataset: flags.TrainingText = None,
    tokens: flags.Tokens = None,
    seqlen: flags.Seqlen = None,
    batch_tokens: flags.BatchTokens = None,
    lr: flags.Lr = None,
    warmup: flags.Warmup = None,
    loss: flags.Loss = None,
    beta: flags.Beta = None,
    temperature: flags.Temperature = None,
    text_share: flags.TextShare = None,
    hidden_loss: flags.HiddenLoss = None,
    hidden_weight: flags.HiddenWeight = None,
    lora_rank: flags.LoraRank = None,
    gradient_checkpointing: flags.GradientCheckpointing = None,
    teacher_dtype: flags.TeacherDtype = None,
    cache_teacher: flags.CacheTeacher = None,
    on_policy: flags.OnPolicy = None,
    early_exit: flags.EarlyExit = None,
    student_scheme: flags.StudentScheme = None,
    group_size: flags.StudentGroupSize = None,
    format: flags.StudentFormat = None,
    save_steps: flags.SaveSteps = None,
    chat_template: flags.ChatTemplate = None,
    eval_dataset: flags.EvalDataset = None,
    eval_nsamples: flags.EvalNsamples = None,
    max_kl: flags.MaxKl = None,
    max_perplexity_increase: flags.MaxPerplexityIncrease = None,
    min_agreement: flags.MinAgreement = None,
    max_size: flags.MaxSize = None,
    device: flags.Device = None,
    dtype: flags.Dtype = None,
    seed: flags.Seed = None,
    max_memory: flags.MaxMemory = None,
    revision: flags.Revision = None,
    trust_remote_code: flags.TrustRemoteCode = None,
    allow_nonfinite: flags.AllowNonfinite = None,
    config: flags.Config = None,
    dry_run: flags.DryRun = None,
    force: flags.Force = None,
    restart: flags.Restart = None,
    strict: flags.Strict = None,
    json: flags.Json = None,
    quiet: flags.Quiet = None,
    no_color: flags.NoColor = None,
) -> None:
    """Train a small model on what a large one predicts: heal a pruned one, or make one anew."""
    output, chosen = _begin(ctx, settings.DISTILL)
    request = distilling.distill_request(chosen)
    if chosen.get("dry-run"):
        from llmpare.compress.distill.plan import plan_distill
        from llmpare.compress.hardware import device_kind

        planned = plan_distill(request, device=device_kind(request.device))
        output.plan(planned)
        return
    with Watcher(output) as watcher:
        from llmpare.compress.distill.run import run_distill

        report = run_distill(request, watcher)
    if report is not None:  # of several processes the first alone has one
        _show_report(output, request.out, report)


@app.command()
def evaluate(
    ctx: typer.Context,
    models: flags.Models = None,
    baseline: flags.Baseline = None,
    out: flags.ReportOut = None,
    text: flags.TextFiles = None,
    eval_dataset: flags.EvalDataset = None,
    nsamples: flags.WindowsMeasured = None,
    seqlen: flags.Seqlen = None,
    save_baseline: flags.SaveBaseline = None,
    top_k: flags.TopK = None,
    tasks: flags.Tasks = None,
    limit: flags.Limit = None,
    num_fewshot: flags.NumFewshot = None,
    include: flags.Include = None,
    task_batch_size: flags.TaskBatchSize = None,
    speed: flags.Speed = None,
    engines: flags.Engines = None,
    batch_sizes: flags.BatchSizes = None,
    prompt_lengths: flags.PromptLengths = None,
    variations: flags.Variations = None,
    new_tokens: flags.NewTokens = None,
    repeats: flags.Repeats = None,
    max_kl: flags.MaxKl = None,
    max_perplexity_increase: flags.MaxPerplexityIncrease = None,
    min_agreement: flags.MinAgreement = None,
    min_recovery: flags.MinRecovery = None,
    max_size: flags.MaxSize = None,
    min_tokens_per_second: flags.MinTokensPerSecond = None,
    junit: flags.Junit = None,
    against: flags.Against = None,
    device: flags.Device = None,
    dtype: flags.Dtype = None,
    max_memory: flags.MaxMemory = None,
    revision: flags.Revision = None,
    trust_remote_code: flags.TrustRemoteCode = None,
    config: flags.Config = None,
    strict: flags.Strict = None,
    json: flags.Json = None,
    quiet: flags.Quiet = None,
    no_color: flags.NoColor = None,
) -> None:
    """Measure what each MODEL lost and gained: accuracy, speed and size, against the original if one is named."""
    output, chosen = _begin(ctx, settings.EVALUATE)
    request = requests.evaluate_request(chosen)
    with Watcher(output) as watcher:
        from llmpare.compress.evaluate.run import run_evaluate

        report = run_evaluate(request, watcher)
    _show_report(output, request.out, report)


@app.command()
def inspect(ctx: typer.Context, folder: flags.Folder, json: flags.Json = None, no_color: flags.NoColor = None) -> None:
    """Show what a checkpoint holds: format, schemes, sizes, bits per weight."""
    from llmpare.compress import inspect as inspection

    output, _ = _begin(ctx, settings.LOOK)
    facts = inspection.inspect(Path(folder))
    output.lines(inspection.lines(facts), facts)


@app.command()
def verify(
    ctx: typer.Context,
    folder: flags.Folder,
    json: flags.Json = None,
    quiet: flags.Quiet = None,
    no_color: flags.NoColor = None,
) -> None:
    """Read back every file of a finished output and compare it with its manifest."""
    from llmpare.compress.checkpoint.manifest import verify as check

    output, _ = _begin(ctx, settings.LOOK)
    manifest = check(Path(folder))
    files, tensors = len(manifest["files"]), len(manifest["tensors"])
    output.note(f"{files} files and {tensors} tensors are as they were written")
    output.path(Path(folder), {"command": "verify", "path": folder, "files": files, "tensors": tensors})


def _begin(ctx: typer.Context, parsers: settings.Parsers) -> tuple[Output, Settings]:
    """The output, told what the flags say about it, and the settings of this command."""
    output: Output = ctx.obj
    chosen = settings.collect({name: value for name, value in ctx.params.items() if name != "folder"}, parsers)
    output.configure(
        as_json=chosen.get("json", False),
        quiet=chosen.get("quiet", False),
        no_color=chosen.get("no-color", False),
    )
    if "desc-act" in chosen:
        output.note("--desc-act has no effect: columns are always quantized in that order, with groups left in place")
    return output, chosen


def _show_plan(output: Output, request: QuantizeRequest) -> None:
    from llmpare.compress.plan import plan_quantize

    planned = plan_quantize(request)
    output.plan(planned)


def _show_report(output: Output, out: Path | None, report: dict[str, Any]) -> None:
    """Show a finished run; raises GateError when a gate or --strict rejects it. out: where its files lie, if it has."""
    from llmpare.compress.report import gates, headline, markdown

    for line in headline.lines(report):
        output.note(line)
    output.step_summary(markdown.render(report))
    if out is None:
        output.report(report)
    else:
        output.note(f"written     {out}")
        output.path(out, report)
    if not report["passed"]:
        kept = "the report is complete" if out is None else f"the output and its report are kept in {out}"
        raise GateError("; ".join(gates.reasons(report)), kept)
