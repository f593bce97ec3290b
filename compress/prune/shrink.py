"""Makes one block narrower: which channels and heads remain, the best weights for them, and the smaller tensors.

The treatment `llmpare prune` gives every block when it removes structure; see engine.Treatment. The block stays at its
full size while it is looked at, with zeros where its writers lose columns, and becomes small in the output's model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmpare.compress.clock import Clock
from llmpare.compress.errors import InputError, UnsupportedError
from llmpare.compress.linears import Linears
from llmpare.compress.model.models import Models
from llmpare.compress.prune import width
from llmpare.compress.prune.structure import Units
from llmpare.compress.prune.surgery import ShrinkPlan
from llmpare.compress.prune.writers import Moments, Writers
from llmpare.compress.streams import Stream

DAMPING = 1e-4  # of the mean diagonal: enough for float32, little enough that what is redundant costs nothing
_MAX_DAMPING = 1.0
CAUTION = 1.0  # times columns / tokens: the damping of what is fitted to more than the original weight's output
_SAME = 0.02  # squared error over square up to which the small block is the full one with zeros


@dataclass(frozen=True)
class Narrowed:
    """A writer after its treatment. units: those that remain. weight [rows, kept columns]; bias, if it has one.

    before, after: squared error over square of its target, with the columns merely removed and with the new weight.
    """

    units: list[int]
    columns: list[int]
    weight: Tensor
    bias: Tensor | None
    before: float
    after: float
    damping: float


class ShrinkBlocks:
    """See the module. Needs text, and the original model's stream of it."""

    wants_dense = True

    def __init__(self, plan: ShrinkPlan, models: Models, clock: Clock) -> None:
        self._plan, self._models, self._clock = plan, models, clock
        self._linears = Linears(plan, models.dense, clock)

    def outside(self, source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See engine.Treatment."""
        return {}

    def restore(self, index: int, stored: Mapping[str, Tensor]) -> None:
        """See engine.Treatment: what is stored is plain weights, which are in place already."""

    def treat(
        self, index: int, source: Mapping[str, Tensor], calibration: Stream | None, dense: Stream | None
    ) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """See engine.Treatment."""
        assert calibration is not None
        assert dense is not None
        kinds = self._kinds(index)
        narrowed: dict[str, Narrowed] = {}
        if self._plan.place_of(index) is None or all(keep == units.count for units, keep in kinds):
            with self._clock.phase("calibrate"):
                dense.advance(self._models.dense.replay, index)
        else:
            narrowed = self._narrow(index, kinds, source, calibration, dense)
        if self._plan.place_of(index) is None:
            return {}, {"removed": True, "linears": [], "fallbacks": []}
        tensors = self._gather(index, kinds, source, narrowed)
        self._models.output.skeleton.place(tensors)
        self._check(index, calibration)
        if index != self._plan.blocks[-1]:
            with self._clock.phase("advance"):
                calibration.advance(self._models.output.replay, self._place(index))
        return tensors, self._facts(kinds, narrowed)

    def _narrow(
        self, index: int, kinds: Sequence[tuple[Units, int]], source: Mapping[str, Tensor], calibration: Stream,
        dense: Stream,
    ) -> dict[str, Narrowed]:  # fmt: skip
        """Every writer with fewer columns, in place in the dense model's block as zeros."""
        by_name = {units.writer.name: (units, keep) for units, keep in kinds}
        modules = {name: self._models.dense.skeleton.module(name) for name in by_name}
        narrowed: dict[str, Narrowed] = {}
        writers = Writers(self._models.dense, index, modules, calibration)
        with self._clock.phase("advance"):
            writers.follow(dense)
        found = writers.moments(together=self._plan.needs.way.together)
        while True:
            with self._clock.phase("calibrate"):
                name, moments = next(found, (None, None))
            if name is None or moments is None:
                return narrowed
            with self._clock.phase("solve"):
                units, keep = by_name[name]
                weight, bias = self._linears.weight(units.writer, source), source.get(f"{name}.bias")
                if keep == units.count:
                    continue
                narrowed[name] = narrow(weight, bias, moments, units, keep)
                full = torch.zeros_like(weight)
                full[:, narrowed[name].columns] = narrowed[name].weight
                self._linears.put(units.writer, full.to(source[units.writer.weight].dtype))
                offset = narrowed[name].bias
                if bias is not None and offset is not None:
                    self._models.dense.skeleton.place({f"{name}.bias": offset.to(bias.dtype)})

    def _gather(
        self, index: int, kinds: Sequence[tuple[Units, int]], source: Mapping[str, Tensor],
        narrowed: Mapping[str, Narrowed],
    ) -> dict[str, Tensor]:  # fmt: skip
        """The block's tensors by output name, on the CPU, in the precision they are stored in."""
        made = dict(source)
        for units, _ in kinds:
            if units.writer.name not in narrowed:
                continue
            part, writer = narrowed[units.writer.name], units.writer
            weight = part.weight.t() if writer.transposed else part.weight
            made[writer.weight] = weight.to("cpu", source[writer.weight].dtype).contiguous()
            if part.bias is not None:
                made[f"{writer.name}.bias"] = part.bias.to("cpu", source[f"{writer.name}.bias"].dtype)
            for name in units.rows:
                rows = torch.tensor(units.kept_rows(name, part.units))
                axis = 1 if writer.transposed and source[name].ndim == 2 else 0
                made[name] = source[name].index_select(axis, rows)
        return {self._plan.renamed(name, index): tensor for name, tensor in made.items()}

    def _check(self, index: int, calibration: Stream) -> None:
        """Raises UnsupportedError unless the small block does what the full one with zeros does."""
        hidden = calibration.hidden[0][:1]
        with torch.no_grad():
            full = self._models.dense.replay.run(index, hidden).float()
            small = self._models.output.replay.run(self._place(index), hidden).float()
        if not (full - small).square().sum() <= _SAME * (full - hidden.float()).square().sum():
            raise UnsupportedError(
                f"architecture {self._plan.layout.architecture} cannot be made narrower: in block {index}, what feeds "
                "what is not what names and shapes suggest",
                "--layers and sparse masks work on it",
            )

    def _kinds(self, index: int) -> list[tuple[Units, int]]:
        """What becomes narrower in a block, and how many units of it remain."""
        sizes = self._plan.sizes
        kinds = ((self._plan.heads, sizes.heads), (self._plan.ffn, sizes.ffn))
        return [(units[index], keep) for units, keep in kinds if units]

    def _place(self, index: int) -> int:
        place = self._plan.place_of(index)
        assert place is not None
        return place

    def _facts(self, kinds: Sequence[tuple[Units, int]], narrowed: Mapping[str, Narrowed]) -> dict[str, Any]:
        linears, fallbacks = [], []
        for units, _ in kinds:
            if units.writer.name not in narrowed:
                continue
            part, writer = narrowed[units.writer.name], units.writer
            linears.append(
                {
                    "name": writer.name,
                    "rows": writer.rows,
                    "columns": writer.columns,
                    "kept_columns": len(part.columns),
                    "units": units.count,
                    "kept_units": len(part.units),
                    "error_removed": part.before,
                    "relative_error": part.after,
                }
            )
            if part.damping != DAMPING:
                cause = f"Gram matrix not positive definite at damping {DAMPING:g}"
                fallbacks.append({"name": writer.name, "cause": cause, "action": f"damping raised to {part.damping:g}"})
        return {"removed": False, "linears": linears, "fallbacks": fallbacks}


def narrow(weight: Tensor, bias: Tensor | None, moments: Moments, units: Units, keep: int) -> Narrowed:
    """A writer [rows, columns] with the columns of `keep` units."""
    kept: list[int] = []

    def pick(full: Tensor, damped: Tensor) -> Tensor:
        kept[:] = choose(full, damped, units, keep)
        return torch.tensor(units.kept_columns(kept), device=full.device)

    solved, offset, damping = solve(weight, bias, moments, pick)
    columns = torch.tensor(units.kept_columns(kept), device=weight.device)
    return Narrowed(
        units=kept,
        columns=columns.tolist(),
        weight=solved,
        bias=offset,
        before=missed(weight[:, columns], bias, columns, moments),
        after=missed(solved, offset, columns, moments),
        damping=damping,
    )


def choose(full: Tensor, damped: Tensor, units: Units, keep: int) -> list[int]:
    """The units that remain. full: the best weight with all columns; damped: its Gram matrix."""
    if units.columns == 1:
        return width.eliminate(full, damped, keep).tolist()
    return width.eliminate_groups(full, damped, units.columns, keep).tolist()


def solve(
    weight: Tensor, bias: Tensor | None, moments: Moments, pick: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor | None, float]:
    """The best weight [rows, kept] for the columns that pick(best weight with all, damped Gram matrix) names.

    Returns it with its bias, if there is one, which makes up for lost means; and the damping it took. What the
    original weight [rows, columns] gives is a function of these inputs, so it is fitted exactly; what the target asks
    beyond that is not, so it is fitted with the caution that so few tokens for so many columns deserve. Raises
    InputError for a Gram matrix that nothing helps.
    """
    gram, cross = centred(moments) if bias is not None else (moments.gram, moments.cross)
    beyond = cross - weight @ gram
    every = torch.arange(weight.shape[1], device=weight.device)
    damping = _sound(gram)
    damped = width.damped(gram, damping)
    cautious = width.damped(gram, max(damping, CAUTION * len(gram) / moments.tokens))
    columns = pick(weight + width.refit(beyond, cautious, every), damped)
    solved = width.refit(weight @ damped, damped, columns) + width.refit(beyond, cautious, columns)
    return solved, None if bias is None else moments.targets - solved @ moments.inputs[columns], damping


def centred(moments: Moments) -> tuple[Tensor, Tensor]:
    """gram and cross of what is left when a bias takes care of the means."""
    gram = moments.gram - torch.outer(moments.inputs, moments.inputs)
    return gram, moments.cross - torch.outer(moments.targets, moments.inputs)


def _sound(gram: Tensor) -> float:
    """The least damping that makes a Gram matrix positive definite, from DAMPING by factors of ten."""
    damping = DAMPING
    while int(torch.linalg.cholesky_ex(width.damped(gram, damping)).info) != 0:
        if damping >= _MAX_DAMPING:
            raise InputError(
                "a Gram matrix of activations is not positive definite whatever the damping",
                "try --dtype float32, or more --nsamples",
            )
        damping *= 10
    return damping


def missed(weight: Tensor, bias: Tensor | None, columns: Tensor, moments: Moments) -> float:
    """E‖t − W·x − b‖² / E‖t‖² for a weight [rows, kept] of some columns."""
    gram, cross = moments.gram[columns][:, columns], moments.cross[:, columns]
    parts = ((weight @ gram - 2 * cross) * weight).sum(dtype=torch.float64)
    if bias is not None:
        offset = bias.to(weight.device, weight.dtype)
        parts += (offset * (offset - 2 * moments.targets + 2 * (weight @ moments.inputs[columns]))).sum()
    return max(0.0, float(1 + parts / moments.square)) if moments.square > 0 else 0.0
