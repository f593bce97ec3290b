"""Settings of `llmpare prune` → the frozen request that the library works on."""

from pathlib import Path
from typing import Any

from llmpare.cli.requests import gates, given, regex
from llmpare.cli.settings import Settings, required
from llmpare.compress import prune
from llmpare.compress.errors import UsageError
from llmpare.compress.prune.cut import Cut, ShrinkRequest
from llmpare.compress.prune.request import MaskRequest, PruneRequest, parse_pattern
from llmpare.compress.request import BUNDLED, Scheme, TextSpec, parse_scheme

MASK = ("sparsity", "pattern", "allocation", "method", "refit", "damping", "iterations", "then", "group-size", "format")
SHAPE = ("ffn", "heads", "hidden", "layers", "drop-layers", "experts", "target-params", "target-size", "round-to")
OPTIONS = ("refit", "damping", "iterations")


def prune_request(settings: Settings) -> PruneRequest:
    """What to do. Raises UsageError for missing, unknown and contradicting settings."""
    masks, shapes = ([name for name in names if name in settings] for names in (MASK, SHAPE))
    if masks and shapes:
        raise UsageError(
            f"--{masks[0]} sets weights to zero, --{shapes[0]} removes them from the shapes", "do one after the other"
        )
    shared = common(settings)
    if "sparsity" in settings or "pattern" in settings:
        return _mask(settings, shared)
    if masks:
        raise UsageError(f"--{masks[0]} says nothing of how much to prune", "add --sparsity 0.5 or --pattern 2:4")
    target = (
        {} if any(name in settings for name in SHAPE if name != "round-to") else given(settings, {"max-kl": "max_kl"})
    )
    cut = Cut(**given(settings, {name: name.replace("-", "_") for name in SHAPE}), **target)
    if not (cut.explicit or cut.searched):
        raise UsageError(
            "nothing says what to prune",
            "for a smaller and faster model give --ffn 0.75 or --target-params 6B; for a mask, --sparsity 0.5",
        )
    return ShrinkRequest(**shared, cut=cut)


def _mask(settings: Settings, shared: dict[str, Any]) -> MaskRequest:
    if "sparsity" in settings and "pattern" in settings:
        raise UsageError("--sparsity and --pattern both say how much to prune", "give one of the two")
    method = settings.get("method", prune.DEFAULT)
    options = {name: float(settings[name]) for name in OPTIONS if name in settings}
    return MaskRequest(
        **shared,
        method=method,
        options=prune.resolve(method, options),
        ignore=tuple(regex(text, "--ignore") for text in settings.get("ignore", ())),
        pattern=parse_pattern(settings["pattern"]) if "pattern" in settings else None,
        then=_then(settings),
        **given(settings, {name: name for name in ("sparsity", "allocation", "format")}),
    )


def _then(settings: Settings) -> Scheme | None:
    if "then" in settings:
        return parse_scheme(settings["then"], group_size=settings.get("group-size"))
    for name in ("group-size", "format"):
        if name in settings:
            raise UsageError(f"--{name} belongs to --then", "add --then W4A16, or leave it out")
    return None


def common(settings: Settings) -> dict[str, Any]:
    """The fields of every request that makes a checkpoint."""
    seqlen = settings.get("seqlen")
    same = ("device", "dtype", "seed", "max-memory", "revision", "trust-remote-code", "allow-nonfinite", "strict",
            "force", "restart")  # fmt: skip
    return {
        "model": required(settings, "model", "MODEL"),
        "out": Path(required(settings, "out", "-o OUT")),
        "calibration": TextSpec(
            settings.get("dataset", BUNDLED), settings.get("nsamples"), seqlen, settings.get("chat-template", False)
        ),
        "evaluation": TextSpec(settings.get("eval-dataset", BUNDLED), settings.get("eval-nsamples"), seqlen),
        "gates": gates(settings),
        **given(settings, {name: name.replace("-", "_") for name in same}),
    }
