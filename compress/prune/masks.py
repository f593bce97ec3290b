"""Which weights stay: masks by a score, as many per linear as asked for, exactly.

Shapes: score [rows, columns], the larger the better; a mask is its like, True where a weight stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Quota:
    """How many weights stay in each of several linears that are solved as one stack of rows.

    rows, sparsity: of every linear, from the top. The share of zeros counts over the whole linear. pattern (n, m):
    instead, n weights stay in every m consecutive columns of a row.
    """

    rows: Sequence[int]
    sparsity: Sequence[float]
    pattern: tuple[int, int] | None = None

    def keep(self, score: Tensor) -> Tensor:
        """The mask for a stack, or for some of its columns; with a pattern, for whole groups of them."""
        if self.pattern is not None:
            return n_of_m(score, *self.pattern)
        parts = score.split(list(self.rows))
        return torch.cat([largest(part, 1 - zeros) for part, zeros in zip(parts, self.sparsity, strict=True)])

    def block(self, columns: int) -> int:
        """The least number of columns from `columns` that `keep` can be asked about at once."""
        size = 1 if self.pattern is None else self.pattern[1]
        return -(-columns // size) * size


def largest(score: Tensor, share: float) -> Tensor:
    """The mask of that share of all scores, rounded to whole weights; of equal scores the first ones stay."""
    count = round(share * score.numel())
    if count <= 0 or score.numel() == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    limit = _nth_largest(score.flatten(), count)
    mask, ties = score > limit, score == limit
    need = count - mask.sum()
    return mask | (ties & (ties.flatten().cumsum(0).view_as(ties) <= need))


def _nth_largest(values: Tensor, n: int) -> Tensor:
    """One of the values [count]. By `kthvalue` it takes ten times as long on a CPU; on CUDA, one block of threads."""
    if values.is_cuda:
        return values.topk(n, sorted=False).values.amin()
    return torch.tensor(np.partition(values.numpy(), -n)[-n])


def n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """The mask of the n best of every m consecutive columns; m divides the columns."""
    groups = score.unflatten(1, (-1, m))
    best = groups.topk(n, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(1)
