"""Round to nearest, with scales that minimise the error weighted by how much energy each input carries."""

from torch import Tensor

from llmpare.compress.grid import IntGrid, Solved, Statistics


def solve(weight: Tensor, statistics: Statistics | None, grid: IntGrid, group_size: int) -> Solved:
    """Codes, scales and zero points of weight [rows, columns].

    Without statistics every input counts the same. A dead column counts nothing in the choice of the scales.
    """
    importance = None if statistics is None else statistics.gram.diagonal()
    scale, zero = grid.search(weight, importance, group_size)
    return grid.solved(weight, scale, zero)
