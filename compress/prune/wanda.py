"""Wanda: a weight counts by its size times the norm of its input. Sun et al., 2023 (arXiv:2306.11695).

Weights of one row compete, since nothing makes up for a row that is given up. In the paper every row loses the same
number of weights; here, as in the variant of its appendix, every row loses the same share of the sum of its scores,
so rows whose weights are alike keep more of them. The number of zeros is the same (benchmarks/README.md compares).
"""

import torch
from torch import Tensor

from llmpare.compress.grid import Statistics
from llmpare.compress.prune import magnitude
from llmpare.compress.prune.masks import Quota
from llmpare.compress.prune.pruned import Pruned


def solve(weight: Tensor, statistics: Statistics, quota: Quota) -> Pruned:
    """The mask by |W_ij|·√H_jj for weight [rows, columns]. The weights that stay are as they were."""
    keep = quota.keep(lost(weight.abs() * statistics.gram.diagonal().sqrt()))
    return Pruned(weight.where(keep, 0.0), keep)


def lost(score: Tensor) -> Tensor:
    """The share of its row's sum that has left once a weight has, when the least leave first; score [rows, columns].

    It grows with the score within a row, so masks that choose within rows are those of the score.
    """
    ordered, order = score.sort(dim=1, stable=True)
    share = ordered.cumsum(1)
    share /= share[:, -1:].clamp(min=torch.finfo(score.dtype).tiny)
    return share.scatter(1, order, share)


def fallback(weight: Tensor, statistics: Statistics, quota: Quota, damping: float) -> Pruned:
    """What solvers return whose Gram matrix cannot be factorised even with this damping, with the note that says so."""
    sound = bool(statistics.gram.diagonal().isfinite().all())
    found = solve(weight, statistics, quota) if sound else magnitude.solve(weight, statistics, quota)
    cause = f"Gram matrix not positive definite, damping tried up to {damping:g}"
    action = "mask by weight and input, nothing refitted" if sound else "mask by weight alone, nothing refitted"
    found.notes.append({"cause": cause, "action": action})
    found.sound = False
    return found
