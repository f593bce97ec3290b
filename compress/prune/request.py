"""What `llmpare prune` is asked to do."""

import re
from dataclasses import dataclass
from typing import Any

from llmpare.compress.errors import UsageError
from llmpare.compress.prune import DEFAULT
from llmpare.compress.prune.cut import ShrinkRequest
from llmpare.compress.request import RunRequest, Scheme

UNIFORM, MEASURED = "uniform", "measured"


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: `kept` weights stay in every `of` consecutive input columns of a row."""

    kept: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.kept <= self.of or self.of > 64:
            raise UsageError(
                f"pattern {self.name} is not possible", "--pattern takes N:M, N of every M weights stay, M at most 64"
            )

    @property
    def name(self) -> str:
        """As people write it: '2:4'."""
        return f"{self.kept}:{self.of}"

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return 1 - self.kept / self.of


def parse_pattern(text: str) -> Pattern:
    """The pattern written as 'N:M'. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
    if match is None:
        raise UsageError(f"--pattern {text!r} is not N:M", "write 2:4 or 4:8: so many of every so many weights stay")
    return Pattern(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class MaskRequest(RunRequest):
    """Everything `llmpare prune` needs to know to set weights to zero where they lie.

    sparsity: the share of zeros, 0…1; with a pattern, the pattern's own. allocation: the same sparsity for every
    linear, or more where the measured loss is less. then: how to store what stays; None is dense, as in the source.
    """

    sparsity: float = 0.5
    pattern: Pattern | None = None
    allocation: str = UNIFORM
    method: str = DEFAULT
    options: tuple[tuple[str, float], ...] = ()  # the method's own, by name; validated against its registry line
    ignore: tuple[str, ...] = ()  # patterns of linears to leave as they are
    then: Scheme | None = None
    format: str = "compressed-tensors"  # of `then`

    def __post_init__(self) -> None:
        if self.pattern is not None:
            if self.allocation != UNIFORM:
                raise UsageError(
                    f"--pattern {self.pattern.name} leaves nothing to allocate", "give a --sparsity, or no --allocation"
                )
            object.__setattr__(self, "sparsity", self.pattern.sparsity)
        if not 0 <= self.sparsity <= 1:
            raise UsageError(f"sparsity {self.sparsity:g} is not between 0 and 1", "--sparsity 0.5 sets half to zero")
        if self.allocation not in (UNIFORM, MEASURED):
            raise UsageError(f"unknown allocation {self.allocation!r}", f"--allocation takes {UNIFORM} or {MEASURED}")

    def spec(self) -> dict[str, Any]:
        """See RunRequest; the options by name."""
        return {**super().spec(), "options": dict(self.options)}


PruneRequest = MaskRequest | ShrinkRequest
