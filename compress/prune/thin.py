"""Makes one block narrower in the residual stream, and if asked in its channels and heads too.

The treatment `llmpare prune --hidden` gives every block; see engine.Treatment. Other than in `shrink`, no linear keeps
both its inputs and its outputs, so all of them are refitted in the smaller block itself.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from llmpare.compress.clock import Clock
from llmpare.compress.errors import UnsupportedError
from llmpare.compress.linears import Linears
from llmpare.compress.model.layout import Linear
from llmpare.compress.model.models import Models
from llmpare.compress.prune.hidden import Refit
from llmpare.compress.prune.narrow import centred, choose, missed, solve
from llmpare.compress.prune.slices import sliced
from llmpare.compress.prune.structure import Units
from llmpare.compress.prune.surgery import ShrinkPlan
from llmpare.compress.prune.writers import Moments
from llmpare.compress.streams import Stream


class ThinBlocks:
    """See the module. Needs text, and the original model's stream of it."""

    wants_dense = True

    def __init__(self, plan: ShrinkPlan, models: Models, clock: Clock) -> None:
        assert plan.remaining is not None
        self._plan, self._models, self._clock = plan, models, clock
        self._channels = torch.tensor(plan.remaining)
        self._linears = Linears(plan, models.dense, clock)

    def outside(self, source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See engine.Treatment. The final norm, whose input is larger or smaller in fewer channels, makes up for it."""
        made = {name: self._cut(name, tensor) for name, tensor in source.items()}
        gains = [name for name, tensor in made.items() if tensor.ndim == 1 and tensor.shape != source[name].shape]
        if len(gains) == 1:
            (name,) = gains
            offset = self._offset(name)
            scaled = (made[name].float() + offset) * self._plan.findings["norm_ratio"] - offset
            made[name] = scaled.to(made[name].dtype)
        return made

    def restore(self, index: int, stored: Mapping[str, Tensor]) -> None:
        """See engine.Treatment: what is stored is plain weights, which are in place already."""

    def follow(self, index: int, facts: Mapping[str, Any], stored: Mapping[str, Tensor], calibration: Stream) -> None:
        """See engine.Treatment."""
        place = self._plan.place_of(index)
        if place is not None:
            calibration.advance(self._models.output.replay, place)

    def treat(
        self, index: int, source: Mapping[str, Tensor], calibration: Stream | None, dense: Stream | None
    ) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """See engine.Treatment."""
        assert calibration is not None
        assert dense is not None
        if index == 0:
            self._check(dense, calibration)
        place = self._plan.place_of(index)
        if place is None:
            with self._clock.phase("calibrate"):
                dense.advance(self._models.dense.replay, index)
            return {}, {"removed": True, "linears": [], "fallbacks": []}
        linears = {linear.name: linear for linear in self._plan.layout.of_block(index)}
        kinds = ((self._plan.heads[index], self._plan.sizes.heads), (self._plan.ffn[index], self._plan.sizes.ffn))
        modules = {name: self._models.dense.skeleton.module(name) for name in linears}
        refit = Refit(self._models.dense, index, modules, [units.writer.name for units, _ in kinds])
        with self._clock.phase("calibrate"):
            original = refit.follow(dense, calibration, self._channels.to(dense.hidden[0].device))
        with self._clock.phase("solve"):
            units = [(u, self._units(u, keep, source, original[u.writer.name])) for u, keep in kinds]
        made = {name: self._cut(name, sliced(name, tensor, units)) for name, tensor in source.items()}
        self._place(index, made)
        facts = self._refit(index, place, refit, linears, units, made, calibration)
        return {self._plan.renamed(name, index): tensor for name, tensor in made.items()}, facts

    def _refit(
        self, index: int, place: int, refit: Refit, linears: Mapping[str, Linear],
        units: list[tuple[Units, list[int]]], made: dict[str, Tensor], calibration: Stream,
    ) -> dict[str, Any]:  # fmt: skip
        """Refits every linear in the output's model and in `made`, in order of use. Returns facts."""
        output = self._models.output
        rows = {
            name.removesuffix(".weight"): torch.tensor(u.kept_rows(name, kept), device=output.skeleton.device)
            for u, kept in units for name in u.rows if name.endswith(".weight")
        }  # fmt: skip
        modules = {n: output.skeleton.module(self._plan.renamed(f"{n}.", index).removesuffix(".")) for n in linears}
        found = refit.moments(output, place, modules, rows, calibration, together=self._plan.needs.way.together)
        facts: list[dict[str, Any]] = []
        while True:
            with self._clock.phase("calibrate"):
                name, moments = next(found, (None, None))
            if name is None or moments is None:
                return {"removed": False, "linears": facts, "fallbacks": []}
            with self._clock.phase("solve"):
                facts.append(self._one(index, linears[name], made, moments))

    def _one(self, index: int, linear: Linear, made: dict[str, Tensor], moments: Moments) -> dict[str, Any]:
        """Refits one linear."""
        name, bias = linear.weight, made.get(f"{linear.name}.bias")
        first = made[name].to(moments.gram.device, torch.float32)
        first = first.t() if linear.transposed else first
        every = torch.arange(first.shape[1], device=first.device)
        weight, offset, _ = solve(_scaled(first, bias, moments), bias, moments, lambda full, damped: every)
        stored = weight.t().contiguous() if linear.transposed else weight
        changed = {name: stored.to("cpu", made[name].dtype)}
        if bias is not None and offset is not None:
            changed[f"{linear.name}.bias"] = offset.to("cpu", bias.dtype)
        made.update(changed)
        self._place(index, changed)
        return {
            "name": linear.name,
            "rows": linear.rows,
            "columns": linear.columns,
            "kept_columns": len(every),
            "units": linear.columns,
            "kept_units": len(every),
            "error_removed": missed(first, bias, every, moments),
            "relative_error": missed(weight, offset, every, moments),
        }

    def _units(self, units: Units, keep: int, source: Mapping[str, Tensor], moments: Moments) -> list[int]:
        """The FFN channels or KV groups that remain, by what they give to the original model."""
        if keep == units.count:
            return list(range(keep))
        weight, bias = self._linears.weight(units.writer, source), source.get(f"{units.writer.name}.bias")
        kept: list[int] = []

        def pick(full: Tensor, damped: Tensor) -> Tensor:
            kept[:] = choose(full, damped, units, keep)
            return torch.tensor(units.kept_columns(kept), device=full.device)

        solve(weight, bias, moments, pick)
        return kept

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor with the residual channels that remain."""
        for axis in self._plan.hidden_axes(name):
            tensor = tensor.index_select(axis, self._channels)
        return tensor

    def _place(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Puts tensors, by their names in the source, into the output's model."""
        self._models.output.skeleton.place({self._plan.renamed(n, index): t for n, t in tensors.items()})

    def _offset(self, gain: str) -> float:
        """What a norm adds to its gain before it multiplies with it: 1 in some families, else 0."""
        module = self._models.dense.skeleton.module(gain.removesuffix(".weight"))
        weight = module.weight
        assert isinstance(weight, Tensor)
        probe = torch.linspace(-1, 2, len(weight)).to(weight)  # not constant: norms may take off the mean
        with torch.no_grad():
            at_zero, at_one = (
                float(functional_call(module, {"weight": torch.full_like(weight, value)}, probe[None])[0, -1])
                for value in (0.0, 1.0)
            )
        return round(at_zero / (at_one - at_zero))

    def _check(self, dense: Stream, calibration: Stream) -> None:
        """Raises UnsupportedError where embeddings mean something else in a narrower model."""
        cut = dense.hidden[0][..., self._channels.to(dense.hidden[0].device)]
        if not torch.equal(cut, calibration.hidden[0]):
            raise UnsupportedError(
                f"architecture {self._plan.layout.architecture} scales its embeddings by the hidden size: it cannot "
                "change",
                "--ffn, --heads and --layers work on it",
            )


def _scaled(weight: Tensor, bias: Tensor | None, moments: Moments) -> Tensor:
    """The weight times the one number that brings it nearest to its target: norms over fewer channels change size."""
    gram, cross = centred(moments) if bias is not None else (moments.gram, moments.cross)
    square = ((weight @ gram) * weight).sum()
    return weight * ((cross * weight).sum() / square) if square > 0 else weight
