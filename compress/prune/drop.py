"""Removes the experts of a block that matter least: see engine.Treatment and experts.ExpertPlan."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from llmpare.compress.clock import Clock
from llmpare.compress.model.experts import Mixture
from llmpare.compress.model.models import Models
from llmpare.compress.prune.experts import ExpertPlan
from llmpare.compress.streams import Stream


class DropExperts:
    """An expert matters as much as it adds to the residual stream: Σ ‖gain · expert(x)‖² over its tokens.

    That is measured on what the output's model feeds the original block, routed as the original router does.
    """

    wants_dense = False

    def __init__(self, plan: ExpertPlan, models: Models, clock: Clock) -> None:
        self._plan, self._models, self._clock = plan, models, clock

    def outside(self, source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See engine.Treatment."""
        return {}

    def restore(self, index: int, stored: Mapping[str, Tensor]) -> None:
        """See engine.Treatment: what is stored is plain weights, which are in place already."""

    def follow(self, index: int, facts: Mapping[str, Any], stored: Mapping[str, Tensor], calibration: Stream) -> None:
        """See engine.Treatment."""
        calibration.advance(self._models.output.replay, index)

    def treat(
        self, index: int, source: Mapping[str, Tensor], calibration: Stream | None, dense: Stream | None
    ) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """See engine.Treatment."""
        assert calibration is not None
        mixtures = self._models.dense.skeleton.mixtures(self._plan.layout.of_block(index))
        with self._clock.phase("calibrate"):
            masses = self._masses(index, mixtures, calibration)
        kept = {name: choose(mass, self._plan.keep, self._plan.groups) for name, mass in masses.items()}
        tensors = {name: self._cut(name, source, kept) for name in self._plan.specs_of(index)}
        self._models.output.skeleton.place(tensors)
        if index + 1 < len(self._plan.layout.blocks):
            with self._clock.phase("advance"):
                calibration.advance(self._models.output.replay, index)
        facts = [
            {"name": name, "kept": kept[name], "mass": (mass / mass.sum().clamp(min=1e-38)).tolist()}
            for name, mass in masses.items()
        ]
        return tensors, {"removed": False, "linears": [], "fallbacks": [], "kept_experts": facts}

    @torch.no_grad()
    def _masses(self, index: int, mixtures: list[Mixture], calibration: Stream) -> dict[str, Tensor]:
        """What every expert of a mixture adds, [experts] in float64, by the mixture's name."""
        found = {each.name: torch.zeros(self._plan.count, dtype=torch.float64) for each in mixtures}

        def watch(mixture: Mixture) -> None:
            def see(module: nn.Module, args: tuple[tuple[int, Tensor]]) -> None:
                expert, part = args[0]
                found[mixture.name][expert] += float(part.float().square().sum(dtype=torch.float64))

            stack.callback(mixture.exit.register_forward_pre_hook(see).remove)

        if not mixtures:
            return found
        replay = self._models.dense.replay
        with ExitStack() as stack:
            for mixture in mixtures:
                stack.enter_context(mixture.opened(check=True))
                watch(mixture)
            for hidden in calibration.hidden:
                replay.run(index, hidden)
        return found

    def _cut(self, name: str, source: Mapping[str, Tensor], kept: Mapping[str, list[int]]) -> Tensor:
        """The tensor that the output has under a name."""
        if name in self._plan.own:
            mixture, place = self._plan.own[name]
            rest = name.removeprefix(f"{mixture}.{place}.")
            return source[f"{mixture}.{kept[mixture][place]}.{rest}"]
        if name in self._plan.per_expert:
            return source[name][kept[self._plan.per_expert[name]]]
        return source[name]


def choose(mass: Tensor, keep: int, groups: int) -> list[int]:
    """The experts of most mass, in their order: `keep` of them, equally many of every group of neighbours.

    mass [experts]. Of equals, the first.
    """
    size = len(mass) // groups
    order = mass.view(groups, size).argsort(dim=1, descending=True, stable=True)[:, : keep // groups]
    return sorted((order + size * torch.arange(groups)[:, None]).flatten().tolist())
