"""Which blocks a model can do without, found by measuring.

Block influence, 1 − E[cos(x_in, x_out)], says how much a block turns the residual stream (Men et al., 2024,
arXiv:2403.03853). It is cheap, and too coarse to decide: it shortlists. Then blocks leave one at a time, each time
the one whose absence changes the model's predictions least, KL(dense ‖ without it), given those that have left.
All candidates of one step walk through the model side by side, each with a stream of its own from where it differs.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SPARE = 4  # blocks on the shortlist beyond twice the number that is to leave
TOKENS = 8192  # of the calibration text that candidates are judged by: enough to rank them


@dataclass
class Removal:
    """What was found. influence: of every block. steps: the block that left and the KL divergence then, in nats.

    tried: the KL divergence of every block of the first step's shortlist, when it alone is missing.
    """

    influence: list[float]
    steps: list[tuple[int, float]] = field(default_factory=list)
    tried: dict[int, float] = field(default_factory=dict)

    @property
    def gone(self) -> list[int]:
        """Blocks that have left."""
        return [block for block, _ in self.steps]


Run = Callable[[int, Tensor], Tensor]


def influence(hidden: Sequence[Tensor], out: Sequence[Tensor]) -> float:
    """1 − E[cos(x_in, x_out)] over all tokens of batches [windows, tokens, hidden]."""
    cosines = [
        torch.cosine_similarity(a.float(), b.float(), dim=-1).flatten() for a, b in zip(hidden, out, strict=True)
    ]
    return 1 - float(torch.cat(cosines).mean())


def remove(
    walk: Callable[[], Iterable[int]],
    run: Run,
    divergence: Callable[[Sequence[Tensor], Sequence[Tensor]], float],
    entered: Sequence[Tensor],
    count: int,
    candidates: Sequence[int],
) -> Removal:
    """The `count` blocks among `candidates` that are missed least.

    walk(): block numbers in order, each loaded while it is the current one. run(index, hidden): through that block.
    divergence(dense, other): mean KL of the predictions from the last block's outputs. entered: hidden states before
    block 0, by batch.
    """
    dense, found = list(entered), Removal([])
    for index in walk():
        out = [run(index, hidden) for hidden in dense]
        found.influence.append(influence(dense, out))
        dense = out
    shortlist = sorted(candidates, key=lambda index: found.influence[index])[: 2 * count + SPARE]
    while len(found.steps) < count:
        losses = _without(walk, run, divergence, entered, dense, found.gone, shortlist)
        found.tried = found.tried or dict(losses)
        best = min(losses, key=lambda index: losses[index])
        found.steps.append((best, losses[best]))
        left = count - len(found.steps)
        shortlist = sorted(losses.keys() - {best}, key=lambda index: losses[index])[: 2 * left + SPARE]
    return found


def _without(
    walk: Callable[[], Iterable[int]],
    run: Run,
    divergence: Callable[[Sequence[Tensor], Sequence[Tensor]], float],
    entered: Sequence[Tensor],
    dense: Sequence[Tensor],
    gone: Sequence[int],
    candidates: Sequence[int],
) -> dict[int, float]:
    """The divergence when, besides those gone, one candidate is missing: for every candidate, in one walk."""
    common, streams = list(entered), dict[int, list[Tensor]]()
    for index in walk():
        if index in gone:
            continue
        for missing, stream in streams.items():
            streams[missing] = [run(index, hidden) for hidden in stream]
        if index in candidates:
            streams[index] = list(common)
        common = [run(index, hidden) for hidden in common]
    return {missing: divergence(dense, stream) for missing, stream in streams.items()}
