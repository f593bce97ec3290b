"""ALPS: mask and weights are found together, by ADMM in Gram space. Meng et al., 2024 (arXiv:2406.07831).

The problem is to minimise tr((Q − W)·H·(Q − W)ᵀ) over sparse Q. It is split in two: X is free and D is sparse, and
a penalty ρ with multipliers V draws them together.

    X = (W·H + ρ·D − V)·(H + ρI)⁻¹        D = X + V/ρ, where it is largest        V += ρ·(X − D)

As ρ grows the mask settles; then the weights that stay are refitted. All this runs in units in which the diagonal of
H is 1, so that sizes of weights in different columns compare. An iteration costs one product with a matrix of H's size.
"""

import torch
from torch import Tensor

from llmpare.compress.grid import Statistics
from llmpare.compress.prune import wanda
from llmpare.compress.prune.masks import Quota
from llmpare.compress.prune.pruned import Pruned, raised
from llmpare.compress.quantize import linalg

_PENALTIES = (0.03, 0.07, 0.17, 0.41, 1.0)  # ρ: each takes one factorisation


def solve(weight: Tensor, statistics: Statistics, quota: Quota, *, damping: float, iterations: float) -> Pruned:
    """Mask and weights of weight [rows, columns].

    damping: λ as a share of the mean diagonal of H. iterations: of ADMM, in all; at least one for every penalty.
    Falls back to wanda, with a note, when H cannot be factorised.
    """
    weight = weight.masked_fill(linalg.dead_columns(statistics.gram), 0.0)
    used = damping
    while True:
        damped = linalg.damp(statistics.gram, used)
        scale = damped.diagonal().sqrt()
        scaled = damped.div_(scale).div_(scale.unsqueeze(1))
        found = admm(weight * scale, scaled, quota, max(1, round(iterations / len(_PENALTIES))))
        if found is not None:
            sparse, keep = found
            return Pruned(sparse / scale, keep, raised(damping, used), used)
        if used >= linalg.MAX_DAMPING:
            return wanda.fallback(weight, statistics, quota, used)
        used = linalg.more(used)


def admm(weight: Tensor, gram: Tensor, quota: Quota, iterations: int) -> tuple[Tensor, Tensor] | None:
    """Q and its mask [rows, columns]; None if gram is not positive definite.

    gram: with ones on its diagonal. iterations: per penalty.
    """
    target = weight @ gram
    sparse, multipliers = weight, torch.zeros_like(weight)
    keep = torch.ones_like(weight, dtype=torch.bool)
    for penalty in _PENALTIES:
        shifted = gram.clone()
        shifted.diagonal().add_(penalty)
        lower, failed = torch.linalg.cholesky_ex(shifted)
        if int(failed) != 0:
            return None
        inverse = torch.cholesky_inverse(lower)
        for _ in range(iterations):
            free = torch.add(target, sparse, alpha=penalty).sub_(multipliers) @ inverse
            wanted = torch.add(free, multipliers, alpha=1 / penalty)
            keep = quota.keep(wanted.abs())
            sparse = wanted.where(keep, 0.0)
            multipliers.add_(free.sub_(sparse), alpha=penalty)
    return sparse, keep
