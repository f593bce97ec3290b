"""What a run was said to take beside what it took, as both pages show it."""

from collections.abc import Callable, Mapping
from typing import Any

from llmpare.compress.report import show

HEAD = ("", "predicted", "measured", "off by")


def rows(cost: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Cells under HEAD, one row for everything that was predicted. cost: the section of the report."""
    peak = "peak_rss_bytes" if cost["peak_device_bytes"] is None else "peak_device_bytes"
    pairs: list[tuple[str, str, str, Callable[[float], str]]] = [
        ("memory", "predicted_memory_bytes", peak, show.size),
        ("weight files", "predicted_weight_files_bytes", "weight_files_bytes", lambda count: f"{count:,} bytes"),
        ("time, once the first block was done", "predicted_seconds", "total_seconds", show.duration),
    ]
    found = []
    for what, predicted, measured, shown in pairs:
        said, was = cost[predicted], cost[measured]
        if said:
            off = "nothing" if said == was else show.percent(was / said - 1, signed=True)
            found.append((what, shown(said), shown(was), off))
    return found
