"""How many zeros each linear gets when they need not all get the same: where they cost least.

Every part of a model (linears that read the same input) has a curve of what it costs to be sparse. All costs together
are least, for a given number of zeros in all, when one more zero costs the same everywhere. OWL (Yin et al., 2023,
arXiv:2310.05175) guesses the curves from outliers among the activations; here they are measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SPREAD = 0.2  # how far from the mean a part may go
POINTS = (-SPREAD, 0.0, SPREAD)  # where curves are measured, around the mean
_STEPS = 80  # between the least and the most
_ROUNDS = 100  # of bisection


@dataclass(frozen=True)
class Part:
    """weights: how many there are. costs: by sparsity, more than 0, at least two of them."""

    weights: int
    costs: Mapping[float, float]

    def cost(self, sparsity: float) -> float:
        """Between measured points the logarithm is a straight line: costs grow by the same factor with each step."""
        points = sorted(self.costs)
        above = next((i for i, point in enumerate(points) if point >= sparsity), len(points) - 1)
        low, high = points[max(above - 1, 0)], points[max(above, 1)]
        share = (sparsity - low) / (high - low)
        return math.exp((1 - share) * math.log(self.costs[low]) + share * math.log(self.costs[high]))


def around(mean: float) -> list[float]:
    """Sparsities at which to measure curves, for this mean."""
    return sorted({min(max(mean + step, 0.01), 0.99) for step in POINTS})


def allot(parts: Sequence[Part], mean: float) -> list[float]:
    """The sparsity of every part at the least cost in all, with `mean` over all weights."""
    if len(parts) == 1:
        return [mean]
    grids = [[min(p.costs) + (max(p.costs) - min(p.costs)) * i / _STEPS for i in range(_STEPS + 1)] for p in parts]
    tables = [[part.cost(sparsity) for sparsity in grid] for part, grid in zip(parts, grids, strict=True)]
    total = sum(part.weights for part in parts)

    def at(price: float) -> list[float]:
        """What every part takes when a zero brings in this price."""
        return [
            min(zip(grid, table, strict=True), key=lambda entry: entry[1] - price * part.weights * entry[0])[0]  # noqa: B023
            for part, grid, table in zip(parts, grids, tables, strict=True)
        ]

    def reached(found: Sequence[float]) -> float:
        return sum(part.weights * sparsity for part, sparsity in zip(parts, found, strict=True)) / total

    low, high = 0.0, max(table[-1] / part.weights for part, table in zip(parts, tables, strict=True)) * 1e3
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(at(middle)) < mean else (low, middle)
    below, above = at(low), at(high)
    least, most = reached(below), reached(above)
    share = (mean - least) / (most - least) if most > least else 0.0
    return [a + share * (b - a) for a, b in zip(below, above, strict=True)]
