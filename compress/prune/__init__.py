"""Methods of pruning that set weights to zero, one file each. This page is their registry and imports no torch.

A method is a function (weight, statistics, quota, *, options) → Pruned and one line below. Its options are its
keyword-only parameters, repeated here with their defaults so that they can be checked before any work; `refit`, which
is done after the method, is one more: 1 refits the weights that stay (refit.py), 0 leaves them as the method did.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmpare.compress import registry

REFIT = "refit"


@dataclass(frozen=True)
class Method:
    """solver: 'module:function'. refit: whether the weights that stay are refitted unless the user says otherwise.

    corrects: whether the solver itself lets them make up for those that leave.
    """

    solver: str
    options: Mapping[str, float] = field(default_factory=dict)
    refit: bool = False
    needs_text: bool = True
    corrects: bool = True

    @property
    def defaults(self) -> dict[str, float]:
        """Every option there is, with its default."""
        return {**self.options, REFIT: float(self.refit)}


DEFAULT = "alps"
METHODS: dict[str, Method] = {
    "magnitude": Method("magnitude:solve", needs_text=False, corrects=False),
    "wanda": Method("wanda:solve", corrects=False),
    "sparsegpt": Method("sparsegpt:solve", {"damping": 0.01}, refit=True),
    "alps": Method("alps:solve", {"damping": 0.01, "iterations": 20}, refit=True),
}


def find(name: str) -> Method:
    """The method of that name. Raises UsageError with the nearest name and all there are."""
    return registry.find(METHODS, name)


def resolve(name: str, given: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """All options of the method, the given ones in place of the defaults: see registry.resolve."""
    return registry.resolve(METHODS, name, given)
