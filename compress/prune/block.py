"""Prunes one block: statistics of its inputs → a method's mask and weights → the tensors of the output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from llmpare.compress import prune, quantize
from llmpare.compress.checkpoint.tensors import DTYPES
from llmpare.compress.clock import Clock
from llmpare.compress.grid import IntGrid, Statistics
from llmpare.compress.linears import Linears, join, put_stored, relative_error
from llmpare.compress.model.layout import Linear
from llmpare.compress.model.models import Models
from llmpare.compress.prune.joint import MaskedGrid
from llmpare.compress.prune.masks import Quota
from llmpare.compress.prune.plan import MaskPlan
from llmpare.compress.prune.pruned import Pruned
from llmpare.compress.prune.refit import refit
from llmpare.compress.quantize import gptq, linalg
from llmpare.compress.request import PER_CHANNEL
from llmpare.compress.routing import Tally
from llmpare.compress.streams import Stream

DAMPING = 0.01  # of the refit, for methods that have none of their own


@dataclass
class _Made:
    """What became of one linear: its tensors as they are stored, the weight they stand for, and what to report."""

    tensors: dict[str, Tensor]
    weight: Tensor
    facts: dict[str, Any]
    notes: list[dict[str, str]]


class MaskBlocks:
    """The treatment `llmpare prune` gives every block when weights become zero; see engine.Treatment."""

    wants_dense = False

    def __init__(self, plan: MaskPlan, models: Models, clock: Clock) -> None:
        self._plan, self._clock = plan, clock
        self._linears = Linears(plan, models.output, clock)
        method, options = prune.find(plan.request.method), dict(plan.request.options)
        module, _, function = method.solver.partition(":")
        self._solver = vars(import_module(f"llmpare.compress.prune.{module}"))[function]
        self._options = {name: options[name] for name in method.options}
        self._refits = bool(options[prune.REFIT])
        self._damping = options.get("damping", DAMPING)

    def outside(self, source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Nothing changes there."""
        return {}

    def treat(
        self, index: int, source: Mapping[str, Tensor], calibration: Stream | None, dense: Stream | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Leaves block `index`, which is loaded with its original weights, pruned: see engine.Treatment."""
        wanted = self._wanted(index)
        made: dict[Linear, _Made] = {}
        tally = Tally()
        for groups in self._linears.groups(index, wanted, calibration):
            with self._clock.phase("solve"):
                for group, statistics in groups:
                    made.update(self._solve(group, source, statistics))
                    for linear in group:
                        self._linears.put(linear, made[linear].weight)
                    tally.note(group, statistics)
        self._linears.advance(index, calibration)
        tensors = {name: tensor for each in made.values() for name, tensor in each.tensors.items()}
        facts = {
            "linears": [made[linear].facts for linear in wanted],
            "fallbacks": [{"name": linear.name, **note} for linear in wanted for note in made[linear].notes],
        }
        return join(wanted, tensors, source), tally.added(facts)

    def restore(self, index: int, stored: Mapping[str, Tensor]) -> None:
        """Puts the weights that packed codes stand for into the loaded block."""
        put_stored(self._plan, self._linears, index, stored)

    def follow(self, index: int, facts: Mapping[str, Any], stored: Mapping[str, Tensor], calibration: Stream) -> None:
        """See engine.Treatment."""
        self._linears.follow(index, self._wanted(index), calibration)

    def _wanted(self, index: int) -> list[Linear]:
        return [linear for linear in self._plan.compressed if linear.block == index]

    def _solve(
        self, stack: Sequence[Linear], source: Mapping[str, Tensor], statistics: Statistics | None
    ) -> dict[Linear, _Made]:
        """Linears that read the same input, solved as one matrix."""
        weight = torch.cat([self._linears.weight(linear, source) for linear in stack])
        rows, pattern = [linear.rows for linear in stack], self._plan.request.pattern
        quota = Quota(
            rows,
            [self._plan.sparsity[linear] for linear in stack],
            (pattern.kept, pattern.of) if pattern and self._plan.request.sparsity else None,
        )
        pruned: Pruned = self._solver(weight, statistics, quota, **self._options)
        if self._refits and statistics is not None and pruned.sound:
            damped = linalg.damp(statistics.gram, self._damping if pruned.damping is None else pruned.damping)
            pruned.weight = refit(weight, damped, pruned.keep, pruned.weight)
        masked = torch.where(pruned.keep, weight, 0.0)
        tensors = self._store(stack, pruned, statistics)
        found = {}
        for linear, original, zeroed in zip(stack, weight.split(rows), masked.split(rows), strict=True):
            stored = self._plan.decode(linear, tensors[linear])
            scheme = self._plan.schemes[linear]
            facts = {
                "name": linear.name,
                "rows": linear.rows,
                "columns": linear.columns,
                "scheme": scheme.name if scheme else "dense",
                "method": self._plan.request.method,
                "zeros": int((stored == 0).sum()),
                "error_removed": relative_error(original, zeroed, statistics),
                "relative_error": relative_error(original, stored, statistics),
            }
            found[linear] = _Made(tensors[linear], stored, facts, pruned.notes)
        return found

    def _store(
        self, stack: Sequence[Linear], pruned: Pruned, statistics: Statistics | None
    ) -> dict[Linear, dict[str, Tensor]]:
        """The tensors of every linear of a stack; quantized, if that was asked for, with the zeros left as they are."""
        sizes = [linear.rows for linear in stack]
        scheme = self._plan.schemes[stack[0]]
        if scheme is None:
            parts = pruned.weight.split(sizes)
            return {linear: self._dense(linear, part) for linear, part in zip(stack, parts, strict=True)}
        if statistics is None:
            raise ValueError("quantizing what stays needs statistics")
        dtype = DTYPES[self._plan.format.scale_dtype(stack[0])]
        grid = MaskedGrid.of(IntGrid(scheme.bits, scheme.symmetric, dtype), pruned.keep)
        size = stack[0].columns if scheme.group_size == PER_CHANNEL else scheme.group_size
        solved = gptq.solve(pruned.weight, statistics, grid, size, **quantize.METHODS["gptq"].defaults)
        pruned.notes += solved.notes
        parts = zip(stack, solved.split(sizes), strict=True)
        return {linear: dict(self._plan.format.encode(linear, scheme, part)) for linear, part in parts}

    def _dense(self, linear: Linear, weight: Tensor) -> dict[str, Tensor]:
        weight = weight.to(DTYPES[linear.dtype])
        return {linear.weight: weight.t().contiguous() if linear.transposed else weight.contiguous()}
