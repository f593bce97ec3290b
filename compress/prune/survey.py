"""The look at the whole model that structured pruning takes before its pass, and what follows from it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmpare.compress.batches import logit_tokens
from llmpare.compress.clock import Clock
from llmpare.compress.errors import InputError
from llmpare.compress.evaluate.fidelity import score
from llmpare.compress.hooks import before
from llmpare.compress.linears import Linears
from llmpare.compress.model.models import Model
from llmpare.compress.prune import depth, hidden, target
from llmpare.compress.prune.decide import EDGES, possible_channels, possible_groups, sized
from llmpare.compress.prune.structure import Units
from llmpare.compress.prune.surgery import ShrinkPlan
from llmpare.compress.prune.target import Curve
from llmpare.compress.streams import Stream
from llmpare.compress.walk import Walk

PLACES = 4  # at which the cost of keeping fewer FFN channels is measured, down to half of them
SHALLOWEST = 0.25  # share of the blocks that a search may remove: past that it is seldom the best place to cut


def needed(plan: ShrinkPlan) -> bool:
    """Whether headers leave something open."""
    return plan.cut.searched or plan.remaining is not None or plan.sizes.depth < len(plan.layout.blocks)


@torch.no_grad()
def look(plan: ShrinkPlan, walk: Walk, model: Model, calibration: Stream | None, clock: Clock) -> dict[str, Any]:
    """What the plan needs to know, as JSON values: see run.Survey."""
    assert calibration is not None
    total = len(plan.layout.blocks)
    learned: dict[str, Any] = {"lists": _per_layer(model, total)}
    if plan.cut.searched:
        with clock.phase("survey"):
            return {**learned, **_search(plan, walk, model, _Sample(model, walk, calibration), clock)}
    if plan.sizes.blocks is None:
        with clock.phase("survey"):
            found = _Sample(model, walk, calibration).remove(total - plan.sizes.depth)
        learned |= {"sizes": {"depth": plan.sizes.depth}, **_depth(found, total, plan.sizes.depth)}
    if plan.channels is not None:
        with clock.phase("survey"):
            learned |= _channels(plan, walk, model, _Sample(model, walk, calibration), clock)
    return learned


def settle(plan: ShrinkPlan, learned: dict[str, Any]) -> ShrinkPlan:
    """The plan with nothing left open."""
    sizes = replace(plan.sizes, **learned.get("sizes", {}), blocks=tuple(learned.get("blocks", plan.blocks)))
    channels = None if plan.channels is None else tuple(learned["channels"])
    settled = replace(plan, sizes=sizes, remaining=channels, lists=learned["lists"], findings=learned)
    return replace(settled, specs=settled.all_specs())


def _depth(found: depth.Removal, total: int, kept: int) -> dict[str, Any]:
    """Which blocks remain if `kept` do, and what was seen on the way."""
    gone = found.gone[: total - kept]
    return {
        "blocks": [index for index in range(total) if index not in gone],
        "depth": {
            "influence": found.influence,
            "alone": [{"block": block, "kl": kl} for block, kl in found.tried.items()],
            "removed": [{"block": block, "kl": kl} for block, kl in found.steps],
        },
    }


def _search(plan: ShrinkPlan, walk: Walk, model: Model, sample: "_Sample", clock: Clock) -> dict[str, Any]:
    """What to remove to meet the target. Raises InputError if nothing that may be removed is enough."""
    cut, total = plan.cut, len(plan.layout.blocks)
    ffn, groups = possible_channels(plan), possible_groups(plan)
    lowest = ffn[0]
    places = {min(n for n in ffn if n >= lowest + (ffn[-1] - lowest) * i / PLACES) for i in range(PLACES)}
    widths = _widths(plan, walk, model, sample, {"ffn": sorted(places - {ffn[-1]}), "heads": groups[:-1]}, clock)
    removable = min(int(total * SHALLOWEST), total - sum(EDGES))
    found = sample.remove(removable)
    depths: Curve = [(total - i - 1, found.steps[i][1]) for i in reversed(range(removable))] + [(total, 0.0)]
    curves: dict[str, Curve] = {
        "ffn": [*widths["ffn"], (ffn[-1], 0.0)], "heads": [*widths["heads"], (groups[-1], 0.0)], "depth": depths,
    }  # fmt: skip
    in_bytes = cut.target_size is not None

    def size(channels: int, kv_groups: int, blocks: int) -> int:
        return sized(plan, channels, kv_groups, blocks, in_bytes=in_bytes)

    limit = cut.target_size if in_bytes else cut.target_params
    chosen = target.choose(**curves, channels=ffn, size=size, max_size=limit, max_kl=cut.max_kl)
    if chosen is None:
        smallest, unit = size(lowest, groups[0], total - removable), "bytes" if in_bytes else "parameters"
        raise InputError(
            f"a search removes at most half of each width and a quarter of the blocks, and {smallest:,} {unit} remain",
            "say what else to remove with --ffn, --heads and --layers, or choose a larger target",
        )
    measured = {name: [{"kept": kept, "kl": kl} for kept, kl in curve] for name, curve in curves.items()}
    return {
        "sizes": {"ffn": chosen.ffn, "heads": chosen.heads, "depth": chosen.depth},
        **_depth(found, total, chosen.depth),
        "search": {"measured": measured, "expected_kl": chosen.kl},
    }


def _widths(
    plan: ShrinkPlan, walk: Walk, model: Model, sample: "_Sample", places: Mapping[str, Sequence[int]], clock: Clock
) -> dict[str, Curve]:
    """The cost of keeping only so many units of one kind, in all blocks, with nothing refitted: all in one walk."""
    linears = Linears(plan, model, clock)
    streams = {(kind, keep): list(sample.hidden) for kind, counts in places.items() for keep in counts}
    dense = list(sample.hidden)
    with closing(walk.blocks()) as blocks:
        for index, source in blocks:
            names = [units[index].writer.name for units in (plan.ffn, plan.heads) if units]
            modules = {name: model.skeleton.module(name) for name in names}
            energy = _energies(model, index, modules, dense)
            for (kind, keep), stream in streams.items():
                units = (plan.ffn if kind == "ffn" else plan.heads)[index]
                weight = linears.weight(units.writer, source)
                linears.put(units.writer, _without(weight, energy[units.writer.name], units, keep))
                streams[kind, keep] = [model.replay.run(index, x) for x in stream]
                linears.put(units.writer, weight)
            dense = [model.replay.run(index, x) for x in dense]
    return {
        kind: [(keep, sample.divergence(dense, streams[kind, keep])) for keep in counts]
        for kind, counts in places.items()
    }


def _channels(plan: ShrinkPlan, walk: Walk, model: Model, sample: "_Sample", clock: Clock) -> dict[str, Any]:
    """Which residual channels remain, and how much larger the final norm's input is in them than in all."""
    linears = Linears(plan, model, clock)
    dense = list(sample.hidden)
    total = torch.zeros(dense[0].shape[-1], device=dense[0].device)
    with closing(walk.blocks()) as blocks:
        for index, source in blocks:
            writers = {plan.ffn[index].writer.name, plan.heads[index].writer.name}
            readers = {n.name: n for n in plan.layout.of_block(index) if n.name not in writers}
            modules = {name: model.skeleton.module(name) for name in readers}
            energy = _energies(model, index, modules, dense)
            for name, linear in readers.items():
                total += hidden.shares([linears.weight(linear, source)], energy[name])
            dense = [model.replay.run(index, x) for x in dense]
    kept = total.topk(plan.sizes.hidden).indices.sort().values
    sizes = [(x[..., kept].float().square().mean(-1) / x.float().square().mean(-1)).sqrt().flatten() for x in dense]
    return {"channels": kept.tolist(), "norm_ratio": float(torch.cat(sizes).mean())}


