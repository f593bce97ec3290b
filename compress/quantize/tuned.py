"""Block-wise tuning: rounding, scales and norm gains are trained so that the whole block's output comes out right.

The idea of AutoRound (Cheng et al., 2023, arXiv:2309.05516), started from the codes of another solver instead of
plain rounding: weights begin within their present rounding interval, so few and small steps are enough. With codes
c, scales s and zero points z from the solver,

    u = c + clip(W/s + z − c, ±0.49)        where the weight lies in its interval
    q = clip(round(u + V)),  W̃ = (q − z)·s·a

and V (one per weight), a (one per scale) and the gains of the block's norms are trained on the mean squared error of
the block's output, by Adam with linearly falling steps. AutoRound moves V by the sign of its gradient; Adam, which
divides by the gradient's size over time, moves less where the sign keeps changing, and loses a quarter less in as
many steps (benchmarks/README.md). Rounding is passed straight through. The best point on windows that are held back
is kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmpare.compress.grid import IntGrid, Solved

Forward = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Tensor], Tensor]

_INSIDE = 0.49  # of a rounding interval: a start from which one small step can change a code
_SCALE_STEP = 2e-3  # Adam's first step for a and for the gains, both of which begin near 1
_BETAS = (0.9, 0.98)  # a memory of fifty steps: a tuning has not many more
_EPSILON = 1e-20  # for what is exactly 0: the size of gradients, which Adam divides by, is that of the activations
_HELD_BACK = 8  # one window in so many, at least one, judges the rest
_LOOKS = 10  # at the held-back windows, per tuning


@dataclass(frozen=True)
class Start:
    """A linear before tuning: its original weight [rows, columns] in float32, and what the solver made of it."""

    weight: Tensor
    solved: Solved
    grid: IntGrid


def tune(
    forward: Forward,
    pick: Callable[[Sequence[int]], tuple[Tensor, Tensor]],
    count: int,
    starts: Mapping[str, Start],
    gains: Mapping[str, Tensor],
    *,
    steps: float,
    step_size: float,
    windows: int,
    seed: int,
) -> tuple[dict[str, Solved], dict[str, Tensor]]:
    """Better codes and scales for all linears of a block at once, and better gains for its norms.

    forward(weights, gains, hidden): the block's output for hidden [windows, tokens, hidden] with these weights and
    gains, all in the working dtype. pick(indices): for those of the `count` windows, what enters the block in the
    compressed model and what leaves it in the original one, [windows, tokens, hidden] each. windows: how many are
    drawn per step. gains: as they are stored, and so they are returned. The result is never worse than the start on
    the windows held back; with a single window there is nothing to hold back, and the start is returned.
    """
    parts = {name: _Linear(start) for name, start in starts.items()}
    norms = {name: _Gain(gain) for name, gain in gains.items()}
    held = max(1, count // _HELD_BACK)
    training = count - held
    if training == 0:
        return {name: start.solved for name, start in starts.items()}, dict(gains)
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(
        [
            {"params": [part.shift for part in parts.values()]},
            {"params": [*(part.factor for part in parts.values()), *(norm.value for norm in norms.values())]},
        ],
        betas=_BETAS,
        eps=_EPSILON,
    )

    def run(chosen: Sequence[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The block's output for some windows, what it is off by, and what both depend on."""
        hidden, target = pick(chosen)
        leaves = {name: part.weight().to(hidden.dtype).requires_grad_() for name, part in parts.items()}
        gain = {name: norm.stored().to(hidden.dtype).requires_grad_() for name, norm in norms.items()}
        out = forward(leaves, gain, hidden)
        return out, out.detach().float() - target.float(), [*leaves.values(), *gain.values()]

    @torch.no_grad()
    def held_back() -> float:
        chunks = [range(start, min(start + windows, count)) for start in range(training, count, windows)]
        return sum(float(run(chunk)[1].square().mean()) * len(chunk) for chunk in chunks)

    total = int(steps)
    best, kept = held_back(), _snapshot(parts, norms)
    unit: Tensor | None = None
    for step in range(total):
        chosen = torch.randperm(training, generator=generator)[:windows].tolist()
        with torch.enable_grad():
            out, miss, leaves = run(chosen)
            unit = _unit(miss) if unit is None else unit
            gradients = torch.autograd.grad(out, leaves, (miss / unit).to(out.dtype))
        for part, gradient in zip(parts.values(), gradients, strict=False):
            part.take(gradient.float())
        for norm, gradient in zip(norms.values(), gradients[len(parts) :], strict=True):
            norm.value.grad = gradient.float()
        for group, first in zip(adam.param_groups, (step_size, _SCALE_STEP), strict=True):
            group["lr"] = first * (1 - step / total)
        adam.step()
        if (step + 1) % max(1, total // _LOOKS) == 0:
            now = held_back()
            if now < best:
                best, kept = now, _snapshot(parts, norms)
    return kept


def _unit(miss: Tensor) -> Tensor:
    """What to divide the error of the first step by, and so all: the gradient 2·miss/n itself is nothing in float16.

    Adam takes the same steps whatever it is.
    """
    tokens = miss[..., 0].numel()
    return (miss.square().mean() * tokens).sqrt_().clamp_(min=torch.finfo(miss.dtype).tiny)


class _Linear:
    """One linear in training. Gradients of V and a are formed by hand: both follow from that of the weight."""

    def __init__(self, start: Start) -> None:
        self._grid, solved = start.grid, start.solved
        rows, groups = solved.scale.shape
        self._shape = (rows, groups, -1)
        self._scale, self._zero = solved.scale.unsqueeze(-1), solved.zero.unsqueeze(-1)
        codes = solved.codes.view(self._shape).float()
        wanted = start.weight.view(self._shape) / self._scale + self._zero
        self._position = codes + (wanted - codes).clamp_(-_INSIDE, _INSIDE)
        self.shift = torch.zeros_like(self._position)
        self.factor = torch.ones_like(self._scale)

    def _codes(self) -> Tensor:
        return (self._position + self.shift).round_().clamp_(0, self._grid.top)

    def _stored_scale(self) -> Tensor:
        return self._grid.round_scale(self._scale * self.factor)

    def weight(self) -> Tensor:
        """W̃ [rows, columns], exactly as it would be stored now."""
        return self._codes().sub_(self._zero).mul_(self._stored_scale()).flatten(1)

    def take(self, gradient: Tensor) -> None:
        """Leaves the gradients of V and a to the optimiser, given that of W̃."""
        gradient = gradient.view(self._shape)
        self.factor.grad = (gradient * (self._codes() - self._zero)).sum(-1, keepdim=True) * self._scale
        place = self._position + self.shift
        outside = (place < -0.5) | (place > self._grid.top + 0.5)  # clipped: moving V changes nothing
        self.shift.grad = (gradient * self._scale).masked_fill_(outside, 0.0)

    def solved(self) -> Solved:
        """Codes and scales of the present point."""
        codes = self._codes().flatten(1).to(torch.uint8)
        return Solved(codes, self._stored_scale().squeeze(-1), self._zero.squeeze(-1))


class _Gain:
    """The gain of a norm in training: moved in float32, used in the precision it is stored in."""

    def __init__(self, gain: Tensor) -> None:
        self._dtype = gain.dtype
        self.value = gain.float().clone()

    def stored(self) -> Tensor:
        return self.value.to(self._dtype, copy=True)


def _snapshot(parts: Mapping[str, _Linear], norms: Mapping[str, _Gain]) -> tuple[dict[str, Solved], dict[str, Tensor]]:
    return {name: part.solved() for name, part in parts.items()}, {name: norm.stored() for name, norm in norms.items()}
