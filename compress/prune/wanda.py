"""Wanda: a weight counts by its size times the norm of its input. Sun et al., 2023 (arXiv:2306.11695).

Weights of one row compete, as in the paper: against each other, whole rows would be given up whose output is small
but matters, and nothing makes up for it (benchmarks/README.md).
"""

from dataclasses import replace

from torch import Tensor

from llmpare.compress.grid import Statistics
from llmpare.compress.prune import magnitude
from llmpare.compress.prune.masks import Quota
from llmpare.compress.prune.pruned import Pruned


def solve(weight: Tensor, statistics: Statistics, quota: Quota) -> Pruned:
    """The mask by |W_ij|·√H_jj for weight [rows, columns]. The weights that stay are as they were."""
    keep = replace(quota, by_row=True).keep(weight.abs() * statistics.gram.diagonal().sqrt())
    return Pruned(weight.where(keep, 0.0), keep)


def fallback(weight: Tensor, statistics: Statistics, quota: Quota, damping: float) -> Pruned:
    """What solvers return whose Gram matrix cannot be factorised even with this damping, with the note that says so."""
    sound = bool(statistics.gram.diagonal().isfinite().all())
    found = solve(weight, statistics, quota) if sound else magnitude.solve(weight, statistics, quota)
    cause = f"Gram matrix not positive definite, damping tried up to {damping:g}"
    action = "mask by weight and input, nothing refitted" if sound else "mask by weight alone, nothing refitted"
    found.notes.append({"cause": cause, "action": action})
    return found
