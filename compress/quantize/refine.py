"""Refinement in Gram space: codes and scales that lower tr((Q − W)·H·(Q − W)ᵀ) further, from the statistics alone.

GPTQ decides every code once, in one order. Written as L(Q) = Σ_rows (q − w)·H·(q − w)ᵀ, coordinate descent picks,
column by column, the best code with all others fixed; the scale refit solves for the best scales with all codes
fixed. L is the layer's squared output error, so a lower L is a better layer.
"""

import torch
from torch import Tensor

from llmpare.compress.grid import IntGrid
from llmpare.compress.lines import Backlog, Lines, block, picked, place, take

_STRIPS = 8  # that a quadratic form is computed in, each up to the diagonal only: 9/16 of the full square
_CURVATURES = 3  # copies of the weights that may go into A, of which three are held at a time
_SMALLEST = 512  # columns; narrower strips do not keep a processor busy


def loss(weight: Tensor, quantized: Tensor, gram: Tensor) -> Tensor:
    """L for every row: [..., rows]."""
    return energy(quantized - weight, gram)


def energy(weight: Tensor, gram: Tensor) -> Tensor:
    """w·H·wᵀ for every row of weight [..., rows, columns], H symmetric: the mean square of what it puts out."""
    columns = weight.shape[-1]
    strip = max(_SMALLEST, -(-columns // _STRIPS))
    total = weight.new_zeros(weight.shape[:-1])
    for start in range(0, columns, strip):
        here, part = weight[..., start : start + strip], slice(start, start + strip)
        through = torch.matmul(here, gram[..., part, part])
        if start:
            through += 2 * (weight[..., :start] @ gram[..., :start, part])
        total += through.mul_(here).sum(-1)
    return total


class Refinement:
    """Codes and scales that are being bettered, columns in front of rows: [matrices, columns, rows].

    What it holds beside them is the miss W − Q, which both steps start from and keep up to date. The slope of L,
    G = (W − Q)·H, is computed where it is needed: keeping it up to date would take one product more, and all of it
    would have to be written after every block of columns.
    """

    def __init__(
        self, weight: Tensor, gram: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, grid: IntGrid, group_size: int
    ) -> None:
        """weight, codes [matrices, rows, columns]; scale, zero [matrices, rows, groups].

        gram: H, [matrices, columns, columns], with a positive diagonal.
        """
        self._gram, self._grid, self._size = gram, grid, group_size
        self._zero, self._scale = zero, scale.mT.clone()
        self._offset = zero.mT.repeat_interleave(group_size, dim=1)
        self._centred = codes.mT.contiguous() - self._offset  # codes minus zero points
        self._miss = _weights(self._centred, self._scale).neg_().add_(weight.mT)

    @property
    def codes(self) -> Tensor:
        """[matrices, rows, columns]."""
        return (self._centred + self._offset).mT

    @property
    def scale(self) -> Tensor:
        """[matrices, rows, groups]."""
        return self._scale.mT

    def descend(self, order: Tensor, sweeps: int) -> None:
        """Better codes for these scales: `sweeps` passes over the columns in the order [matrices, columns].

        The best real value of column j is q_j + G_j / H_jj; rounding it to the grid is optimal because L is a parabola
        in q_j. A change Δ of column j changes G by −Δ·H_j.
        """
        grids = self._grid.columns(order, self.scale, self._zero, self._size)
        sharpness = 1 / self._gram.diagonal(dim1=1, dim2=2)
        centred = picked(self._centred, order)
        width = block(self._miss)
        changes = Backlog(self._miss, width)  # of weights
        moves, codes, scales, paces = (Lines(self._miss, width) for _ in range(4))
        for _ in range(sweeps):
            moved = torch.zeros((), device=self._miss.device)
            for start in range(0, order.shape[1], width):
                part = slice(start, min(start + width, order.shape[1]))
                own, here, count = order[:, part], grids(part), part.stop - start
                near = picked(self._gram, own)  # [matrices, count, columns]
                changes.begin(near @ self._miss, picked(near.mT, own))
                filled = (
                    codes.fill(centred[:, part]),
                    scales.fill(here.scale),
                    paces.fill(sharpness.gather(1, own).unsqueeze(2) / here.scale),
                )
                lines = zip(moves.each, changes.lines.each, *filled, here.bounds(), strict=False)
                for i, (move, change, code, size, pace, (low, high)) in zip(range(count), lines, strict=False):
                    best = torch.addcmul(code, changes.settle(i), pace, out=move)
                    torch.mul(best.round_().clamp_(low, high).sub_(code), size, out=change)
                step = moves.all[:, :count]
                moved = torch.maximum(moved, step.abs().amax())
                centred[:, part] += step
                take(self._miss, own, changes.lines.all[:, :count])
            if not moved:
                break
        place(self._centred, order, centred)

    def refit(self) -> None:
        """The scales that minimise L for these codes: one small least-squares problem per row.

        With c_g the codes minus zero of group g (zero elsewhere), L changes by δᵀAδ − 2·δᵀb when the scales change by
        δ, with A_gk = c_gᵀ·H·c_k and b_g = c_gᵀ·G. Rows where rounding the best scales to the stored precision would
        not pay keep theirs.
        """
        _, groups, rows = self._scale.shape
        step = max(1, rows * _CURVATURES * self._miss.shape[1] // groups**2)
        for start in range(0, rows, step):
            self._refit(slice(start, start + step))

    def _refit(self, part: slice) -> None:
        """The same for some rows."""
        miss, centred, scale = self._miss[..., part], self._centred[..., part], self._scale[..., part].mT
        wanted = self._by_group((self._gram @ miss).mul_(centred)).mT  # b: [matrices, rows, groups]
        matrix = self._curvature(centred)
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        empty = diagonal <= 0  # a group of zeros only: any scale does, and with 1 on the diagonal it keeps its own
        regular = matrix.clone()
        regular.diagonal(dim1=-2, dim2=-1).add_(diagonal.amax(-1, keepdim=True), alpha=1e-6).add_(empty)
        lower, failed = torch.linalg.cholesky_ex(regular)
        best = scale + torch.cholesky_solve(wanted.unsqueeze(-1), lower).squeeze(-1)
        best = torch.where((failed != 0).unsqueeze(-1) | ~torch.isfinite(best) | (best == 0), scale, best)
        fitted = self._grid.round_scale(best)
        change = fitted - scale
        gain = change * (2 * wanted - (matrix @ change.unsqueeze(-1)).squeeze(-1))
        worse = gain.sum(-1, keepdim=True) < 0
        miss -= _weights(centred, change.masked_fill_(worse, 0.0).mT)
        self._scale[..., part] = torch.where(worse, scale, fitted).mT

    def _curvature(self, centred: Tensor) -> Tensor:
        """A, [matrices, rows, groups, groups], for codes minus zero points [matrices, columns, rows]."""
        matrices, columns, rows = centred.shape
        groups = columns // self._size
        found, room = centred.new_empty(matrices, rows, groups, groups), centred.new_empty(centred.shape)
        for g in range(groups):
            part, rest = slice(g * self._size, (g + 1) * self._size), slice(g * self._size, None)
            through = torch.bmm(self._gram[:, rest, part], centred[:, part], out=room[:, rest])
            found[..., g, g:] = found[..., g:, g] = self._by_group(through.mul_(centred[:, rest])).mT
        return found

    def _by_group(self, columns: Tensor) -> Tensor:
        """Sums over the columns of every group: [matrices, groups, rows]."""
        sums: Tensor = columns.unflatten(1, (-1, self._size)).sum(2)
        return sums


def _weights(centred: Tensor, scale: Tensor) -> Tensor:
    """The weights [matrices, columns, rows] that codes minus zero points are under scales [matrices, groups, rows]."""
    weights: Tensor = (centred.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(2)).flatten(1, 2)
    return weights
