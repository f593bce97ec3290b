"""Numbers and foreign text as people read them."""

import math
from collections.abc import Mapping
from typing import Any


def printable(text: str) -> str:
    """text with everything escaped that a terminal or a log would act on rather than show.

    Control codes, line breaks, direction marks and undecodable bytes become \\x1b, \\n, \\u202e and so on.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def size(count: float) -> str:
    """Bytes in decimal units, as disks and hubs count: '4.3 MB'."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} bytes"


def count(number: int) -> str:
    """A large count in short: '5.82 M'."""
    for unit, scale in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:,}"


def figure(value: float | None, digits: int = 4) -> str:
    """A measured figure with that many significant digits; 'not finite' for what JSON has to store as null."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{digits - 1}e}" if places > 9 else f"{value:.{max(places, 0)}f}"


def with_error(value: float | None, error: float | None, digits: int = 4) -> str:
    """'58.29 ± 0.41'; no error is shown where none could be measured."""
    shown = figure(value, digits)
    return f"{shown} ± {figure(error, 2)}" if error and math.isfinite(error) else shown


def percent(share: float | None, places: int = 1, *, signed: bool = False) -> str:
    """A share as a percentage: 0.959 is '95.9 %'."""
    if share is None or not math.isfinite(share):
        return "not finite"
    return f"{100 * share:{'+' if signed else ''}.{places}f} %"


def groups(size: int) -> str:
    """The group size of a scheme, as a report has it: 'groups of 128'."""
    return {-1: "one scale per row", 0: "groups of a size fitted to each linear"}.get(size, f"groups of {size}")


def setting(row: Mapping[str, Any]) -> str:
    """How a model was run to be timed, by its row in the report: 'static cache, compiled, sdpa attention'."""
    cache = "no cache" if row["cache"] == "off" else f"{row['cache']} cache"
    return ", ".join([cache, *["compiled"] * row["compiled"], f"{row['attention']} attention"])


SCORED = ("score", "original", "recovery", "lost / gained", "p")


def scored(row: Mapping[str, Any], absent: str = "") -> list[str]:
    """A row of the report's tasks in the cells of SCORED: a score beside that of the original, the answers that it lost
    and gained, and how likely such a change is by chance. absent: for what there is not.
    """
    flips = row["flips"]
    return [
        with_error(row["value"], row["stderr"]),
        absent if row["baseline"] is None else figure(row["baseline"]),
        absent if row["recovery"] is None else percent(row["recovery"], 2),
        absent if flips is None else f"{flips['lost']} / {flips['gained']}",
        absent if flips is None else figure(flips["p_value"], 2),
    ]


def duration(seconds: float) -> str:
    """'4.2 s', '3 min 20 s', '2 h 5 min'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
