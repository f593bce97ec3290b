"""Number grids: which values a stored weight can take.

A grid turns weights into integer codes and back, and finds scales (and zero points) for a group of weights. Solvers
get a grid handed in and know nothing else about it, so one solver serves every grid.

Shapes: weights are [rows, columns]; every row has one scale and one zero point per group of consecutive columns,
so scale and zero are [rows, groups]. Codes are integers 0 … 2^bits − 1 held in a float tensor while solvers work on
them. A weight is (code − zero) · scale.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from llmpare.compress.lines import picked

_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 26}  # weights per slice of the search: few launches, small temporaries


@dataclass(frozen=True)
class Statistics:
    """What is known about the inputs of a linear, per token: all a solver may look at.

    gram: H = X̃ᵀX̃ / tokens, [columns, columns], of the inputs as the compressed model produces them.
    drift: D = (X − X̃)ᵀX̃ / tokens, the same shape, X being the original model's inputs; None if it was not asked for.
    tokens: of an expert, those that were routed to it; None for what all tokens flow through.
    borrowed: tokens' worth of other experts' inputs in an expert's gram.
    """

    gram: Tensor
    drift: Tensor | None = None
    tokens: int | None = None
    borrowed: int = 0


@dataclass(frozen=True)
class Columns:
    """The grid of some columns, for loops that round one column of all rows at a time.

    scale [matrices, columns, rows], and the bounds low and high of code minus zero point: the same, or numbers where
    all are alike.
    """

    scale: Tensor
    low: Tensor | float
    high: Tensor | float

    def bounds(self) -> Iterator[tuple[Any, Any]]:
        """low and high of one column after the other, [matrices, rows] or numbers; the latter without end."""
        if isinstance(self.low, Tensor) and isinstance(self.high, Tensor):
            return zip(self.low.unbind(1), self.high.unbind(1), strict=True)
        return repeat((self.low, self.high))


@dataclass
class Solved:
    """A quantized weight. codes [rows, columns] uint8; scale and zero [rows, groups] float32.

    notes: what did not go as planned, as {"cause", "action"}, for the report.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    notes: list[dict[str, str]] = field(default_factory=list)

    def weight(self) -> Tensor:
        """The dequantized weight [rows, columns], float32."""
        rows, columns = self.codes.shape
        grouped = self.codes.view(rows, self.scale.shape[1], -1).float()
        return grouped.sub_(self.zero.unsqueeze(-1)).mul_(self.scale.unsqueeze(-1)).view(rows, columns)

    def split(self, rows: Sequence[int]) -> "list[Solved]":
        """The parts that belong to linears of so many rows each, which were solved as one stack."""
        parts = zip(self.codes.split(rows), self.scale.split(rows), self.zero.split(rows), strict=True)
        return [Solved(*part, self.notes) for part in parts]


