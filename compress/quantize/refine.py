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
    """L for every row: [rows]."""
    miss = quantized - weight
    return ((miss @ gram) * miss).sum(1)


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
    """Better codes [rows, columns] for fixed scales; `sweeps` passes over all columns in the given order.

    With G = (W − Q)·H, the best real value of column j is q_j + G_j / H_jj; rounding it to the grid is optimal
    because L is a parabola in q_j. A change Δ of column j changes G by −Δ·H_j.
    gram must have a positive diagonal.
    """
    grids = grid.columns(order, scale, zero, group_size)
    offset = zero.repeat_interleave(group_size, dim=1)
    centred = (codes - offset).t()[order]  # [columns, rows]: one contiguous row per step
    gram = linalg.permuted(gram, order)
    quantized = ((codes - offset) * scale.repeat_interleave(group_size, dim=1)).t()[order]
    gradient = gram @ (weight.t()[order] - quantized)  # [columns, rows]
    del quantized
    sharpness = (1 / gram.diagonal()).tolist()
    moves, changes = torch.empty_like(gradient[:_BLOCK]), torch.empty_like(gradient[:_BLOCK])  # in codes, in weights
    value = torch.empty_like(gradient[0])
    columns = len(order)
    for _ in range(sweeps):
        moved = torch.zeros((), device=weight.device)
        for start in range(0, columns, _BLOCK):
            end = min(start + _BLOCK, columns)
            local = gram[start:end, start:end]
            for i, (slope, present, move) in enumerate(
                zip(gradient[start:end], centred[start:end], moves, strict=False)
            ):
                at = start + i
                torch.addmv(slope, changes[:i].t(), local[i, :i], alpha=-1, out=value)  # what this block has changed
                torch.addcmul(present, value, grids.inverse[at], value=sharpness[at], out=value)
                torch.sub(value.round_().clamp_(grids.low[at], grids.high[at]), present, out=move)
                torch.mul(move, grids.scale[at], out=changes[i])
            moved += moves[: end - start].abs().amax()
            centred[start:end] += moves[: end - start]
            gradient.addmm_(gram[:, start:end], changes[: end - start], alpha=-1)
        if not moved:
            break
    better = torch.empty_like(codes)
    better[:, order] = centred.t()
    return better.add_(offset)


def refit_scales(weight: Tensor, gram: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, grid: IntGrid) -> Tensor:
    """The scales [rows, groups] that minimise L for fixed codes: one small least-squares problem per row.

    With c_g the codes minus zero of group g (zero elsewhere), A_gk = c_gᵀ·H·c_k and b_g = c_gᵀ·H·w; s = A⁻¹·b.
    Rows where rounding the result to the stored precision would not pay keep their scales.
    """
    rows, columns = weight.shape
    groups = scale.shape[1]
    size = columns // groups
    centred = (codes.reshape(rows, groups, size) - zero.unsqueeze(-1)).reshape(rows, columns)
    target = weight @ gram
    matrix = weight.new_empty(rows, groups, groups)
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        through = (centred[:, part] @ gram[part]).mul_(centred)  # [rows, columns]
        matrix[:, g] = through.reshape(rows, groups, size).sum(-1)
    wanted = (target * centred).reshape(rows, groups, size).sum(-1)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0  # a group of zeros only: any scale does
    diagonal.add_(diagonal.amax(1, keepdim=True), alpha=1e-6)
    diagonal.add_(empty)
    solved = torch.linalg.solve(matrix, wanted)
    solved = torch.where(empty | ~torch.isfinite(solved) | (solved == 0), scale, solved)
    fitted = grid.round_scale(solved)
    spread = size

    def expand(s: Tensor) -> Tensor:
        return s.repeat_interleave(spread, dim=1)

    worse = loss(weight, centred * expand(fitted), gram) > loss(weight, centred * expand(scale), gram)
    return torch.where(worse.unsqueeze(1), scale, fitted)
