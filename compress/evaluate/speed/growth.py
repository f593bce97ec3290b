"""When a series of growing batches ends: before the one that would no longer fit into memory or time."""

from dataclasses import dataclass

from llmpare.compress import memory


@dataclass
class Growth:
    """A series so far. loaded: bytes held with no case running. room: bytes there may be; None where the device itself
    says when it is full. seconds: time for all of the series. ended: nothing larger is to be tried.
    """

    loaded: int
    room: int | None
    seconds: float
    ended: bool = False
    spent: float = 0.0
    _batch: int = 0
    _peak: int = 0
    _last: float = 0.0

    def record(self, batch: int, peak: int, seconds: float, *, counts: bool = True) -> None:
        """A batch that went well: bytes held at its peak, seconds it took. counts: whether they come off the time."""
        self._batch, self._peak, self._last = batch, peak, seconds
        self.spent += seconds * counts

    def refuses(self, batch: int) -> str:
        """Why this batch should not be tried, judged by the last one if there was one; '' if it may fit."""
        factor = batch / self._batch if self._batch else 0.0
        needed = self.loaded + (self._peak - self.loaded) * factor
        if self.room is not None and needed > self.room:
            return f"it would take about {memory.show(needed)} of the {memory.show(self.room)} allowed"
        if self.spent + self._last * factor > self.seconds:
            return f"the {self.seconds:.0f} s for larger batches are over; --batch-sizes names sizes to measure"
        return ""
