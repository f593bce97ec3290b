"""How the engine tells whoever is watching where it is; it never prints by itself."""

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Receives what happens during a run, in order and from one thread."""

    def phase(self, name: str) -> None:
        """A phase begins ('loading', 'compressing', 'verifying'); the one before it has ended."""

    def block(self, index: int, total: int, facts: Mapping[str, float]) -> None:
        """Decoder block `index` (from 0) of `total` is finished; facts are figures by name, such as seconds."""

    def step(self, done: int, total: int, left: float, facts: Mapping[str, float]) -> None:
        """`done` of `total` steps of a training are finished; about `left` seconds to come. facts: as for a block."""

    def warn(self, message: str) -> None:
        """Something the user should know although the run goes on."""


class Silent:
    """A Progress for library use and tests: nobody is watching."""

    def phase(self, name: str) -> None:
        pass

    def block(self, index: int, total: int, facts: Mapping[str, float]) -> None:
        pass

    def step(self, done: int, total: int, left: float, facts: Mapping[str, float]) -> None:
        pass

    def warn(self, message: str) -> None:
        pass
