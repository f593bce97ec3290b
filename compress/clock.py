"""Where the time goes: seconds by phase, for the report."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Adds up wall-clock seconds by phase. A phase inside another counts for itself, not for both.

    synchronise: called at both ends of a phase, so that work a device still owes is counted where it was asked for.
    """

    def __init__(self, synchronise: Callable[[], None] = lambda: None) -> None:
        self.seconds: dict[str, float] = {}
        self._synchronise = synchronise
        self._inner: list[float] = []
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time within the context under `name`."""
        self._synchronise()
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            self._synchronise()
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start
