"""The look at the whole model that measures what sparsity costs where, before the pass that prunes.

For every input that linears of a block share: the squared error of their output at several sparsities, from the Gram
matrix; and what this does to the model's predictions, from a few windows that go on with these linears pruned, and all
others as they were, to the end. The first gives the shape of a curve, the second its height.
"""

from contextlib import closing
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from llmpare.compress import collect
from llmpare.compress.batches import logit_tokens
from llmpare.compress.clock import Clock
from llmpare.compress.evaluate.fidelity import score
from llmpare.compress.grid import Statistics
from llmpare.compress.linears import Linears
from llmpare.compress.model.layout import Linear
from llmpare.compress.model.models import Model
from llmpare.compress.prune import allotment, wanda
from llmpare.compress.prune.allotment import Part
from llmpare.compress.prune.masks import Quota
from llmpare.compress.prune.plan import SAMPLE, MaskPlan
from llmpare.compress.prune.refit import refit
from llmpare.compress.quantize import linalg
from llmpare.compress.quantize.refine import loss
from llmpare.compress.streams import Stream
from llmpare.compress.walk import Walk

_LEARNED = 16384  # tokens for the Gram matrices, and
_REFIT_STEPS = 5  # steps of the refit: the shape of a curve needs no more


@torch.no_grad()
def look(plan: MaskPlan, walk: Walk, model: Model, calibration: Stream | None, clock: Clock) -> list[dict[str, Any]]:
    """Per shared input: the linears' names, their weights, their costs by sparsity; see command.Survey."""
    if calibration is None:
        raise ValueError("sensitivity is measured on calibration text")
    linears = Linears(plan, model, clock)
    text = _first(calibration, _LEARNED)
    sample = _first(calibration, SAMPLE)
    ids, dense = torch.cat(sample.ids), torch.cat(list(sample.hidden))
    others: list[Tensor] = []  # the sample's hidden states, once for every part that has been pruned
    found: list[dict[str, Any]] = []
    with closing(walk.blocks()) as blocks:
        for index, source in blocks:
            wanted = {linear.name: linear for linear in plan.compressed if linear.block == index}
            modules = {name: model.skeleton.module(name) for name in wanted}
            with clock.phase("survey"):
                # the stream is its own original: nothing is pruned yet, and so it is past the block when this is done
                inputs = collect.Inputs(modules)
                groups = list(chain(*collect.parallel(model.replay, index, inputs, text, text, with_drift=False)))
                others = [model.replay.run(index, hidden) for hidden in others]
                for names, statistics in groups:
                    group = [wanted[name] for name in names]
                    weights = [linears.weight(linear, source) for linear in group]
                    costs, pruned = _curve(group, torch.cat(weights), statistics, plan.request.sparsity)
                    for linear, part in zip(group, pruned.split([n.rows for n in group]), strict=True):
                        linears.put(linear, part)
                    others.append(model.replay.run(index, dense))
                    for linear, weight in zip(group, weights, strict=True):
                        linears.put(linear, weight)
                    size = sum(linear.rows * linear.columns for linear in group)
                    found.append({"linears": names, "weights": size, "costs": costs})
                dense = model.replay.run(index, dense)
    with clock.phase("survey"):
        for part, hidden in zip(found, others, strict=True):
            part["kl"] = _divergence(model, ids, dense, hidden)
    return found


def settle(plan: MaskPlan, learned: list[dict[str, Any]]) -> MaskPlan:
    """The plan with a sparsity for every linear."""
    mean = plan.request.sparsity
    parts = []
    for part in learned:
        curve = [(sparsity, cost) for sparsity, cost in part["costs"]]
        height = part["kl"] / min(curve, key=lambda point: abs(point[0] - mean))[1]
        parts.append(Part(part["weights"], {sparsity: max(height * cost, 1e-30) for sparsity, cost in curve}))
    shares = allotment.allot(parts, mean)
    sparsity = {linear.name: 0.0 for linear in plan.layout.linears}
    for part, share in zip(learned, shares, strict=True):
        sparsity.update(dict.fromkeys(part["linears"], share))
    return plan.allotted(sparsity)


def _curve(
    group: list[Linear], weight: Tensor, statistics: Statistics, mean: float
) -> tuple[list[tuple[float, float]], Tensor]:
    """(sparsity, squared error of the output) at several points, and the weight at the mean of all."""
    damped = linalg.damp(statistics.gram, 0.01)
    points = allotment.around(mean)
    nearest = min(points, key=lambda point: abs(point - mean))
    curve, kept = [], weight
    for sparsity in points:
        quota = Quota([linear.rows for linear in group], [sparsity] * len(group))
        keep = wanda.solve(weight, statistics, quota).keep
        pruned = refit(weight, damped, keep, steps=_REFIT_STEPS)
        curve.append((sparsity, max(float(loss(weight, pruned, statistics.gram).sum()), 1e-30)))
        if sparsity == nearest:
            kept = pruned
    return curve, kept


def _first(stream: Stream, tokens: int) -> Stream:
    """The first windows of a stream, as many as hold so many tokens."""
    windows = -(-tokens // stream.ids[0].shape[1])
    ids, hidden = [], []
    for part, states in zip(stream.ids, stream.hidden, strict=True):
        ids.append(part[:windows])
        hidden.append(states[:windows])
        windows -= len(part)
        if windows <= 0:
            break
    return Stream(ids, hidden)


def _divergence(model: Model, ids: Tensor, dense: Tensor, other: Tensor) -> float:
    """Mean KL per token, in nats, between what follows from the last block's outputs."""
    step, last = logit_tokens(model.replay.device.type), ids.shape[1] - 1
    total = 0.0
    for window in range(len(ids)):
        one = slice(window, window + 1)
        for start in range(0, last, step):
            end = min(start + step, last)
            before, after = (model.replay.logits(ids[one], hidden[one], start, end) for hidden in (dense, other))
            total += float(score(before, after, ids[one, start + 1 : end + 1]).kl.sum())
    return total / (len(ids) * last)
