"""Quantization methods, one file each. This page is their registry and imports no torch.

A method is a function (weights, statistics, grid, group_size, *, options) → list of Solved, for matrices of one shape,
and one line below. Its options are its keyword-only parameters, repeated here with their defaults so that they can be
checked before any work.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmpare.compress import registry


@dataclass(frozen=True)
class Method:
    """solver: 'module:function'. tuner: the same for a second stage that works on the whole block, if there is one."""

    solver: str
    options: Mapping[str, float] = field(default_factory=dict)
    tuner: str | None = None
    tuner_options: Mapping[str, float] = field(default_factory=dict)
    needs_text: bool = True
    summary: str = ""

    @property
    def defaults(self) -> dict[str, float]:
        """Every option there is, with its default."""
        return {**self.options, **self.tuner_options}


_GPTQ = {"damping": 0.01, "rounds": 1, "sweeps": 2, "correction": 0.0}
METHODS: dict[str, Method] = {
    "rtn": Method("rtn:solve_alike", needs_text=False, summary="round to nearest, scales searched by input energy"),
    "gptq": Method("gptq:solve_alike", _GPTQ, summary="error propagation, then refinement in Gram space"),
    "tuned": Method(
        "gptq:solve_alike",
        _GPTQ,
        "tuned:tune",
        {"steps": 60, "step_size": 0.001},
        summary="gptq, then block-wise tuning",
    ),
}


def find(name: str) -> Method:
    """The method of that name. Raises UsageError with the nearest name and all there are."""
    return registry.find(METHODS, name)


def resolve(name: str, given: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """All options of the method, the given ones in place of the defaults: see registry.resolve."""
    return registry.resolve(METHODS, name, given)
