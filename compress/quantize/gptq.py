"""GPTQ: round column by column and let the columns still to come absorb the error.

Frantar et al., 2022 (arXiv:2210.17323), with static act-order: scales belong to the *original* groups of columns,
only the order of the loop follows the importance of the inputs, so the stored layout stays trivial.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmpare.compress.batches import weights_at_once
from llmpare.compress.grid import IntGrid, Solved, Statistics
from llmpare.compress.lines import Backlog, Lines, block, picked, place
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
    return solve_alike(
        [weight], [statistics], grid, group_size, damping=damping, rounds=rounds, sweeps=sweeps, correction=correction
    )[0]


def solve_alike(
    weights: Sequence[Tensor],
    statistics: Sequence[Statistics],
    grid: IntGrid,
    group_size: int,
    *,
    damping: float,
    rounds: float,
    sweeps: float,
    correction: float,
) -> list[Solved]:
    """`solve` for matrices of one shape, such as experts, each with its own inputs, in one loop over their columns."""
    matrices = [_prepare(weight, known, damping, correction) for weight, known in zip(weights, statistics, strict=True)]
    sound = [matrix.factor is not None for matrix in matrices]
    together = [matrix for matrix, good in zip(matrices, sound, strict=True) if good]
    solved = iter(_solve(together, grid, group_size, int(rounds), int(sweeps)) if together else ())
    found = []
    for matrix, known, good in zip(matrices, statistics, sound, strict=True):
        each = next(solved) if good else rtn.solve(matrix.weight, known, grid, group_size)
        if not good:
            cause = f"Gram matrix not positive definite, damping tried up to {matrix.damping:g}"
            each.notes.append({"cause": cause, "action": "weighted round-to-nearest"})
        elif matrix.damping != damping:
            cause = f"Gram matrix not positive definite at damping {damping:g}"
            each.notes.append({"cause": cause, "action": f"damping raised to {matrix.damping:g}"})
        found.append(each)
    return found


@dataclass
class _Matrix:
    """One matrix before the loop. order: its columns by importance. damping: used for the factor.

    factor: U of the damped H in that order, None if it has none. It is as large as H: whoever uses it takes it away.
    """

    weight: Tensor
    gram: Tensor
    order: Tensor
    factor: Tensor | None
    damping: float


def _prepare(weight: Tensor, statistics: Statistics, damping: float, correction: float) -> _Matrix:
    gram = statistics.gram
    order = gram.diagonal().argsort(descending=True, stable=True)
    factor, used = linalg.factorise(gram, damping, order)
    if factor is not None and correction and statistics.drift is not None:
        parts = weight.split(rows_at_once(weight))
        weight = torch.cat([linalg.correct(part, factor, order, statistics.drift, correction) for part in parts])
    return _Matrix(weight, gram, order, factor, used)


def _solve(matrices: Sequence[_Matrix], grid: IntGrid, group_size: int, rounds: int, sweeps: int) -> list[Solved]:
    weight = _stacked([matrix.weight for matrix in matrices])
    gram = _stacked([matrix.gram for matrix in matrices])
    order = _stacked([matrix.order for matrix in matrices])
    factor = _stacked([matrix.factor for matrix in matrices if matrix.factor is not None])
    for matrix in matrices:
        matrix.factor = None
    energy = gram.diagonal(dim1=1, dim2=2)  # [matrices, columns]
    dead = linalg.dead_columns(gram).unsqueeze(1)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scale = weight.new_empty(*weight.shape[:2], weight.shape[2] // group_size)
    zero = torch.empty_like(scale)
    step = rows_at_once(weight)
    parts = [slice(start, start + step) for start in range(0, weight.shape[1], step)]
    for part in parts:
        alive, own = weight[:, part].masked_fill(dead, 0.0), grid.of_rows(part)
        scale[:, part], zero[:, part] = own.search(alive, energy, group_size)
        codes[:, part] = propagate(alive, factor, order, scale[:, part], zero[:, part], own, group_size)
    del factor
    before = [linalg.damp_(each, matrix.damping) for each, matrix in zip(gram, matrices, strict=True)]
    try:
        for part in parts if rounds else ():
            alive, own = weight[:, part].masked_fill(dead, 0.0), grid.of_rows(part)
            present = refine.Refinement(alive, gram, codes[:, part], scale[:, part], zero[:, part], own, group_size)
            for _ in range(rounds):
                present.refit()
                present.descend(order, sweeps)
            codes[:, part], scale[:, part] = present.codes, present.scale
    finally:
        for each, diagonal in zip(gram, before, strict=True):
            each.diagonal().copy_(diagonal)
    return [Solved(*each) for each in zip(codes, scale, zero, strict=True)]


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """[matrices, …]; of a single one the same memory, since that may be large."""
    return torch.stack(list(parts)) if len(parts) > 1 else parts[0].unsqueeze(0)


_LINE = 16  # float32 numbers in a cache line


def rows_at_once(weight: Tensor) -> int:
    """How many rows of weights [..., rows, columns] are solved together: rows see nothing of each other.

    A multiple of a cache line where that is possible: products of others take half as long again.
    """
    most = weights_at_once(weight.device.type) * weight.shape[-2] // weight.numel()
    return max(1, most // _LINE * _LINE or most)


def propagate(
    weight: Tensor, factor: Tensor, order: Tensor, scale: Tensor, zero: Tensor, grid: IntGrid, group_size: int
) -> Tensor:
    """Codes [matrices, rows, columns] that minimise tr((Q − W)·H·(Q − W)ᵀ) greedily, column by column.

    weight [matrices, rows, columns], dead columns already zero. order [matrices, columns]: the sequence in which
    columns are rounded. factor: U with H[order][:, order] = U·Uᵀ, upper triangular, [matrices, columns, columns].
    scale, zero [matrices, rows, groups], for original columns.

    With W permuted by `order` and R = U⁻¹, for each column i: q_i = quantize(w_i), e = w_i − q_i, and every later
    column j gets w_j −= e·R_ij/R_ii. Columns of later blocks hear of it when it is their turn, from the errors of all
    columns before them: one large product for a block, which writes nothing but that block, and of R only the
    blocks on the diagonal.
    """
    grids = grid.columns(order, scale, zero, group_size)
    pending = picked(weight.mT, order)  # W of the columns to come, errors W − Q of those that are done
    centred = torch.empty_like(pending)  # codes minus zero points
    width = block(pending)
    errors = Backlog(pending, width)
    codes, scales, inverses = (Lines(pending, width) for _ in range(3))
    for start in range(0, order.shape[1], width):
        part = slice(start, min(start + width, order.shape[1]))
        here, count = grids(part), part.stop - start
        wanted, root = linalg.absorb(pending, factor, part)
        errors.begin(wanted, (root / root.diagonal(dim1=1, dim2=2).unsqueeze(2)).mT)
        lines = (codes.each, errors.lines.each, scales.fill(here.scale), inverses.fill(1 / here.scale), here.bounds())
        for i, (code, error, size, shrink, (low, high)) in zip(range(count), zip(*lines, strict=False), strict=False):
            value = errors.settle(i)
            torch.mul(value, shrink, out=code).round_().clamp_(low, high)
            torch.addcmul(value, code, size, value=-1, out=error)
        centred[:, part] = codes.all[:, :count]
        pending[:, part].addcmul_(centred[:, part], here.scale, value=-1)
    found = torch.empty_like(weight)
    place(found.mT, order, centred)
    return found.add_(zero.repeat_interleave(group_size, dim=2))