def _energies(model: Model, index: int, modules: Mapping[str, nn.Module], dense: Sequence[Tensor]) -> dict[str, Tensor]:
    """Σ x² over tokens of what flows into each of a block's linears, [columns]."""
    found: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        energy = x.reshape(-1, x.shape[-1]).float().square().sum(0)
        found[name] = found[name] + energy if name in found else energy

    with before(modules, see):
        for x in dense:
            model.replay.run(index, x)
    return found


def _without(weight: Tensor, energy: Tensor, units: Units, keep: int) -> Tensor:
    """The writer's weight with zeros for all but the `keep` units of most ‖W_j‖²·E[x_j²]."""
    scores = (weight.square().sum(0) * energy).view(units.count, units.columns).sum(1)
    kept = units.kept_columns(scores.topk(keep).indices.tolist())
    masked = torch.zeros_like(weight)
    masked[:, kept] = weight[:, kept]
    return masked


def _per_layer(model: Model, total: int) -> dict[str, list[Any]]:
    """Settings with one entry per block, worked out: a config.json may leave them to a rule that counts blocks."""
    config = model.skeleton.model.config.to_dict()
    return {
        name: values
        for name, values in config.items()
        if isinstance(values, list) and len(values) == total and ("layer" in name or "block" in name)
    }


class _Sample:
    """A little of the calibration text, before block 0, and what comes of it."""

    def __init__(self, model: Model, walk: Walk, calibration: Stream) -> None:
        self._model, self._walk = model, walk
        self.ids: list[Tensor] = []
        self.hidden: list[Tensor] = []
        room = depth.TOKENS
        for ids, entered in zip(calibration.ids, calibration.hidden, strict=True):
            windows = min(len(ids), max(room // ids.shape[1], 0 if self.ids else 1))
            if windows > 0:
                self.ids.append(ids[:windows])
                self.hidden.append(entered[:windows])
            room -= ids.numel()

    def remove(self, count: int) -> depth.Removal:
        """The `count` blocks that are missed least; those at the edges stay."""
        inner = range(EDGES[0], len(self._model.skeleton.blocks) - EDGES[1])
        return depth.remove(self.walk, self._model.replay.run, self.divergence, self.hidden, count, inner)

    def walk(self) -> Iterator[int]:
        """Block numbers, each loaded while it is the current one."""
        with closing(self._walk.blocks()) as blocks:
            for index, _ in blocks:
                yield index

    def divergence(self, dense: Sequence[Tensor], other: Sequence[Tensor]) -> float:
        """Mean KL(dense ‖ other) per token, in nats, from what the last block puts out."""
        replay, total, count = self._model.replay, 0.0, 0
        step = logit_tokens(replay.device.type)
        for ids, a, b in zip(self.ids, dense, other, strict=True):
            last = ids.shape[1] - 1
            for window in range(len(ids)):
                one = slice(window, window + 1)
                for start in range(0, last, step):
                    end = min(start + step, last)
                    before, after = (replay.logits(ids[one], hidden[one], start, end) for hidden in (a, b))
                    total += float(score(before, after, ids[one, start + 1 : end + 1]).kl.sum())
                    count += end - start
        return total / count
