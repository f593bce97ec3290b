"""Makes one block narrower: which channels and heads remain, the best weights for them, and the smaller tensors.

The treatment `llmpare prune` gives every block when it removes structure; see engine.Treatment. The calibration text
goes through the dense model's block once: at full width, with zeros where its writers have lost columns. What is
written is the small block, which does the same.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmpare.compress.clock import Clock
from llmpare.compress.errors import UnsupportedError
from llmpare.compress.linears import Linears
from llmpare.compress.model.models import Models
from llmpare.compress.prune.narrow import DAMPING, Narrowed, narrow
from llmpare.compress.prune.slices import sliced
from llmpare.compress.prune.structure import Units, kept_of, mask_of
from llmpare.compress.prune.surgery import ShrinkPlan
from llmpare.compress.prune.writers import Writers
from llmpare.compress.streams import Stream

_SAME = 0.02  # squared error over square up to which the small block is the full one with zeros


class ShrinkBlocks:
    """See the module. Looks at text, and at the original model's stream of it, where blocks become narrower."""

    def __init__(self, plan: ShrinkPlan, models: Models, clock: Clock) -> None:
        self._plan, self._models, self._clock = plan, models, clock
        self._linears = Linears(plan, models.dense, clock)
        kinds = ((plan.heads, plan.sizes.heads), (plan.ffn, plan.sizes.ffn))
        self._kinds = [(units, keep) for units, keep in kinds if units and keep < units[0].count]
        self.wants_dense = bool(self._kinds)

    def outside(self, source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See engine.Treatment."""
        return {}

    def restore(self, index: int, stored: Mapping[str, Tensor]) -> None:
        """See engine.Treatment: what is stored is plain weights, which are in place already."""

    def follow(self, index: int, facts: Mapping[str, Any], stored: Mapping[str, Tensor], calibration: Stream) -> None:
        """See engine.Treatment. The dense model's block becomes what it was when it was treated: full width, zeros."""
        if facts["removed"] or not self._kinds:
            return
        writers = {units[index].writer.name: units[index] for units, _ in self._kinds}
        for linear in facts["linears"]:
            units = writers[linear["name"]]
            weight = stored[self._plan.renamed(units.writer.weight, index)]
            bias = stored.get(self._plan.renamed(f"{units.writer.name}.bias", index))
            self._widen(units, kept_of(linear["kept"]), weight.t() if units.writer.transposed else weight, bias)
        calibration.advance(self._models.dense.replay, index)

    def treat(
        self, index: int, source: Mapping[str, Tensor], calibration: Stream | None, dense: Stream | None
    ) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """See engine.Treatment."""
        place = self._plan.place_of(index)
        if place is None:
            if dense is not None:
                with self._clock.phase("advance"):
                    dense.advance(self._models.dense.replay, index)
            return {}, {"removed": True, "linears": [], "fallbacks": []}
        narrowed: dict[str, Narrowed] = {}
        made = dict(source)
        if self._kinds:
            assert calibration is not None
            assert dense is not None
            entered = calibration.hidden[0][:1]
            narrowed = self._narrow(index, source, calibration, dense)
            made = self._gather(index, source, narrowed)
        tensors = {self._plan.renamed(name, index): tensor for name, tensor in made.items()}
        self._models.output.skeleton.place(tensors)
        if calibration is not None and narrowed:
            self._check(index, place, entered, calibration.hidden[0][:1])
        return tensors, self._facts(index, narrowed)

    def _narrow(
        self, index: int, source: Mapping[str, Tensor], calibration: Stream, dense: Stream
    ) -> dict[str, Narrowed]:
        """Every writer that has fewer columns, in place in the dense model's block; both streams are past it then."""
        wanted = {units[index].writer.name: (units[index], keep) for units, keep in self._kinds}
        names = [units[index].writer.name for units in (self._plan.heads, self._plan.ffn) if units]
        modules = {name: self._models.dense.skeleton.module(name) for name in names}
        writers = Writers(self._models.dense, index, modules, calibration)
        with self._clock.phase("advance"):
            writers.follow(dense)
        found = writers.moments(wanted, together=self._plan.needs.way.together)
        narrowed: dict[str, Narrowed] = {}
        while True:
            with self._clock.phase("calibrate"):
                name, moments = next(found, (None, None))
            if name is None or moments is None:
                return narrowed
            with self._clock.phase("solve"):
                units, keep = wanted[name]
                weight, bias = self._linears.weight(units.writer, source), source.get(f"{name}.bias")
                part = narrow(weight, bias, moments, units, keep)
                part = replace(
                    part,
                    weight=part.weight.to(source[units.writer.weight].dtype),  # as it is stored
                    bias=None if bias is None or part.bias is None else part.bias.to(bias.dtype),
                )
                narrowed[name] = part
                self._widen(units, part.units, part.weight, part.bias)

    def _widen(self, units: Units, kept: list[int], weight: Tensor, bias: Tensor | None) -> None:
        """Puts a writer's weight [rows, kept columns] and bias into the dense model's block, with zeros between."""
        writer = units.writer
        full = torch.zeros(writer.rows, writer.columns, dtype=weight.dtype, device=self._linears.device)
        full[:, units.kept_columns(kept)] = weight.to(full.device)
        self._linears.put(writer, full)
        if bias is not None:
            self._models.dense.skeleton.place({f"{writer.name}.bias": bias})

    def _gather(self, index: int, source: Mapping[str, Tensor], narrowed: Mapping[str, Narrowed]) -> dict[str, Tensor]:
        """The block's tensors by their names in the source, on the CPU, in the precision they are stored in."""
        units = [(kind[index], narrowed[kind[index].writer.name].units) for kind, _ in self._kinds]
        made = {name: sliced(name, tensor, units) for name, tensor in source.items()}
        for part, _ in units:
            writer, found = part.writer, narrowed[part.writer.name]
            made[writer.weight] = (found.weight.t() if writer.transposed else found.weight).cpu().contiguous()
            if found.bias is not None:
                made[f"{writer.name}.bias"] = found.bias.cpu()
        return made

    def _check(self, index: int, place: int, entered: Tensor, full: Tensor) -> None:
        """Raises UnsupportedError unless the small block makes of a window what the full one with zeros made of it."""
        with torch.no_grad():
            small = self._models.output.replay.run(place, entered).float()
        if not (full.float() - small).square().sum() <= _SAME * (full.float() - entered.float()).square().sum():
            raise UnsupportedError(
                f"architecture {self._plan.layout.architecture} cannot be made narrower: in block {index}, what feeds "
                "what is not what names and shapes suggest",
                "--layers and sparse masks work on it",
            )

    def _facts(self, index: int, narrowed: Mapping[str, Narrowed]) -> dict[str, Any]:
        linears, fallbacks = [], []
        for kind, _ in self._kinds:
            units = kind[index]
            part, writer = narrowed[units.writer.name], units.writer
            linears.append(
                {
                    "name": writer.name,
                    "rows": writer.rows,
                    "columns": writer.columns,
                    "kept_columns": len(part.units) * units.columns,
                    "units": units.count,
                    "kept_units": len(part.units),
                    "kept": mask_of(part.units),
                    "error_removed": part.before,
                    "relative_error": part.after,
                }
            )
            if part.damping != DAMPING:
                cause = f"Gram matrix not positive definite at damping {DAMPING:g}"
                fallbacks.append({"name": writer.name, "cause": cause, "action": f"damping raised to {part.damping:g}"})
        return {"removed": False, "linears": linears, "fallbacks": fallbacks}
