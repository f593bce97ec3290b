"""Every flag: its spelling, its help, nothing else. What a value may be is decided in settings.py."""

from typing import Annotated, Any

import typer

from llmpare.compress.version import VERSION


def value(*spellings: str, metavar: str, help: str) -> Any:
    """A flag with a value, taken as text and parsed together with the config file."""
    return typer.Option(*spellings, metavar=metavar, help=help, show_default=False)


def switch(*spellings: str, help: str) -> Any:
    """A flag without a value."""
    return typer.Option(*spellings, help=help, show_default=False)


def version(ctx: typer.Context, asked: bool) -> None:
    """Show the version and stop, before anything else on the command line is looked at."""
    if asked:
        ctx.find_root().obj.version(VERSION)
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=version, is_eager=True, help="Show the version.", show_default=False),
]

Text = str | None
Switch = bool | None

Model = Annotated[
    Text, typer.Argument(metavar="MODEL", help="Folder with config.json, or a hub name.", show_default=False)
]
Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="Folder with a model.", show_default=False)]
Out = Annotated[Text, value("-o", "--out", metavar="OUT", help="Folder to write, complete or not at all.")]

Scheme = Annotated[Text, value("--scheme", metavar="NAME", help="W4A16 (default), W3A16, W8A16_ASYM, ...")]
Bits = Annotated[Text, value("--bits", metavar="N", help="2, 3, 4 or 8 bits per weight.")]
GroupSize = Annotated[Text, value("--group-size", metavar="N", help="32, 64, 128 (default), -1: per channel, or auto.")]
Asym = Annotated[Switch, switch("--asym/--sym", help="With or without (default) zero points.")]
Method = Annotated[Text, value("--method", metavar="NAME", help="rtn, gptq (default) or tuned.")]
Best = Annotated[Switch, switch("--best", help="Short for --method tuned: slower and closer to the original.")]
Damping = Annotated[Text, value("--damping", metavar="X", help="gptq, tuned: damping of the Gram matrix.")]
Rounds = Annotated[Text, value("--rounds", metavar="N", help="gptq, tuned: rounds of refinement.")]
Sweeps = Annotated[Text, value("--sweeps", metavar="N", help="gptq, tuned: sweeps of refinement of the codes.")]
Correction = Annotated[
    Text, value("--correction", metavar="X", help="gptq, tuned: correct this share of earlier errors.")
]
Steps = Annotated[Text, value("--steps", metavar="N", help="tuned: steps per block.")]
StepSize = Annotated[Text, value("--step-size", metavar="X", help="tuned: first step of the rounding.")]
DescAct = Annotated[Switch, typer.Option("--desc-act/--no-desc-act", hidden=True, show_default=False)]
Format = Annotated[Text, value("--format", metavar="NAME", help="compressed-tensors (default), gptq or dense.")]
Ignore = Annotated[
    list[str] | None,
    value("--ignore", metavar="REGEX", help="Leave these linears dense; may be repeated, and may begin with re:"),
]

Sparsity = Annotated[Text, value("--sparsity", metavar="X", help="Mask: set this share of weights to zero, as 0.5.")]
Pattern = Annotated[Text, value("--pattern", metavar="N:M", help="Mask: keep N of every M weights, as 2:4.")]
Allocation = Annotated[
    Text, value("--allocation", metavar="NAME", help="Mask: uniform (default), or measured: more where it costs less.")
]
PruneMethod = Annotated[
    Text, value("--method", metavar="NAME", help="Mask: magnitude, wanda, sparsegpt or alps (default).")
]
Refit = Annotated[
    Switch, switch("--refit/--no-refit", help="Mask: refit what stays; the default of sparsegpt and alps.")
]
PruneDamping = Annotated[Text, value("--damping", metavar="X", help="sparsegpt, alps: damping of the Gram matrix.")]
Iterations = Annotated[Text, value("--iterations", metavar="N", help="alps: iterations per matrix (20).")]
Then = Annotated[Text, value("--then", metavar="SCHEME", help="Mask: quantize what stays in the same pass, as W4A16.")]
ThenGroupSize = Annotated[Text, value("--group-size", metavar="N", help="--then: 32, 64, 128 (default), -1 or auto.")]
ThenFormat = Annotated[
    Text, value("--format", metavar="NAME", help="--then: compressed-tensors (default), gptq or dense.")
]
Ffn = Annotated[Text, value("--ffn", metavar="X", help="Shape: keep this share of the FFN channels, as 0.75.")]
Heads = Annotated[Text, value("--heads", metavar="X", help="Shape: keep this share of the attention heads.")]
Hidden = Annotated[Text, value("--hidden", metavar="X", help="Shape: keep this share of the residual channels.")]
Layers = Annotated[Text, value("--layers", metavar="N", help="Shape: keep N blocks.")]
DropLayers = Annotated[Text, value("--drop-layers", metavar="N-M,...", help="Shape: leave out these blocks, from 0.")]
Experts = Annotated[Text, value("--experts", metavar="N", help="Shape: keep N experts of every mixture.")]
RoundTo = Annotated[Text, value("--round-to", metavar="N", help="Shape: round widths up to a multiple of N (128).")]
TargetParams = Annotated[
    Text, value("--target-params", metavar="N", help="Shape: whatever costs least to get down to N, as 6B.")
]
TargetSize = Annotated[Text, value("--target-size", metavar="SIZE", help="The same for the size of the weights.")]

