"""What structured pruning is asked to remove, as plain numbers: no torch."""

import math
from dataclasses import dataclass, field

from llmpare.compress.errors import UsageError
from llmpare.compress.request import RunRequest

SHARES = ("ffn", "heads", "hidden")
TARGETS = ("target_params", "target_size", "max_kl")


@dataclass(frozen=True)
class Cut:
    """What is to remain. None: all of it, or whatever the target leaves.

    ffn, heads, hidden: shares, 0…1, of the FFN channels, attention heads (whole KV groups), residual channels.
    layers: number of blocks. drop_layers: blocks to leave out, by number. experts: of each mixture.
    round_to: what the numbers of FFN and residual channels are rounded up to a multiple of.
    target_params, target_size (bytes), max_kl (nats per token): limits under which the shares are found by measuring.
    Raises UsageError for numbers that make no sense, and for settings that exclude each other.
    """

    ffn: float | None = None
    heads: float | None = None
    hidden: float | None = None
    layers: int | None = None
    drop_layers: tuple[int, ...] = ()
    experts: int | None = None
    round_to: int = 128
    target_params: int | None = None
    target_size: int | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        for name in SHARES:
            share = vars(self)[name]
            if share is not None and not 0 < share <= 1:
                raise UsageError(f"--{name} {share:g} is no share of what there is", f"--{name} takes 0.75, at most 1")
        for name in ("layers", "experts", "round_to", *TARGETS):
            value = vars(self)[name]
            if value is not None and (not math.isfinite(value) or value <= 0):
                raise UsageError(f"--{name.replace('_', '-')} must be more than 0, not {value}")
        if self.layers is not None and self.drop_layers:
            raise UsageError("--layers and --drop-layers contradict each other", "give one of the two")
        given = [f"--{name.replace('_', '-')}" for name in TARGETS if vars(self)[name] is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} are several targets", "give one of them")
        if given and self.explicit:
            raise UsageError(
                f"{given[0]} finds what to remove by itself, {', '.join(self.explicit)} says it", "give one of the two"
            )

    @property
    def explicit(self) -> list[str]:
        """The flags that say what to remove, as they were given."""
        names = (*SHARES, "layers", "drop_layers", "experts")
        return [f"--{name.replace('_', '-')}" for name in names if vars(self)[name] not in (None, ())]

    @property
    def searched(self) -> bool:
        """Whether what to remove is to be found by measuring."""
        return any(vars(self)[name] is not None for name in TARGETS)


@dataclass(frozen=True)
class ShrinkRequest(RunRequest):
    """Everything that `llmpare prune` needs to know to make a model smaller in shape."""

    cut: Cut = field(default_factory=Cut)


def rounded(count: int, share: float | None, multiple: int) -> int:
    """The share of `count`, rounded up to the multiple; never more than there is."""
    return count if share is None else min(count, -(-_up(count * share) // multiple) * multiple)


def _up(value: float) -> int:
    """Rounded up, but for what floating-point products add."""
    return max(1, math.ceil(value - 1e-6))
