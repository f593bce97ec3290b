"""Sections of report.md that every command has."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmpare.compress.report import gates as limits
from llmpare.compress.report import show
from llmpare.compress.report.marks import code, plain, table

Section = Mapping[str, Any]


def gates(entries: Sequence[Section]) -> list[str]:
    """What was demanded and what was measured."""
    if not entries:
        return []
    rows = [(code(g["name"]), *limits.figures(g), "passed" if g["passed"] else "**failed**") for g in entries]
    return ["## Gates", "", *table(("gate", "measured", "limit", ""), rows, right="12")]


def concerns(report: Section) -> list[str]:
    """Fallbacks and warnings."""
    lines: list[str] = []
    if report["fallbacks"]:
        rows = [(code(f["name"]), plain(f["cause"]), plain(f["action"])) for f in report["fallbacks"]]
        lines += ["## Fallbacks", "", *table(("where", "why", "what was done"), rows)]
    if report["warnings"]:
        lines += [""] * bool(lines) + ["## Warnings", "", *(f"- {plain(w)}" for w in report["warnings"])]
    return lines


def _predicted(cost: Section) -> str:
    """What the plan had said, and whether that was far off."""
    predicted = cost["predicted_memory_bytes"]
    if predicted is None:
        return ""
    measured = cost["peak_rss_bytes"] if cost["peak_device_bytes"] is None else cost["peak_device_bytes"]
    off = measured / predicted - 1 if predicted else 0.0
    far = "" if -0.25 <= off <= 0 else f", which is {show.percent(off, signed=True)} off"
    return f", where the plan said {show.size(predicted)}{far}"


def cost(cost: Section) -> list[str]:
    """Time and memory."""
    device = cost["peak_device_bytes"]
    memory = f"{show.size(cost['peak_rss_bytes'])} of memory" + (
        "" if device is None else f" and {show.size(device)} on the device"
    )
    rows = [(plain(phase), show.duration(seconds)) for phase, seconds in cost["seconds"].items()]
    return [
        "## Cost",
        "",
        f"{show.duration(cost['total_seconds'])} and at most {memory}{_predicted(cost)}.",
        "",
        *table(("phase", "time"), rows, right="1"),
    ]