Teacher = Annotated[Text, value("--teacher", metavar="MODEL", help="The model to learn from: a folder, or a hub name.")]
Student = Annotated[Text, value("--student", metavar="MODEL", help="The model to train, such as the output of prune.")]
StudentFfn = Annotated[Text, value("--student-ffn", metavar="X", help="Carve it: this share of the FFN channels.")]
StudentHeads = Annotated[Text, value("--student-heads", metavar="X", help="Carve it: this share of the heads.")]
StudentHidden = Annotated[
    Text, value("--student-hidden", metavar="X", help="Carve it: this share of the residual channels.")
]
StudentLayers = Annotated[Text, value("--student-layers", metavar="N", help="Carve it: N blocks of the teacher.")]
StudentConfig = Annotated[
    Text, value("--student-config", metavar="FILE", help="Train a new model with this config.json.")
]
Tokens = Annotated[Text, value("--tokens", metavar="N", help="To learn from, as 100M (1M); text repeats if shorter.")]
BatchTokens = Annotated[
    Text, value("--batch-tokens", metavar="N", help="Of a step, on all devices; default by --tokens.")
]
Lr = Annotated[Text, value("--lr", metavar="X", help="Highest learning rate; default by size.")]
Warmup = Annotated[Text, value("--warmup", metavar="N", help="Steps in which it rises; default 5 % of all.")]
Loss = Annotated[
    Text,
    value("--loss", metavar="NAME", help="forward-kl (default), reverse-kl, jsd, total-variation, cross-entropy."),
]
Beta = Annotated[Text, value("--beta", metavar="X", help="jsd: weight of the teacher in the mean (0.5).")]
Temperature = Annotated[Text, value("--temperature", metavar="X", help="Of both models in the loss (1).")]
TextShare = Annotated[Text, value("--text-share", metavar="X", help="Of cross-entropy with the text in the loss (0).")]
HiddenLoss = Annotated[Text, value("--hidden-loss", metavar="NAME", help="Also compare blocks' states: mse, cosine.")]
HiddenWeight = Annotated[Text, value("--hidden-weight", metavar="X", help="Of that loss (1).")]
LoraRank = Annotated[Text, value("--lora-rank", metavar="N", help="Train only adapters of this rank; needs peft.")]
GradientCheckpointing = Annotated[
    Switch, switch("--gradient-checkpointing", help="Less memory for activations, a third more time.")
]
TeacherDtype = Annotated[
    Text, value("--teacher-dtype", metavar="NAME", help="Precision of the teacher; default as --dtype.")
]
CacheTeacher = Annotated[
    Text, value("--cache-teacher", metavar="DIR", help="Keep its predictions there; later runs need no --teacher.")
]
OnPolicy = Annotated[
    Text, value("--on-policy", metavar="X", help="Let the student write this share of the text, after a warm-up (0).")
]
EarlyExit = Annotated[
    Text, value("--early-exit", metavar="N,...", help="Teach it to stop after N blocks, to draft for itself.")
]
StudentScheme = Annotated[
    Text, value("--student-scheme", metavar="NAME", help="Train it as it will be rounded, and store codes, as W4A16.")
]
StudentGroupSize = Annotated[
    Text, value("--group-size", metavar="N", help="--student-scheme: 32, 64, 128 (default), -1 or auto.")
]
StudentFormat = Annotated[
    Text, value("--format", metavar="NAME", help="--student-scheme: compressed-tensors (default) or gptq.")
]
SaveSteps = Annotated[
    Text, value("--save-steps", metavar="N", help="Steps between checkpoints; default: every ten minutes.")
]
TrainingText = Annotated[
    Text, value("--dataset", metavar="NAME|PATH", help="To learn from: bundled (default), preset, hub name, or file.")
]

