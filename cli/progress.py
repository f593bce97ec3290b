"""A run as it is watched: one live line on a terminal, one plain line per block elsewhere."""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from llmpare.cli.output import Output
from llmpare.compress.report import show


class Watcher:
    """A compress.progress.Progress that shows itself through an Output, and leaves no live line behind.

    clock: seconds from any start.
    """

    def __init__(self, output: Output, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._phase = ""
        self._begun = clock()

    def phase(self, name: str) -> None:
        self._phase = name
        self._begun = self._clock()
        self._show(name)

    def block(self, index: int, total: int, facts: Mapping[str, float]) -> None:
        figures = "".join(f", {name.replace('_', ' ')} {value:.3g}" for name, value in facts.items())
        elapsed = self._clock() - self._begun
        left = elapsed / (index + 1) * (total - index - 1)
        ahead = f", about {show.duration(left)} left" if (self._output.live or index == 0) and left >= 1 else ""
        self._show(f"{self._phase}: block {index + 1} of {total}{figures}{ahead}")

    def step(self, done: int, total: int, left: float, facts: Mapping[str, float]) -> None:
        figures = "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in facts.items())
        ahead = f", about {show.duration(left)} left" if done < total else ""
        self._show(f"{self._phase}: step {done} of {total}{figures}{ahead}")

    def warn(self, message: str) -> None:
        self._output.warn(message)

    def __enter__(self) -> Self:
        self.phase("starting")  # importing the engine imports torch, which takes seconds
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._output.clear_status()

    def _show(self, text: str) -> None:
        if self._output.live:
            self._output.status(text)
        else:
            self._output.note(text)
