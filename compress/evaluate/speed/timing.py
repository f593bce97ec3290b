"""Clocks and statistics of repeated measurements: when things happened, and what a list of durations comes to."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Marks(Protocol):
    """Moments in the order they were marked, on whichever clock the device keeps."""

    def mark(self) -> None:
        """What was asked of the device before this call belongs to the interval that ends here."""
        ...

    def intervals(self) -> list[float]:
        """Seconds between consecutive marks; waits for the device. One fewer than there are marks."""
        ...


class HostMarks:
    """Marks by the host's clock, for devices that have finished when a call returns. clock: seconds, rising."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._times: list[float] = []

    def mark(self) -> None:
        self._times.append(self._clock())

    def intervals(self) -> list[float]:
        return [after - before for before, after in zip(self._times, self._times[1:], strict=False)]


class CudaMarks:
    """Marks by events in the device's own queue, so that no step has to wait for the host to look at a clock."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        self._events.append(event)

    def intervals(self) -> list[float]:
        self._stream.synchronize()
        pairs = zip(self._events, self._events[1:], strict=False)
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def marks(device: torch.device) -> Marks:
    """The clock to use for that device."""
    return CudaMarks(device) if device.type == "cuda" else HostMarks()


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0…1) of the values lie, interpolated linearly between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def spread(values: Sequence[float]) -> float:
    """Distance between the quartiles as a share of the median: 0.05 says that the middle half lies within 5 %."""
    return (quantile(values, 0.75) - quantile(values, 0.25)) / statistics.median(values)


def milliseconds(seconds: Sequence[float]) -> dict[str, float] | None:
    """Median and 90th percentile in milliseconds, or None where nothing was timed."""
    if not seconds:
        return None
    return {"median": 1000 * statistics.median(seconds), "p90": 1000 * quantile(seconds, 0.9)}
