"""What a method of pruning returns."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Pruned:
    """weight [rows, columns] float32, zero where keep [rows, columns] is False.

    notes: what did not go as planned, as {"cause", "action"}, for the report. damping: that the Gram matrix could be
    factorised with, None if that was not tried. sound: not if it was tried in vain.
    """

    weight: Tensor
    keep: Tensor
    notes: list[dict[str, str]] = field(default_factory=list)
    damping: float | None = None
    sound: bool = True


def raised(damping: float, used: float) -> list[dict[str, str]]:
    """The note that more damping was needed than asked for, if it was."""
    if used == damping:
        return []
    cause = f"Gram matrix not positive definite at damping {damping:g}"
    return [{"cause": cause, "action": f"damping raised to {used:g}"}]
