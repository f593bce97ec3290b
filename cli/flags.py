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
GroupSize = Annotated[Text, value("--group-size", metavar="N", help="32, 64, 128 (default), or -1: per channel.")]
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
    list[str] | None, value("--ignore", metavar="REGEX", help="Leave these linears dense; may be repeated.")
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
Dtype = Annotated[Text, value("--dtype", metavar="NAME", help="auto (default), float32, bfloat16 or float16.")]
Seed = Annotated[Text, value("--seed", metavar="N", help="Seed of whatever is random.")]
MaxMemory = Annotated[Text, value("--max-memory", metavar="SIZE", help="Stay below this, as 16GiB.")]
Revision = Annotated[Text, value("--revision", metavar="NAME", help="Branch, tag or commit of a hub model.")]
TrustRemoteCode = Annotated[Switch, switch("--trust-remote-code", help="Allow code from the model folder to run.")]
AllowNonfinite = Annotated[Switch, switch("--allow-nonfinite", help="Take weights with NaN or infinity as they are.")]

Config = Annotated[Text, value("--config", metavar="FILE", help="YAML with the same names; a flag wins.")]
DryRun = Annotated[Switch, switch("--dry-run", help="Show the plan and stop.")]
Force = Annotated[Switch, switch("--force", help="Replace what OUT holds.")]
Restart = Annotated[Switch, switch("--restart", help="Throw an unfinished run away instead of resuming it.")]
Strict = Annotated[Switch, switch("--strict", help="Exit 4 on any warning or fallback.")]
Json = Annotated[Switch, switch("--json", help="Print the result, or the error, as one JSON object.")]
Quiet = Annotated[Switch, switch("--quiet", "-q", help="Only errors and warnings on stderr.")]
NoColor = Annotated[Switch, switch("--no-color", help="No colours; NO_COLOR does the same.")]
