"""The triangular factor that error propagation runs on, and how the Gram matrix is made fit for it.

H = XᵀX / tokens is the Gram matrix of a linear's inputs, [columns, columns], symmetric, float32.
"""

import torch
from torch import Tensor

MAX_DAMPING = 1.0  # times the mean diagonal; past that the Gram matrix no longer says anything
_PANEL = 256  # rows or columns worked on at once: enough to keep a processor busy, little beside the whole


def dead_columns(gram: Tensor) -> Tensor:
    """Mask [..., columns] of inputs that were zero for every token: their weights change nothing."""
    return gram.diagonal(dim1=-2, dim2=-1) == 0


def damp(gram: Tensor, damping: float) -> Tensor:
    """H + damping · mean(diag H) · I, with 1 on the diagonal of dead columns. A new tensor."""
    matrix = gram.clone()
    matrix.diagonal().copy_(_damped_diagonal(gram, damping))
    return matrix


def damp_(gram: Tensor, damping: float) -> Tensor:
    """H itself becomes what `damp` gives: of 16,000 columns, another matrix takes a gigabyte. Returns its diagonal."""
    before = gram.diagonal().clone()
    gram.diagonal().copy_(_damped_diagonal(gram, damping))
    return before


def _damped_diagonal(gram: Tensor, damping: float) -> Tensor:
    diagonal = gram.diagonal()
    alive = diagonal != 0
    mean = diagonal.sum() / alive.sum().clamp(min=1)
    return torch.where(alive, diagonal + damping * mean, torch.ones_like(diagonal))


def permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """matrix[order][:, order], with nothing of its size besides the result."""
    found = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    for start in range(0, len(order), _PANEL):
        found[start : start + _PANEL] = matrix[order[start : start + _PANEL]][:, order]
    return found


def upper_factor(matrix: Tensor) -> Tensor | None:
    """U, upper triangular, with H = U·Uᵀ. None when H is not positive definite, or holds NaN or infinities.

    It is to error propagation what the Cholesky factor of H⁻¹ is, R = U⁻¹, without a matrix ever being inverted.
    With J the reversal of indices, L = cholesky(J·H·J) gives U = J·L·J.
    """
    return _upper_factor_(matrix.flip(0, 1))


def _upper_factor_(matrix: Tensor) -> Tensor | None:
    """The same for J·H·J, contiguous, in its own memory."""
    lower, failed = matrix.t(), torch.empty((), dtype=torch.int32, device=matrix.device)  # LAPACK works on columns
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if int(failed) != 0:
        return None
    _reverse_(matrix)
    factor = matrix.t()
    sound = factor.sum().isfinite() & (factor.diagonal() > 0).all()
    return factor if bool(sound) else None


def _reverse_(matrix: Tensor) -> None:
    """J·M·J in the memory of M."""
    count = len(matrix)
    for start in range(0, count // 2, _PANEL):
        top = slice(start, min(start + _PANEL, count // 2))
        bottom = slice(count - top.stop, count - top.start)
        matrix[top], matrix[bottom] = matrix[bottom].flip(0, 1), matrix[top].flip(0, 1)
    if count % 2:
        matrix[count // 2] = matrix[count // 2].flip(0)


def factorise(gram: Tensor, damping: float, order: Tensor | None = None) -> tuple[Tensor | None, float]:
    """(U, damping used): the upper factor of the damped Gram, with ten times the damping for every failure.

    order: the sequence of columns that U is for, the present one if it is not given. U is None when even MAX_DAMPING
    does not make it positive definite. Takes no more memory than U.
    """
    order = torch.arange(len(gram), device=gram.device) if order is None else order
    backwards = order.flip(0)
    while True:
        matrix = permuted(gram, backwards)
        matrix.diagonal().copy_(_damped_diagonal(gram, damping)[backwards])
        factor = _upper_factor_(matrix)
        if factor is not None or damping >= MAX_DAMPING:
            return factor, damping
        damping = more(damping)


def more(damping: float) -> float:
    """The damping to try when this much was not enough: ten times of it, and of nothing a thousandth."""
    return min(max(damping, 1e-4) * 10, MAX_DAMPING)


def absorb(lines: Tensor, factor: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """The columns `part` of W, moved to where the output suffers least from the errors before them; and their R.

    lines [matrices, columns, rows]: errors W − Q before `part`, W from there on. factor: U, [matrices, columns,
    columns]. With a the errors and b the part, the loss ‖(W − Q)·U‖² of the part's own columns vanishes at
    Q_b = W_b + (W − Q)_a·U_ab·R_bb, R_bb = (U_bb)⁻¹ being that block of the Cholesky factor of H⁻¹. Returns Q_b
    [matrices, part, rows] and R_bb [matrices, part, part].
    """
    own = factor[:, part, part]
    identity = torch.eye(own.shape[1], dtype=own.dtype, device=own.device).expand(own.shape)
    inverse = torch.linalg.solve_triangular(own, identity, upper=True)
    owed = factor[:, : part.start, part].mT @ lines[:, : part.start]
    return torch.baddbmm(lines[:, part], inverse.mT, owed), inverse


def correct(weight: Tensor, factor: Tensor, order: Tensor, drift: Tensor, strength: float) -> Tensor:
    """W + strength · W·D·(H + λI)⁻¹: the weight that makes up for errors that its inputs already carry.

    With X the original model's input and X̃ the compressed model's, W·X ≈ W′·X̃ in the least-squares sense at
    strength 1; less than 1 trusts the calibration text less. Idea: GPTAQ, arXiv:2504.02692.
    weight [rows, columns]; drift D = (X − X̃)ᵀX̃ / tokens; factor: U of H + λI in that order of columns.
    """
    aim = (weight @ drift)[:, order]
    half = torch.linalg.solve_triangular(factor.mT, aim, upper=False, left=False)
    found = torch.linalg.solve_triangular(factor, half, upper=True, left=False)
    changed = weight.clone()
    changed[:, order] += strength * found
    return changed
