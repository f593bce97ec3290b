"""The triangular factor that error propagation runs on, and how the Gram matrix is made fit for it.

H = XᵀX / tokens is the Gram matrix of a linear's inputs, [columns, columns], symmetric, float32.
"""

import torch
from torch import Tensor

MAX_DAMPING = 1.0  # times the mean diagonal; past that the Gram matrix no longer says anything


def dead_columns(gram: Tensor) -> Tensor:
    """Mask [columns] of inputs that were zero for every token: their weights change nothing."""
    return gram.diagonal() == 0


def damp(gram: Tensor, damping: float) -> Tensor:
    """H + damping · mean(diag H) · I, with 1 on the diagonal of dead columns. A new tensor."""
    diagonal = gram.diagonal()
    alive = diagonal != 0
    mean = diagonal.sum() / alive.sum().clamp(min=1)
    damped = gram.clone()
    damped.diagonal().copy_(torch.where(alive, diagonal + damping * mean, torch.ones_like(diagonal)))
    return damped


def inverse_factor(matrix: Tensor) -> Tensor | None:
    """R, upper triangular, with H⁻¹ = Rᵀ·R: `cholesky(inverse(H), upper=True)` by one factorisation, not two.

    With J the reversal of indices, L = cholesky(J·H·J) and U = J·L·J is upper triangular with H = U·Uᵀ; so R = U⁻¹.
    None when the matrix is not positive definite, or holds NaN or infinities.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(failed) != 0:
        return None
    upper = lower.flip(0, 1)
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor = torch.linalg.solve_triangular(upper, identity, upper=True)
    sound = torch.isfinite(factor).all() & (factor.diagonal() > 0).all()  # the root of 1/∞ is 0
    return factor if bool(sound) else None


def factorise(gram: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """(R, damping used): the inverse factor of the damped Gram, with ten times the damping for every failure.

    R is None when even MAX_DAMPING does not make it positive definite.
    """
    while True:
        factor = inverse_factor(damp(gram, damping))
        if factor is not None or damping >= MAX_DAMPING:
            return factor, damping
        damping = more(damping)


def more(damping: float) -> float:
    """The damping to try when this much was not enough."""
    return min(max(damping, 1e-4) * 10, MAX_DAMPING)


def correct(weight: Tensor, root: Tensor, drift: Tensor, strength: float) -> Tensor:
    """W + strength · W·D·(H + λI)⁻¹: the weight that makes up for errors that its inputs already carry.

    With X the original model's input and X̃ the compressed model's, W·X ≈ W′·X̃ in the least-squares sense at
    strength 1; less than 1 trusts the calibration text less. Idea: GPTAQ, arXiv:2504.02692.
    weight [rows, columns]; drift D = (X − X̃)ᵀX̃ / tokens; root: any R with (H + λI)⁻¹ = Rᵀ·R.
    """
    return weight + strength * (weight @ drift @ root.t() @ root)
