"""Quantizes one block: statistics of its inputs → a method's codes → the tensors of a format."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from llmpare.compress import quantize
from llmpare.compress.checkpoint.tensors import DTYPES
from llmpare.compress.clock import Clock
from llmpare.compress.grid import IntGrid, Solved, Statistics
from llmpare.compress.linears import Linears, join, put_stored, relative_error
from llmpare.compress.model.layout import Linear
from llmpare.compress.model.models import Models
from llmpare.compress.quantize.plan import QuantizePlan
from llmpare.compress.quantize.tuned import Start
from llmpare.compress.request import PER_CHANNEL, Scheme
from llmpare.compress.routing import Tally
from llmpare.compress.streams import Stream

_Stack = tuple[list[Linear], Statistics | None]

TUNING_WINDOWS = 8  # per step: more do not pay for their time


class QuantizeBlocks:
    """The treatment `llmpare quantize` gives every block; see engine.Treatment."""

    def __init__(self, plan: QuantizePlan, models: Models, clock: Clock) -> None:
        self._plan, self._model, self._clock = plan, models.output, clock
        self._linears = Linears(plan, models.output, clock)
        self._method = quantize.find(plan.request.method)
        options = dict(plan.request.options)
        self._solver = _load(self._method.solver)
        self._solver_options = {name: options[name] for name in self._method.options}
        self._tuner = _load(self._method.tuner) if self._method.tuner else None
        self._tuner_options = {name: options[name] for name in self._method.tuner_options}
        self._wants_drift = bool(self._solver_options.get("correction"))
        self.wants_dense = self._wants_drift or self._tuner is not None

    def outside(self, source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Nothing changes there."""
        return {}

    def treat(
        self, index: int, source: dict[str, Tensor], calibration: Stream | None, dense: Stream | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Quantizes block `index`, which is loaded with its original weights, and leaves it compressed.

        source: its tensors as they are on disk; those that are replaced are taken out. calibration: the stream of the
        model compressed so far, or None for a method that looks at no text. dense: the original model's stream, when
        `wants_dense`. Both are advanced past the block, as far as there is one after it. Returns the tensors that
        replace the linears' weights, and facts for the report.
        """
        linears = {linear.name: linear for linear in self._wanted(index)}
        solved: dict[str, Solved] = {}
        errors: dict[str, float | None] = {}
        notes: dict[str, list[dict[str, str]]] = {}
        tensors: dict[str, Tensor] = {}
        wanted = list(linears.values())
        tally = Tally()
        for groups in self._linears.groups(index, wanted, calibration, dense, with_drift=self._wants_drift):
            together = [linear for group, _ in groups for linear in group]
            with self._clock.phase("solve"):
                for stacks in self._alike(groups):
                    self._solve(stacks, source, solved, errors)
                for linear in together:
                    self._linears.put(linear, self._plan.format.weight(linear, solved[linear.name]))
                    notes[linear.name] = solved[linear.name].notes
                for group, statistics in groups:
                    tally.note(group, statistics)
            if self._tuner is None:  # nobody looks at these weights again: their memory is needed for the next ones
                with self._clock.phase("pack"):
                    for linear in together:
                        tensors.update(self._encode(linear, solved.pop(linear.name)))
                        source.pop(linear.weight, None)  # not there if experts share a tensor
            del groups, group, statistics
        gains: dict[str, Tensor] = {}
        if self._tuner is not None and linears and calibration is not None and dense is not None:
            with self._clock.phase("tune"):
                gains = self._tune(index, linears, source, solved, calibration, dense)
            for name, linear in linears.items():
                self._linears.put(linear, self._plan.format.weight(linear, solved[name]))
                tensors.update(self._encode(linear, solved[name]))
                errors[name] = None  # what is known of its input was needed for other memory
            self._model.skeleton.place(gains)
        self._linears.advance(index, calibration)
        with self._clock.phase("pack"):
            tensors = join(wanted, tensors, source)
        return {**tensors, **gains}, tally.added(self._facts(linears, notes, errors))

    def restore(self, index: int, stored: Mapping[str, Tensor]) -> None:
        """Puts the weights that `stored`, the block's tensors in the output, stand for into the loaded block."""
        put_stored(self._plan, self._linears, index, stored)

    def follow(self, index: int, facts: Mapping[str, Any], stored: Mapping[str, Tensor], calibration: Stream) -> None:
        """See engine.Treatment."""
        self._linears.follow(index, self._wanted(index), calibration)

    def _wanted(self, index: int) -> list[Linear]:
        return [linear for linear in self._plan.layout.of_block(index) if self._plan.schemes[linear] is not None]

    def _alike(self, groups: Sequence[tuple[Sequence[Linear], Statistics | None]]) -> list[list[_Stack]]:
        """Stacks of linears that share input, scheme and grid, each solved as one; those of one shape together."""
        alike: dict[tuple[Scheme, IntGrid, int, int], list[_Stack]] = defaultdict(list)
        for linears, statistics in groups:
            stacks: dict[tuple[Scheme, IntGrid], list[Linear]] = defaultdict(list)
            for linear in linears:
                stacks[self._plan.quantized[linear], self._grid(linear)].append(linear)
            for (scheme, grid), stack in stacks.items():
                alike[scheme, grid, sum(linear.rows for linear in stack), stack[0].columns].append((stack, statistics))
        return list(alike.values())

    def _solve(
        self,
        stacks: Sequence[_Stack],
        source: Mapping[str, Tensor],
        solved: dict[str, Solved],
        errors: dict[str, float | None],
    ) -> None:
        first = stacks[0][0][0]
        scheme, grid = self._plan.quantized[first], self._grid(first)
        size = first.columns if scheme.group_size == PER_CHANNEL else scheme.group_size
        weights = [self._stacked(stack, source) for stack, _ in stacks]
        known = [statistics for _, statistics in stacks]
        results = self._solver(weights, known, grid, size, **self._solver_options)
        for (stack, statistics), weight, result in zip(stacks, weights, results, strict=True):
            rows = [linear.rows for linear in stack]
            for linear, original, part in zip(stack, weight.split(rows), result.split(rows), strict=True):
                solved[linear.name] = part
                errors[linear.name] = relative_error(original, part.weight(), statistics)

    def _stacked(self, linears: Sequence[Linear], source: Mapping[str, Tensor]) -> Tensor:
        """The weights of linears as one matrix [rows of all, columns], and no second copy of it."""
        if len(linears) == 1:
            return self._linears.weight(linears[0], source)
        rows = [linear.rows for linear in linears]
        whole = torch.empty(sum(rows), linears[0].columns, device=self._linears.device)
        for linear, part in zip(linears, whole.split(rows), strict=True):
            part.copy_(self._linears.weight(linear, source))
        return whole

    def _tune(
        self,
        index: int,
        linears: Mapping[str, Linear],
        source: Mapping[str, Tensor],
        solved: dict[str, Solved],
        calibration: Stream,
        dense: Stream,
    ) -> dict[str, Tensor]:
        """Trains the block as a whole; `solved` gets the better codes. Returns the norms' gains by tensor name."""
        inside = self._model.skeleton.inside(index)
        norms = {name: source[name].to(self._model.skeleton.device) for name in self._model.skeleton.norms(index)}

        def forward(weights: Mapping[str, Tensor], gains: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
            placed = {inside[name]: gain for name, gain in gains.items()}
            for name, weight in weights.items():
                placed[inside[linears[name].weight]] = weight.t() if linears[name].transposed else weight
            return self._model.replay.run(index, hidden, placed)

        def pick(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
            return calibration.pick(indices), dense.pick(indices)

        starts = {
            name: Start(self._linears.weight(linear, source), solved[name], self._grid(linear))
            for name, linear in linears.items()
        }
        windows = min(TUNING_WINDOWS, len(calibration.hidden[0]))
        assert self._tuner is not None
        tuned: dict[str, Solved]
        gains: dict[str, Tensor]
        tuned, gains = self._tuner(
            forward, pick, calibration.windows, starts, norms,
            windows=windows, seed=self._plan.request.seed + index, **self._tuner_options,
        )  # fmt: skip
        for name, part in tuned.items():
            part.notes = solved[name].notes
            solved[name] = part
        return gains

    def _grid(self, linear: Linear) -> IntGrid:
        scheme = self._plan.quantized[linear]
        return IntGrid(scheme.bits, scheme.symmetric, DTYPES[self._plan.format.scale_dtype(linear)])

    def _encode(self, linear: Linear, solved: Solved) -> Mapping[str, Tensor]:
        return self._plan.format.encode(linear, self._plan.quantized[linear], solved)

    def _facts(
        self,
        linears: Mapping[str, Linear],
        notes: Mapping[str, list[dict[str, str]]],
        errors: Mapping[str, float | None],
    ) -> dict[str, Any]:
        quantized = self._plan.quantized
        return {
            "linears": [
                {
                    "name": name,
                    "rows": linear.rows,
                    "columns": linear.columns,
                    "scheme": quantized[linear].name,
                    "method": self._plan.request.method,
                    "relative_error": errors[name],
                }
                for name, linear in linears.items()
            ],
            "fallbacks": [{"name": name, **note} for name in linears for note in notes[name]],
        }


def _load(name: str) -> Any:
    """The function a registry line names, 'module:function' of llmpare.compress.quantize."""
    module, _, function = name.partition(":")
    return vars(import_module(f"llmpare.compress.quantize.{module}"))[function]
