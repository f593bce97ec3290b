"""Refinement of codes and scales in Gram space: no data is looked at again.

Both steps lower L = tr((Q − W)·H·(Q − W)ᵀ) or leave it, and both keep the stored format. Coordinate descent picks,
column by column, the best code with all others fixed; the scale refit solves for the best scales with all codes
fixed. L is the layer's squared output error, so a lower L is a better layer.
"""

import torch
from torch import Tensor

from llmpare.compress.grid import IntGrid
from llmpare.compress.quantize import linalg

_BLOCK = 32  # columns looked at one by one before the gradient of all others is brought up to date


def loss(weight: Tensor, quantized: Tensor, gram: Tensor) -> Tensor:
    """L for every row: [..., rows]."""
    miss = quantized - weight
    return ((miss @ gram) * miss).sum(-1)


def coordinate_descent(
    weight: Tensor,
    gram: Tensor,
    order: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    grid: IntGrid,
    group_size: int,
    sweeps: int,
) -> Tensor:
    """Better codes [matrices, rows, columns] for fixed scales; `sweeps` passes over the columns in the given order.

    Shapes are those of gptq.propagate. With G = (W − Q)·H, the best real value of column j is q_j + G_j / H_jj;
    rounding it to the grid is optimal because L is a parabola in q_j. A change Δ of column j changes G by −Δ·H_j.
    gram must have a positive diagonal.
    """
    grids = grid.columns(order, scale, zero, group_size)
    offset = zero.repeat_interleave(group_size, dim=2)
    apart = codes - offset
    missing = torch.addcmul(weight, apart, scale.repeat_interleave(group_size, dim=2), value=-1)
    centred, missing = linalg.columns_first(apart, order), linalg.columns_first(missing, order)
    gram = linalg.permuted(gram, order)
    gradient = gram @ missing  # [matrices, columns, rows]
    del missing
    sharpness = 1 / gram.diagonal(dim1=1, dim2=2).unsqueeze(2)  # [matrices, columns, 1]
    slopes, present = gradient.split(1, 1), centred.unbind(1)
    moves, changes = torch.empty_like(gradient[:, :_BLOCK]), linalg.Backlog(gradient, _BLOCK)  # in codes, in weights
    for _ in range(sweeps):
        moved = torch.zeros((), device=weight.device)
        for start in range(0, len(present), _BLOCK):
            part = slice(start, min(start + _BLOCK, len(present)))
            here, count = grids(part), part.stop - start
            changes.begin(gram[:, part, part])
            paces = (here.inverse * sharpness[:, part]).unbind(1)
            lines = (slopes[part], present[part], moves.unbind(1), changes.each, paces)
            steps = zip(*lines, here.each(), strict=False)
            for i, (slope, code, move, change, pace, (size, _, low, high)) in enumerate(steps):
                best = torch.addcmul(code, changes.settle(i, slope), pace, out=move)
                torch.mul(best.round_().clamp_(low, high).sub_(code), size, out=change)
            moved = torch.maximum(moved, moves[:, :count].abs().amax())
            centred[:, part] += moves[:, :count]
            gradient.baddbmm_(gram[:, :, part], changes.all[:, :count], alpha=-1)
        if not moved:
            break
    return linalg.rows_first(centred, order).add_(offset)


def refit_scales(weight: Tensor, gram: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, grid: IntGrid) -> Tensor:
    """The scales [..., rows, groups] that minimise L for fixed codes: one small least-squares problem per row.

    With c_g the codes minus zero of group g (zero elsewhere), A_gk = c_gᵀ·H·c_k and b_g = c_gᵀ·H·w; s = A⁻¹·b.
    Rows where rounding the result to the stored precision would not pay keep their scales.
    """
    groups = scale.shape[-1]
    size = weight.shape[-1] // groups
    centred = (codes.unflatten(-1, (groups, size)) - zero.unsqueeze(-1)).flatten(-2)
    target = weight @ gram
    matrix = weight.new_empty(*scale.shape, groups)
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        through = (centred[..., part] @ gram[..., part, :]).mul_(centred)  # [..., rows, columns]
        matrix[..., g, :] = through.unflatten(-1, (groups, size)).sum(-1)
    wanted = target.mul_(centred).unflatten(-1, (groups, size)).sum(-1)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    empty = diagonal <= 0  # a group of zeros only: any scale does
    diagonal.add_(diagonal.amax(-1, keepdim=True), alpha=1e-6)
    diagonal.add_(empty)
    solved = torch.linalg.solve(matrix, wanted)
    solved = torch.where(empty | ~torch.isfinite(solved) | (solved == 0), scale, solved)
    fitted = grid.round_scale(solved)

    def expand(s: Tensor) -> Tensor:
        return s.repeat_interleave(size, dim=-1)

    worse = loss(weight, centred * expand(fitted), gram) > loss(weight, centred * expand(scale), gram)
    return torch.where(worse.unsqueeze(-1), scale, fitted)
