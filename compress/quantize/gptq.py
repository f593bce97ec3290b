"""GPTQ: round column by column and let the columns still to come absorb the error.

Frantar et al., 2022 (arXiv:2210.17323), with static act-order: scales belong to the *original* groups of columns,
only the order of the loop follows the importance of the inputs, so the stored layout stays trivial.
"""

import torch
from torch import Tensor

from llmpare.compress.grid import IntGrid, Solved, Statistics
from llmpare.compress.quantize import linalg, refine, rtn


def solve(
    weight: Tensor,
    statistics: Statistics,
    grid: IntGrid,
    group_size: int,
    *,
    damping: float,
    rounds: float,
    sweeps: float,
    correction: float,
) -> Solved:
    """Codes, scales and zero points of weight [rows, columns], float32, columns divisible by group_size.

    damping: λ as a share of the mean diagonal of H. rounds: how often to refit the scales and then descend on the
    codes, with `sweeps` passes over the columns each time; 0 is plain GPTQ. correction: α in 0…1, how much of the
    error of earlier blocks to make up for (needs statistics.drift).
    Falls back to weighted rounding, with a note, when H cannot be factorised.
    """
    gram = statistics.gram
    order = gram.diagonal().argsort(descending=True, stable=True)
    factor, used = linalg.factorise(gram, damping, order)
    if factor is None:
        solved = rtn.solve(weight, statistics, grid, group_size)
        cause = f"Gram matrix not positive definite, damping tried up to {used:g}"
        solved.notes.append({"cause": cause, "action": "weighted round-to-nearest"})
        return solved
    if correction and statistics.drift is not None:
        weight = linalg.correct(weight, factor[:, order.argsort()], statistics.drift, correction)
    dead = linalg.dead_columns(gram)
    rows, columns = weight.shape
    solved = Solved.empty(rows, columns, group_size, weight.device)
    step = rows_at_once(weight)
    parts = [slice(start, start + step) for start in range(0, rows, step)]
    for part in parts:
        alive = weight[part].masked_fill(dead, 0.0)
        scale, zero = grid.search(alive, gram.diagonal(), group_size)
        codes = propagate(alive, factor, order, scale, zero, grid, group_size)
        solved.codes[part], solved.scale[part], solved.zero[part] = codes.to(torch.uint8), scale, zero
    del factor
    diagonal = linalg.damp_(gram, used)
    try:
        for part in parts if rounds else ():
            alive = weight[part].masked_fill(dead, 0.0)
            codes, scale, zero = solved.codes[part].float(), solved.scale[part], solved.zero[part]
            for _ in range(int(rounds)):
                scale = refine.refit_scales(alive, gram, codes, scale, zero, grid)
                codes = refine.coordinate_descent(
                    alive, gram, order, codes, scale, zero, grid, group_size, sweeps=int(sweeps)
                )
            solved.codes[part], solved.scale[part] = codes.to(torch.uint8), scale
    finally:
        gram.diagonal().copy_(diagonal)
    if used != damping:
        solved.notes.append(
            {
                "cause": f"Gram matrix not positive definite at damping {damping:g}",
                "action": f"damping raised to {used:g}",
            }
        )
    return solved


_WEIGHTS_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 28}  # solved together: a dozen float32 copies of them are alive


def rows_at_once(weight: Tensor) -> int:
    """How many rows of a weight are solved together: rows do not see each other, and take memory each."""
    most = _WEIGHTS_AT_ONCE.get(weight.device.type, _WEIGHTS_AT_ONCE["cpu"])
    return max(1, most // weight.shape[1])


_BLOCK = 32  # columns whose error is propagated one by one; everything to their right waits for one matrix product


def propagate(
    weight: Tensor, factor: Tensor, order: Tensor, scale: Tensor, zero: Tensor, grid: IntGrid, group_size: int
) -> Tensor:
    """Codes [rows, columns] that minimise tr((Q − W)·H·(Q − W)ᵀ) greedily, column by column.

    weight [rows, columns], dead columns already zero. order [columns]: the sequence in which columns are rounded.
    factor: R with (H⁻¹)[order][:, order] = Rᵀ·R, upper triangular. scale, zero [rows, groups], for original columns.

    With W permuted by `order`, for each column i: q_i = quantize(w_i), e = (w_i − q_i)/R_ii, and every later column
    j gets w_j −= e·R_ij. The columns outside the block get the sum of its corrections at once.
    """
    grids = grid.columns(order, scale, zero, group_size)
    pending = weight.t()[order]  # [columns, rows]: one contiguous row per step
    centred = torch.empty_like(pending)  # codes minus zero points
    errors, value = torch.empty_like(pending[:_BLOCK]), torch.empty_like(pending[0])
    shrink = (1 / factor.diagonal()).tolist()
    columns = len(order)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        local = factor[start:end, start:end].t().contiguous()
        for i, (column, code, error) in enumerate(zip(pending[start:end], centred[start:end], errors, strict=False)):
            at = start + i
            torch.addmv(column, errors[:i].t(), local[i, :i], alpha=-1, out=value)  # what this block has left to absorb
            torch.mul(value, grids.inverse[at], out=code).round_().clamp_(grids.low[at], grids.high[at])
            torch.addcmul(value, code, grids.scale[at], value=-1, out=error).mul_(shrink[at])
        pending[end:].addmm_(factor[start:end, end:].t(), errors[: end - start], alpha=-1)
    codes = torch.empty_like(weight)
    codes[:, order] = centred.t()
    return codes + zero.repeat_interleave(group_size, dim=1)
