"""Quantization-aware training: the student is trained as it will be rounded, and rounding is passed straight through.

Every quantized linear keeps a latent weight W in full precision and runs with what its codes stand for: with scales s
and zero points z per row and group of columns,

    c = clip(round(W / s + z), 0, 2^b − 1)        Ŵ = (c − z) · s
    ∂Ŵ/∂W = 1 within the range of the codes, 0 beyond it (Bengio et al., 2013, arXiv:1308.3432)
    ∂Ŵ/∂s = c − z − W / s within it, c − z beyond it (LSQ: Esser et al., 2020, arXiv:1902.08153)

Scales are learned, as factors of those they begin with; zero points stay. The start is the result of another solver:
W is moved into the rounding interval of that solver's code, so that the first step sees exactly its model, and what
training gains is gained over it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmpare.compress.grid import IntGrid, Solved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmpare.compress.distill.targets import Batch, Outputs

INSIDE = 0.49  # of a rounding interval: where weights begin that another solver has rounded further than that


@dataclass(frozen=True)
class Start:
    """What a linear begins with: the codes and scales of a solver, and the grid they are on."""

    solved: Solved
    grid: IntGrid


def latent(weight: Tensor, start: Start) -> Tensor:
    """The weight [rows, columns], moved as little as it takes to be rounded to the codes of `start`; float32."""
    solved = start.solved
    grouped = weight.float().unflatten(1, (solved.scale.shape[1], -1))
    codes = solved.codes.view(grouped.shape).float()
    scale, zero = solved.scale.unsqueeze(-1), solved.zero.unsqueeze(-1)
    place = codes + (grouped / scale + zero - codes).clamp_(-INSIDE, INSIDE)
    moved: Tensor = ((place - zero) * scale).flatten(1)
    return moved


class _Rounded(torch.autograd.Function):
    """latent [rows, groups, size], factor [rows, groups, 1] → Ŵ [rows, columns]; see the top of this file."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, grid: IntGrid) -> Tensor:
        stored = grid.round_scale(scale * factor)
        ctx.grid = grid
        ctx.save_for_backward(weight, stored, scale, zero)
        return grid.dequantize(grid.quantize(weight, stored, zero), stored, zero).flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        weight, stored, scale, zero = ctx.saved_tensors
        gradient = gradients[0].view(weight.shape).float()
        place = (weight / stored).add_(zero)
        inside = (place > -0.5) & (place < ctx.grid.top + 0.5)
        codes = place.round().clamp_(0, ctx.grid.top)
        slope = codes.sub_(torch.where(inside, place, zero))
        into_factor = (gradient * slope).sum(-1, keepdim=True) * scale
        return gradient * inside, into_factor, None, None, None


class RoundedLinear(nn.Module):
    """A linear that runs with rounded weights. weight: latent, in the layout of the linear it stands for.

    factor [rows, groups]: of the scales, learned. transposed: the weight is kept as [columns, rows] (Conv1D).
    """

    def __init__(self, linear: nn.Module, start: Start, *, transposed: bool) -> None:
        super().__init__()
        dense, bias = linear._parameters["weight"], linear._parameters.get("bias")
        assert dense is not None
        self._grid, self._transposed = start.grid, transposed
        moved = latent(dense.detach().t() if transposed else dense.detach(), start)
        self.weight = nn.Parameter(moved.t().contiguous() if transposed else moved, dense.requires_grad)
        self.bias = bias
        self.factor = nn.Parameter(torch.ones_like(start.solved.scale), dense.requires_grad)
        # what prepare() makes anew is not for the checkpoints
        self.register_buffer("scale", start.solved.scale, persistent=False)
        self.register_buffer("zero", start.solved.zero, persistent=False)
        self.scale: Tensor
        self.zero: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        """[…, columns] → […, rows]."""
        weight: Tensor = _Rounded.apply(
            self._grouped(), self.factor.unsqueeze(-1), self.scale.unsqueeze(-1), self.zero.unsqueeze(-1), self._grid
        )
        return nn.functional.linear(inputs, weight.to(inputs.dtype), self.bias)

    @torch.no_grad()
    def solved(self) -> Solved:
        """The codes and scales of the present point, as they are to be stored."""
        scale = self._grid.round_scale(self.scale * self.factor.float())
        return self._grid.solved(self._grouped().flatten(1), scale, self.zero)

    def _grouped(self) -> Tensor:
        weight = self.weight.t() if self._transposed else self.weight
        return weight.float().reshape(len(self.factor), self.factor.shape[1], -1)


class Rounding:
    """An Extension (see targets): linears, by the names of their modules, run rounded during training.

    solved: codes and scales of all of them, by the same names, once training has finished.
    """

    wants_layers = False

    def __init__(self, starts: Mapping[str, Start]) -> None:
        self._starts = starts
        self._linears: dict[str, nn.Module] = {}
        self.solved: dict[str, Solved] = {}

    def prepare(self, student: "PreTrainedModel") -> None:
        """See Extension."""
        for name, start in self._starts.items():
            linear = self._linears[name] = student.get_submodule(name)
            student.set_submodule(name, RoundedLinear(linear, start, transposed=not isinstance(linear, nn.Linear)))

    def extra_loss(self, outputs: "Outputs", batch: "Batch") -> Tensor | None:
        """See Extension: none."""
        return None

    @torch.no_grad()
    def finish(self, student: "PreTrainedModel") -> None:
        """See Extension: every linear is as it was, with the weight its codes stand for."""
        for name in self._starts:
            rounded, linear = student.get_submodule(name), self._linears.pop(name)
            assert isinstance(rounded, RoundedLinear)
            self.solved[name] = solved = rounded.solved()
            dense = linear._parameters["weight"]
            assert dense is not None
            dense.copy_(solved.weight() if isinstance(linear, nn.Linear) else solved.weight().t())
            student.set_submodule(name, linear)
