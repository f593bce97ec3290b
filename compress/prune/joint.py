"""A mask and a number grid in one: a weight that has left has a grid of one value, zero.

Every solver that works on a grid then quantizes what stays and leaves the zeros alone. Given the refitted weights, it
solves the joint problem: with Ŵ the least-squares optimum for the mask and Q any weight that is zero outside it,

    tr((Q − W)·H·(Q − W)ᵀ) = tr((Ŵ − W)·H·(Ŵ − W)ᵀ) + tr((Q − Ŵ)·H·(Q − Ŵ)ᵀ)

since the gradient at Ŵ vanishes wherever Q − Ŵ does not.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from llmpare.compress.grid import Columns, IntGrid


@dataclass(frozen=True)
class MaskedGrid(IntGrid):
    """keep [rows, columns]: where a weight may be other than zero. Zero is on the grid: it is its own zero point.

    For one matrix at a time.
    """

    keep: Tensor = torch.empty(0, dtype=torch.bool)

    @classmethod
    def of(cls, grid: IntGrid, keep: Tensor) -> "MaskedGrid":
        """The grid, for these weights."""
        return cls(**{field.name: vars(grid)[field.name] for field in fields(IntGrid)}, keep=keep)

    def of_rows(self, part: slice) -> "MaskedGrid":
        """See IntGrid."""
        return replace(self, keep=self.keep[part])

    def columns(self, order: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Callable[[slice], Columns]:
        """See IntGrid; the bounds of weights that have left are both zero."""
        whole = super().columns(order, scale, zero, group_size)
        keep = self.keep.t()[order]

        def some(part: slice) -> Columns:
            here, kept = whole(part), keep[:, part]
            return replace(here, low=here.low * kept, high=here.high * kept)

        return some
