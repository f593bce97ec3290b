"""Sections of report.md that every command has."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmpare.compress.report import gates as limits
from llmpare.compress.report import predictions, show
from llmpare.compress.report.marks import code, plain, table

Section = Mapping[str, Any]


def gates(entries: Sequence[Section]) -> list[str]:
    """What was demanded and what was measured."""
    if not entries:
        return []
    rows = [(code(g["name"]), *limits.figures(g), "passed" if g["passed"] else "**failed**") for g in entries]
    return ["## Gates", "", *table(("gate", "measured", "limit", ""), rows, right="12")]


def concerns(report: Section) -> list[str]:
    """Failures, fallbacks and warnings."""
    lines: list[str] = []
    if report.get("failures"):
        rows = [(code(f["model"]), f["part"], plain(f["why"])) for f in report["failures"]]
        lines += ["## Not measured", "", *table(("model", "what", "why"), rows)]
    if report["fallbacks"]:
        lines += [""] * bool(lines)
        rows = [(code(f["name"]), plain(f["cause"]), plain(f["action"])) for f in report["fallbacks"]]
        lines += ["## Fallbacks", "", *table(("where", "why", "what was done"), rows)]
    if report["warnings"]:
        lines += [""] * bool(lines) + ["## Warnings", "", *(f"- {plain(w)}" for w in report["warnings"])]
    return lines


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
        f"{show.duration(cost['total_seconds'])} and at most {memory}.",
        "",
        *_predicted(cost),
        *table(("phase", "time"), rows, right="1"),
    ]


def _predicted(cost: Section) -> list[str]:
    found = predictions.rows(cost)
    return [*table(predictions.HEAD, found, right="123"), ""] if found else []
