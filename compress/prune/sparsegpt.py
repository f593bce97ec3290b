"""SparseGPT: weights leave column by column, and the columns still to come absorb the error.

Frantar & Alistarh, 2023 (arXiv:2301.00774). With H + λI = U·Uᵀ, leaving out w_ij costs w_ij²·U_jj²; the mask of a
block of columns is chosen when the loop reaches it, from weights that have absorbed everything before.
"""

import torch
from torch import Tensor

from llmpare.compress.grid import Statistics
from llmpare.compress.lines import Backlog, Lines
from llmpare.compress.prune import wanda
from llmpare.compress.prune.masks import Quota
from llmpare.compress.prune.pruned import Pruned, raised
from llmpare.compress.quantize import linalg

_BLOCK = 32  # columns whose mask is chosen at once: fewer lose less, and the loop's products stay small


def solve(weight: Tensor, statistics: Statistics, quota: Quota, *, damping: float) -> Pruned:
    """Mask and weights of weight [rows, columns].

    damping: λ as a share of the mean diagonal of H. Falls back to wanda, with a note, when H cannot be factorised.
    """
    factor, used = linalg.factorise(statistics.gram, damping)
    if factor is None:
        return wanda.fallback(weight, statistics, quota, used)
    weight = weight.masked_fill(linalg.dead_columns(statistics.gram), 0.0)
    pruned, keep = propagate(weight, factor, quota)
    return Pruned(pruned, keep, raised(damping, used), used)


def propagate(weight: Tensor, factor: Tensor, quota: Quota) -> tuple[Tensor, Tensor]:
    """Weights and mask [rows, columns] by error propagation, from left to right.

    weight [rows, columns], dead columns already zero; factor: U with H + λI = U·Uᵀ, upper triangular. With R = U⁻¹,
    for each column i that loses weights, e = w_i/R_ii where they go, and every later column j gets w_j −= e·R_ij.
    """
    # [1, columns, rows]: W of the columns to come, errors W − Q of those that are done
    pending = weight.t().contiguous().unsqueeze(0)
    pruned, keep = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.bool)
    size, columns = quota.block(_BLOCK), len(factor)
    errors, leaving = Backlog(pending, size), Lines(keep.t().unsqueeze(0), size)
    diagonal = factor.diagonal()
    sharpness = diagonal.tolist()
    for start in range(0, columns, size):
        part = slice(start, min(start + size, columns))
        wanted, root = linalg.absorb(pending, factor.unsqueeze(0), part)
        mask = quota.keep((wanted[0] * diagonal[part, None]).square_().t())
        keep[:, part] = mask
        errors.begin(wanted, root.mT)
        lines = zip(sharpness[part], errors.lines.each, leaving.fill(~mask.t().unsqueeze(0)), strict=False)
        for i, (sharp, error, gone) in enumerate(lines):
            column = errors.settle(i)
            torch.mul(column, gone, out=error).mul_(sharp)
            column.masked_fill_(gone, 0.0)
        left = errors.columns.all[0, : part.stop - start]
        pruned[:, part] = left.t()
        pending[0, part] -= left
    return pruned, keep
