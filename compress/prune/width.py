"""Which columns of a weight to keep, and the best weights for them: narrower layers without training.

The columns of a linear that writes to the residual stream (FFN down projection, attention output) are what the
channels and heads before it feed. Removing a set C of columns costs, once the others are refitted,

    tr(W_C · ([H⁻¹]_CC)⁻¹ · W_Cᵀ)                                   (optimal brain surgeon, Hassibi & Stork 1993)

Columns leave together, so costs taken once at the start mislead: correlated columns vouch for each other, and then
all go. Here they leave one at a time, and weight and inverse follow. Whatever the choice, the weights that remain
are refitted in one least-squares solve.

Shapes: weight W [rows, columns]; gram H = XᵀX / tokens [columns, columns], damped, positive definite. A metric other
than the plain squared error of the output, ‖M·e‖², is had by passing M·W for W to whatever chooses.
"""

import torch
from torch import Tensor

_BLOCK = 64  # columns that leave before the inverse is brought up to date by one matrix product


def eliminate(weight: Tensor, gram: Tensor, keep: int) -> Tensor:
    """Indices [keep], ascending, of the columns that remain when the cheapest of all leaves again and again.

    With P = H⁻¹ over the columns still there, column c costs ‖W_c‖² / P_cc. When it leaves, W −= W_c·P_c: / P_cc and
    P −= P_:c·P_c: / P_cc. Both are kept as P − U·Uᵀ and W − E·Uᵀ for a block of columns, of which only the diagonal
    and the squared norms are needed to choose the next.
    """
    columns = weight.shape[1]
    present, inverse = weight.clone(), torch.cholesky_inverse(torch.linalg.cholesky(gram))
    alive = torch.ones(columns, dtype=torch.bool, device=weight.device)
    leaving = columns - keep
    while leaving > 0:
        size = min(_BLOCK, leaving)
        leaving -= size
        gone = weight.new_zeros(columns, size)  # U
        errors = weight.new_zeros(len(weight), size)  # E
        diagonal, norms = inverse.diagonal().clone(), present.square().sum(0)
        for i in range(size):
            cost = torch.where(alive, norms / diagonal.clamp(min=torch.finfo(weight.dtype).tiny), torch.inf)
            c = cost.argmin()
            alive[c] = False
            root = diagonal[c].sqrt()
            gone[:, i] = (inverse[c] - gone[:, :i] @ gone[c, :i]) / root
            errors[:, i] = (present[:, c] - errors[:, :i] @ gone[c, :i]) / root
            share = errors[:, i] @ present - (errors[:, i] @ errors[:, :i]) @ gone[:, :i].t()
            norms += gone[:, i] * (errors[:, i].square().sum() * gone[:, i] - 2 * share)
            diagonal -= gone[:, i].square()
        inverse.addmm_(gone, gone.t(), alpha=-1)
        present.addmm_(errors, gone.t(), alpha=-1)
    return alive.nonzero().flatten()


def eliminate_groups(weight: Tensor, gram: Tensor, size: int, keep: int) -> Tensor:
    """The same for groups of `size` consecutive columns, such as heads: indices [keep] of the groups, ascending."""
    groups = weight.shape[1] // size
    present, inverse = weight.clone(), torch.cholesky_inverse(torch.linalg.cholesky(gram))
    alive = list(range(groups))
    while len(alive) > keep:
        parts = {group: slice(group * size, (group + 1) * size) for group in alive}
        costs = {group: _cost(present[:, part], inverse[part, part]) for group, part in parts.items()}
        first = min(alive, key=lambda group: costs[group])
        part = parts[first]
        step = torch.linalg.solve(inverse[part, part], inverse[part])
        present = present - present[:, part] @ step
        inverse = inverse - inverse[:, part] @ step
        alive.remove(first)
    return torch.tensor(alive, dtype=torch.long, device=weight.device)


def _cost(weight: Tensor, inverse: Tensor) -> float:
    """tr(W_C · ([H⁻¹]_CC)⁻¹ · W_Cᵀ)."""
    return float((weight * torch.linalg.solve(inverse, weight.t()).t()).sum())


def refit(cross: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """The weight [rows, kept] with the least squared error: W′_K = C_K · (H_KK)⁻¹, one Cholesky factorisation.

    cross C [rows, columns]: target × input per token. For the output of W itself that is W·H, and with the damping
    of H in it, keeping every column gives back W. Raises torch.linalg.LinAlgError if H_KK is not positive definite.
    """
    factor = torch.linalg.cholesky(gram[kept][:, kept])
    return torch.cholesky_solve(cross[:, kept].t(), factor).t()


def damped(gram: Tensor, damping: float) -> Tensor:
    """H + damping · mean(diag H) · I; the identity alone when nothing flows at all. A new tensor."""
    mean = gram.diagonal().mean()
    result = gram.clone()
    result.diagonal().add_(torch.where(mean > 0, damping * mean, torch.ones_like(mean)))
    return result
