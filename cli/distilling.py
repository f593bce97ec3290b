"""Settings of `llmpare distill` → the frozen request that the library works on."""

from pathlib import Path
from typing import Any

from llmpare.cli.pruning import common
from llmpare.cli.requests import given
from llmpare.cli.settings import Settings, required
from llmpare.compress.distill.request import DistillRequest, carving_flags
from llmpare.compress.errors import UsageError
from llmpare.compress.prune.cut import Cut
from llmpare.compress.request import parse_scheme

CUT = {"student-ffn": "ffn", "student-heads": "heads", "student-hidden": "hidden", "student-layers": "layers"}
SAME = ("student", "tokens", "batch-tokens", "warmup", "loss", "beta", "temperature", "text-share", "hidden-loss",
        "hidden-weight", "lora-rank", "teacher-dtype", "on-policy", "save-steps")  # fmt: skip
ONLY_WITH = (("beta", "loss", "jsd"), ("hidden-weight", "hidden-loss", "mse"))


def distill_request(settings: Settings) -> DistillRequest:
    """What to do. Raises UsageError for missing and contradicting settings."""
    absent = "teacher" not in settings and "cache-teacher" in settings
    model = required(settings, *(("student", "--teacher or --student") if absent else ("teacher", "--teacher")))
    for name, owner, example in ONLY_WITH:
        if name in settings and (owner not in settings or (name == "beta" and settings["loss"] != example)):
            raise UsageError(f"--{name} belongs to --{owner} {example}", f"add --{owner} {example}, or leave it out")
    cut = given(settings, CUT)
    options = given(settings, {name: name.replace("-", "_") for name in SAME})
    for name in ("student-config", "cache-teacher"):
        if name in settings:
            options[name.replace("-", "_")] = Path(settings[name])
    if "early-exit" in settings:
        options["early_exit"] = tuple(settings["early-exit"])
    if "lr" in settings:
        options["rate"] = settings["lr"]
    options |= _scheme(settings)
    if cut:
        with carving_flags():
            options["cut"] = Cut(**cut)
    return DistillRequest(
        **common({**settings, "model": model}),
        **options,
        teacher_absent=absent,
        recompute=settings.get("gradient-checkpointing", False),
    )


def _scheme(settings: Settings) -> dict[str, Any]:
    """How the student is to be stored, if not as it came."""
    if "student-scheme" in settings:
        scheme = parse_scheme(settings["student-scheme"], group_size=settings.get("group-size"))
        return {"student_scheme": scheme, **given(settings, {"format": "format"})}
    for name in ("group-size", "format"):
        if name in settings:
            raise UsageError(f"--{name} belongs to --student-scheme", "add --student-scheme W4A16, or leave it out")
    return {}
