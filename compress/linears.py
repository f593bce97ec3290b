"""The linears of a block on their way through a treatment: what flows into them, their weights out and in."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from llmpare.compress import collect
from llmpare.compress.clock import Clock
from llmpare.compress.grid import Statistics
from llmpare.compress.model.layout import Linear
from llmpare.compress.model.models import Model
from llmpare.compress.planning import Plan
from llmpare.compress.quantize.refine import energy, loss
from llmpare.compress.storage import StoredPlan
from llmpare.compress.streams import Stream

Groups = Iterator[list[tuple[list[Linear], Statistics | None]]]


class Linears:
    """Access to the linears of a model whose blocks are loaded one at a time."""

    def __init__(self, plan: Plan, model: Model, clock: Clock) -> None:
        self._plan, self._model, self._clock = plan, model, clock

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.skeleton.device

    def groups(
        self,
        index: int,
        linears: Sequence[Linear],
        calibration: Stream | None,
        dense: Stream | None = None,
        *,
        with_drift: bool = False,
    ) -> Groups:
        """Linears of block `index` by shared input, in order of use, with the statistics of that input.

        What comes as one list can be solved at the same time: linears of experts. Whoever iterates puts new weights in
        place before asking for more. Without calibration every linear comes by
        itself, with nothing known of its input. dense: the original model's stream, which is advanced past the block.
        """
        by_name = {linear.name: linear for linear in linears}
        found = self._found(index, by_name, calibration, dense, with_drift)
        while True:
            with self._clock.phase("calibrate"):
                learned = next(found, None)
            if learned is None:
                return
            yield [([by_name[name] for name in names], statistics) for names, statistics in learned]
            del learned

    def _found(
        self, index: int, linears: Mapping[str, Linear], calibration: Stream | None, dense: Stream | None, drift: bool
    ) -> Iterator[Sequence[tuple[list[str], Statistics | None]]]:
        if not linears:  # what comes later sees what this block makes of the text all the same
            for stream in (calibration if self._plan.sequential else None, dense):
                if stream is not None:
                    stream.advance(self._model.replay, index)
            return iter(())
        if calibration is None:
            return iter([[([name], None)] for name in linears])
        inputs = self._inputs(linears.values())
        if self._plan.sequential:
            way = self._plan.needs.way
            return collect.sequential(self._model.replay, index, inputs, calibration, together=way.together)
        return collect.parallel(self._model.replay, index, inputs, calibration, dense, with_drift=drift)

    def _inputs(self, linears: Iterable[Linear]) -> collect.Inputs:
        skeleton, wanted = self._model.skeleton, list(linears)
        modules = {linear.name: skeleton.module(linear.name) for linear in wanted if linear.expert is None}
        return collect.Inputs(modules, skeleton.mixtures(wanted), self._plan.request.route_all)

    def advance(self, index: int, calibration: Stream | None) -> None:
        """Takes the calibration stream past the treated block, unless `groups` has, or nobody looks at it again."""
        if calibration is not None and not self._plan.sequential and index + 1 < len(self._plan.layout.blocks):
            with self._clock.phase("advance"):
                calibration.advance(self._model.replay, index)

    def follow(self, index: int, linears: Iterable[Linear], calibration: Stream) -> None:
        """Takes the calibration stream past a block that is restored, to where treating its linears took it.

        If that was on the way through `groups`, experts ran in a loop that sums in an order of its own.
        """
        with self._inputs(linears).opened() if self._plan.sequential else nullcontext():
            calibration.advance(self._model.replay, index)

    def weight(self, linear: Linear, source: Mapping[str, Tensor]) -> Tensor:
        """The original weight [rows, columns] in float32; NaN and infinities, if allowed at all, count as 0."""
        stored = source[linear.tensor]
        if linear.expert is not None and linear.expert.fused is not None:
            stored = stored[linear.expert.index]
        weight = stored.to(self._model.skeleton.device).float()  # widened there: half the bytes to transfer
        weight = weight.t().contiguous() if linear.transposed else weight
        return weight.nan_to_num(0.0, 0.0, 0.0) if self._plan.request.allow_nonfinite else weight

    def put(self, linear: Linear, weight: Tensor) -> None:
        """Puts a weight [rows, columns] into the linear's module, in the working dtype."""
        self._model.skeleton.put(linear, weight)


def put_stored(plan: StoredPlan, linears: Linears, index: int, stored: Mapping[str, Tensor]) -> None:
    """Puts the weights that a block's tensors in the output stand for into the linears that are quantized."""
    for linear in plan.layout.of_block(index):
        if plan.schemes[linear] is not None and linear.tensor == linear.weight:  # else it is in place as it is
            own = {name: tensor.to(linears.device) for name, tensor in stored.items()
                   if name.startswith(linear.name + ".")}  # fmt: skip
            linears.put(linear, plan.decode(linear, own))


def join(linears: Sequence[Linear], tensors: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a block as they are on disk: weights of single experts become one tensor where they were one.

    source: the block's original tensors.
    """
    joined = dict(tensors)
    for linear in linears:
        expert = linear.expert
        if expert is not None and expert.fused is not None:
            if expert.fused not in joined:
                joined[expert.fused] = source[expert.fused].clone()
            joined[expert.fused][expert.index] = joined.pop(linear.weight)
    return joined


_AT_ONCE = 1 << 24  # weights whose error is measured together: it takes several copies of them


def relative_error(weight: Tensor, changed: Tensor, statistics: Statistics | None) -> float:
    """Squared output error over squared output; of the weights themselves when nothing is known of the inputs."""
    lost = whole = torch.zeros((), device=weight.device)
    step = max(1, _AT_ONCE // weight.shape[1])
    for before, after in zip(weight.split(step), changed.split(step), strict=True):
        if statistics is None:
            lost, whole = lost + (before - after).square().sum(), whole + before.square().sum()
        else:
            lost = lost + loss(before, after, statistics.gram).sum()
            whole = whole + energy(before, statistics.gram).sum()
    return float(lost / whole) if whole != 0 else 0.0  # NaN, for what cannot be measured, must not become 0
