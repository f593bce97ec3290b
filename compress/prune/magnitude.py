"""Magnitude pruning: the smallest weights go. Han et al., 2015 (arXiv:1506.02626)."""

from torch import Tensor

from llmpare.compress.grid import Statistics
from llmpare.compress.prune.masks import Quota
from llmpare.compress.prune.pruned import Pruned


def solve(weight: Tensor, statistics: Statistics | None, quota: Quota) -> Pruned:
    """The mask of the largest weights of weight [rows, columns]; what is known of the inputs does not count."""
    keep = quota.keep(weight.abs())
    return Pruned(weight.where(keep, 0.0), keep)
