"""Two ways to gather the statistics of a block's inputs, and one way to use them.

Both are iterators over (names of the linears that share an input, statistics of that input), in order of use; whoever
iterates solves those linears and puts the new weights in place before asking for more.

`sequential` pauses every batch at each shared input until its linears are solved, and goes on with the new weights:
one forward for everything, later linears see the errors of earlier ones, and the stream ends past the block. What
waits costs memory: the widest activation of every token. `parallel` runs the block once with the weights it has, one
batch at a time, and leaves the stream where it was.
"""

from collections.abc import Iterator, Mapping

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from llmpare.compress import memory
from llmpare.compress.errors import InputError
from llmpare.compress.gram import Gram, shared_inputs, watched
from llmpare.compress.grid import Statistics
from llmpare.compress.model.replay import Replay
from llmpare.compress.streams import Stream

Groups = Iterator[tuple[list[str], Statistics]]


@torch.no_grad()
def sequential(replay: Replay, index: int, modules: Mapping[str, nn.Module], stream: Stream) -> Groups:
    """Statistics of block `index`, one shared input at a time; the stream is advanced past the block."""
    memory.trim()
    groups = _groups(replay, index, modules, stream)
    hub = getcurrent()

    def travel(batch: int) -> None:
        stream.hidden[batch] = replay.run(index, stream.hidden[batch])

    with watched(modules, groups, lambda group, x: hub.switch((group, x))):
        travellers = [greenlet(travel) for _ in range(len(stream))]
        waiting = [traveller.switch(batch) for batch, traveller in enumerate(travellers)]
        while waiting[0] is not None:  # what a traveller hands over at its end
            group, x = waiting[0]
            gram = Gram(x.shape[-1], x.device)
            for _, x in waiting:
                gram.add(x)
            del x, waiting  # only the travellers still need their inputs
            yield groups[group], gram.statistics()
            if group == len(groups) - 2:  # before the last, usually the widest input
                memory.trim()
            waiting = [traveller.switch() for traveller in travellers]


@torch.no_grad()
def parallel(
    replay: Replay,
    index: int,
    modules: Mapping[str, nn.Module],
    stream: Stream,
    dense: Stream | None,
    *,
    with_drift: bool,
) -> Groups:
    """Statistics of all inputs of block `index` under its present weights; the stream stays where it is.

    dense: the original model's stream, which is advanced past the block; its inputs give the drift, if asked for.
    """
    groups = _groups(replay, index, modules, stream)
    grams: dict[int, Gram] = {}
    for batch in range(len(stream)):
        original: dict[int, Tensor] = {}

        def accumulate(group: int, x: Tensor, original: dict[int, Tensor] = original) -> None:
            gram = grams.setdefault(group, Gram(x.shape[-1], x.device, with_drift=with_drift))
            gram.add(x, original.get(group))

        same = dense is not None and dense.hidden[batch] is stream.hidden[batch]
        if dense is not None and not same:
            with watched(modules, groups if with_drift else (), original.__setitem__):
                dense.hidden[batch] = replay.run(index, dense.hidden[batch])
        with watched(modules, groups, accumulate):
            out = replay.run(index, stream.hidden[batch])
        if dense is not None and same:
            dense.hidden[batch] = out
    for group, names in enumerate(groups):
        yield names, grams.pop(group).statistics()


def _groups(replay: Replay, index: int, modules: Mapping[str, nn.Module], stream: Stream) -> list[list[str]]:
    groups = shared_inputs(modules, lambda: replay.run(index, stream.hidden[0][:1]))
    idle = sorted(modules.keys() - {name for names in groups for name in names})
    if idle:
        raise InputError(f"nothing flows through {', '.join(idle)}", "leave what the model does not use to --ignore")
    return groups