@dataclass(frozen=True)
class IntGrid:
    """Integers of `bits`, evenly spaced.

    symmetric: the zero point is fixed at 2^(bits−1). That leaves one more level on the negative side, so the sign of
    a scale is chosen per group to put the extra level where the largest weight is; every loader multiplies by the
    scale as it is. Otherwise the zero point is an integer within the range.
    scale_dtype: the precision in which scales are stored. Scales are rounded to it before any code is chosen, so the
    loader sees exactly what the solver saw.
    """

    bits: int
    symmetric: bool
    scale_dtype: torch.dtype = torch.float32

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of the symmetric grid."""
        return 1 << (self.bits - 1)

    def quantize(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest codes. All three broadcast against each other."""
        return torch.div(weight, scale).round_().add_(zero).clamp_(0, self.top)

    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Weights of the codes."""
        return (codes - zero).mul_(scale)

    def of_rows(self, part: slice) -> "IntGrid":
        """The grid of some rows of the weights it is for."""
        return self

    def columns(self, order: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Callable[[slice], Columns]:
        """What a loop over the columns in `order` [matrices, columns] needs, some columns of that order at a time.

        scale, zero [matrices, rows, groups].
        """
        groups, scale, zero = order // group_size, scale.mT.contiguous(), zero.mT.contiguous()

        def some(part: slice) -> Columns:
            own = groups[:, part]
            here = picked(scale, own)
            if self.symmetric:
                return Columns(here, -self.middle, self.top - self.middle)
            offset = picked(zero, own)
            return Columns(here, -offset, self.top - offset)

        return some

    def solved(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Solved:
        """Nearest codes of a whole weight [rows, columns] under scales and zero points [rows, groups]."""
        rows, columns = weight.shape
        grouped = weight.reshape(rows, scale.shape[1], -1)
        codes = self.quantize(grouped, scale.unsqueeze(-1), zero.unsqueeze(-1)).to(torch.uint8)
        return Solved(codes.view(rows, columns), scale, zero)

    def round_scale(self, scale: Tensor) -> Tensor:
        """The scales as they will be stored: in scale_dtype, never zero, never subnormal and never infinite."""
        limits = torch.finfo(self.scale_dtype)
        stored = torch.where(scale.abs() < limits.tiny, torch.full_like(scale, limits.tiny), scale)
        return stored.clamp_(limits.min, limits.max).to(self.scale_dtype).to(scale.dtype)

    def search(self, weight: Tensor, importance: Tensor | None, group_size: int) -> tuple[Tensor, Tensor]:
        """Scales and zero points of every group, minimising Σ importance_j · (w_j − q_j)².

        weight [..., rows, columns]; importance [..., columns], at least 0, None for all ones; columns divisible by
        group_size. Tries shrunken versions of the range that just covers the group: clipping the few largest weights
        buys resolution for all others. Returns scale and zero, both [..., rows, columns / group_size].
        """
        grouped = weight.unflatten(-1, (-1, group_size))
        root = None if importance is None else importance.unflatten(-1, (-1, group_size)).sqrt().unsqueeze(-3)
        step = max(1, _AT_ONCE.get(weight.device.type, _AT_ONCE["cpu"]) * weight.shape[-2] // weight.numel())
        find = self._search_symmetric if self.symmetric else self._search_asymmetric
        found = [find(part, root) for part in grouped.split(step, dim=-3)]
        scale, zero = (torch.cat(parts, dim=-2) for parts in zip(*found, strict=True))
        return scale, zero

    def _search_symmetric(self, weight: Tensor, root: Tensor | None) -> tuple[Tensor, Tensor]:
        low, high = weight.aminmax(dim=-1)
        # the side with the extra level gets the larger weight; `full` just covers both sides
        sign = torch.where(high > -low, -1.0, 1.0)
        small, large = torch.minimum(high.abs(), low.abs()), torch.maximum(high.abs(), low.abs())
        full = sign * torch.maximum(large / self.middle, small / max(self.middle - 1, 1))
        zero = torch.full_like(full, self.middle)
        best = torch.full_like(full, torch.inf)
        shrink = torch.ones_like(full)

        def attempt(candidate: Tensor) -> None:
            nonlocal best, shrink
            error = self._error(weight, root, self.round_scale(full * candidate), zero)
            better = error < best
            best, shrink = torch.where(better, error, best), torch.where(better, candidate, shrink)

        for step in range(8):  # coarsely over the whole range, on both sides …
            attempt(torch.full_like(full, 1 - 0.08 * step))
            attempt(torch.full_like(full, 0.08 * step - 1))
        for nudge in (0.04, 0.02):  # … then finely around the best
            around = shrink
            attempt(around + nudge)
            attempt(around - nudge)
        return self.round_scale(full * shrink), zero

    def _search_asymmetric(self, weight: Tensor, root: Tensor | None) -> tuple[Tensor, Tensor]:
        low, high = weight.aminmax(dim=-1)
        low, high = low.clamp(max=0), high.clamp(min=0)
        best = torch.full_like(low, torch.inf)
        chosen = self.round_scale((high - low) / self.top)  # stays when no error is a number
        zero = (-low / chosen).round_().clamp_(0, self.top)
        for below in torch.linspace(1.0, 0.5, 6).tolist():
            for above in torch.linspace(1.0, 0.5, 6).tolist():
                scale = self.round_scale((high * above - low * below) / self.top)
                offset = (-low * below / scale).round_().clamp_(0, self.top)
                error = self._error(weight, root, scale, offset)
                better = error < best
                best = torch.where(better, error, best)
                chosen = torch.where(better, scale, chosen)
                zero = torch.where(better, offset, zero)
        return chosen, zero

    def _error(self, weight: Tensor, root: Tensor | None, scale: Tensor, zero: Tensor) -> Tensor:
        scale = scale.unsqueeze(-1)
        # not a division: at a tie it may take the other neighbour, whose error is the same
        code = torch.mul(weight, 1 / scale).round_()
        if self.symmetric:  # bounds that are numbers are quicker than tensors
            code.clamp_(-self.middle, self.top - self.middle)
        else:
            zero = zero.unsqueeze(-1)
            code.add_(zero).clamp_(0, self.top).sub_(zero)
        miss = torch.addcmul(weight, code, scale, value=-1, out=code)
        if root is not None:
            miss.mul_(root)
        size: Tensor = torch.linalg.vector_norm(miss, dim=-1)
        return size