Models = Annotated[
    list[str] | None,
    typer.Argument(metavar="MODEL...", help="Folders with config.json, or hub names.", show_default=False),
]
Baseline = Annotated[
    Text, value("--baseline", metavar="MODEL|FOLDER", help="The original model, or what --save-baseline kept of it.")
]
ReportOut = Annotated[Text, value("-o", "--out", metavar="FOLDER", help="Write report.json, .md and .html there.")]
TextFiles = Annotated[
    list[str] | None, value("--text", metavar="FILE", help="Text to measure on, whole; may be repeated.")
]
WindowsMeasured = Annotated[Text, value("--nsamples", metavar="N", help="Only the first N windows of the text.")]
SaveBaseline = Annotated[
    Text, value("--save-baseline", metavar="FOLDER", help="Keep the baseline's predictions for later runs.")
]
TopK = Annotated[Text, value("--top-k", metavar="N", help="Tokens per position that --save-baseline keeps (64).")]
Tasks = Annotated[list[str] | None, value("--tasks", metavar="NAMES", help="Tasks of lm-eval, as arc_easy,hellaswag.")]
Limit = Annotated[Text, value("--limit", metavar="N", help="Documents per task.")]
NumFewshot = Annotated[Text, value("--num-fewshot", metavar="N", help="Examples in front of each question.")]
Include = Annotated[Text, value("--include", metavar="PATH", help="Folder or file with tasks as YAML.")]
TaskBatchSize = Annotated[Text, value("--task-batch-size", metavar="N", help="Sequences at a time in tasks (8).")]
Speed = Annotated[Switch, switch("--speed", help="Measure latency, throughput and memory.")]
Engines = Annotated[
    list[str] | None,
    value("--engines", metavar="NAMES", help="For --speed: transformers (default), vllm, onnxruntime, llama.cpp."),
]
BatchSizes = Annotated[
    list[str] | None,
    value("--batch-sizes", metavar="N,...", help="For --speed; default: 1, 2, 4, ... until memory ends."),
]
PromptLengths = Annotated[
    list[str] | None, value("--prompt-lengths", metavar="N,...", help="For --speed, in tokens (128,512).")
]
Variations = Annotated[
    list[str] | None,
    value(
        "--variations",
        metavar="NAMES",
        help="For --speed; default: static, off (caches), compiled, eager, flash_attention_2, continuous.",
    ),
]
NewTokens = Annotated[Text, value("--new-tokens", metavar="N", help="For --speed: tokens generated (32).")]
Repeats = Annotated[Text, value("--repeats", metavar="N", help="For --speed: runs of everything (5).")]
MinRecovery = Annotated[
    Text, value("--min-recovery", metavar="X%", help="Gate: every task's score against the baseline's.")
]
MinTokensPerSecond = Annotated[
    Text, value("--min-tokens-per-second", metavar="X", help="Gate: the highest throughput of generation.")
]
Junit = Annotated[Text, value("--junit", metavar="FILE", help="Write the gates as JUnit XML.")]
Against = Annotated[
    Text, value("--against", metavar="FILE", help="An earlier report.json: exit 4 on what got worse beyond noise.")
]

Dataset = Annotated[
    Text,
    value("--dataset", metavar="NAME|PATH", help="Calibration: bundled (default), preset, hub name, or file."),
]
Nsamples = Annotated[Text, value("--nsamples", metavar="N", help="Windows of calibration text.")]
Seqlen = Annotated[Text, value("--seqlen", metavar="N", help="Tokens per window.")]
ChatTemplate = Annotated[Switch, switch("--chat-template", help="Rows with roles go through the model's template.")]
EvalDataset = Annotated[Text, value("--eval-dataset", metavar="NAME|PATH", help="Text to measure on.")]
EvalNsamples = Annotated[Text, value("--eval-nsamples", metavar="N", help="Windows to measure on.")]

MaxKl = Annotated[Text, value("--max-kl", metavar="X", help="Gate: mean KL divergence, nats per token.")]
MaxPerplexityIncrease = Annotated[
    Text, value("--max-perplexity-increase", metavar="X%", help="Gate: rise of the perplexity.")
]
MinAgreement = Annotated[Text, value("--min-agreement", metavar="X%", help="Gate: same most likely token.")]
MaxSize = Annotated[Text, value("--max-size", metavar="SIZE", help="Gate: size of the weights, as 4GB.")]

Device = Annotated[Text, value("--device", metavar="NAME", help="auto (default), cpu, cuda or cuda:N.")]
Dtype = Annotated[
    Text, value("--dtype", metavar="NAME", help="Of the forward passes: auto (default), float32, bfloat16 or float16.")
]
Seed = Annotated[Text, value("--seed", metavar="N", help="Seed of whatever is random.")]
MaxMemory = Annotated[Text, value("--max-memory", metavar="SIZE", help="Stay below this, as 16GiB.")]
Revision = Annotated[Text, value("--revision", metavar="NAME", help="Branch, tag or commit of a hub model.")]
TrustRemoteCode = Annotated[Switch, switch("--trust-remote-code", help="Allow code from the model folder to run.")]
RouteAll = Annotated[Switch, switch("--route-all", help="Experts learn from all tokens, not only their own.")]
AllowNonfinite = Annotated[Switch, switch("--allow-nonfinite", help="Take weights with NaN or infinity as they are.")]

Config = Annotated[Text, value("--config", metavar="FILE", help="YAML with the same names; a flag wins.")]
DryRun = Annotated[Switch, switch("--dry-run", help="Show the plan and stop.")]
Force = Annotated[Switch, switch("--force", help="Replace what OUT holds.")]
Restart = Annotated[Switch, switch("--restart", help="Throw an unfinished run away instead of resuming it.")]
Strict = Annotated[Switch, switch("--strict", help="Exit 4 on any warning or fallback.")]
Json = Annotated[Switch, switch("--json", help="Print the result, or the error, as one JSON object.")]
Quiet = Annotated[Switch, switch("--quiet", "-q", help="Only errors and warnings on stderr.")]
NoColor = Annotated[Switch, switch("--no-color", help="No colours; NO_COLOR does the same.")]
