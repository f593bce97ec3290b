"""Round to nearest, with scales that minimise the error weighted by how much energy each input carries."""

from collections.abc import Sequence

from torch import Tensor

from llmpare.compress.grid import IntGrid, Solved, Statistics
from llmpare.compress.quantize import linalg


def solve(weight: Tensor, statistics: Statistics | None, grid: IntGrid, group_size: int) -> Solved:
    """Codes, scales and zero points of weight [rows, columns].

    Without statistics every input counts the same. A dead column counts nothing in the choice of the scales.
    """
    if statistics is None:
        scale, zero = grid.search(weight, None, group_size)
    else:
        alive = weight.masked_fill(linalg.dead_columns(statistics.gram), 0.0)
        scale, zero = grid.search(alive, statistics.gram.diagonal(), group_size)
    return grid.solved(weight, scale, zero)


def solve_alike(
    weights: Sequence[Tensor], statistics: Sequence[Statistics | None], grid: IntGrid, group_size: int
) -> list[Solved]:
    """`solve` for several matrices."""
    return [solve(weight, known, grid, group_size) for weight, known in zip(weights, statistics, strict=True)]
