"""Two ways to gather the statistics of a block's inputs, and one way to use them.

Both are iterators over what can be solved at the same time: lists of (names of the linears that share an input,
statistics of that input), usually of one, in order of use. Whoever iterates solves those linears and puts the new
weights in place before asking for more.

`sequential` pauses every batch at each shared input until its linears are solved, and goes on with the new weights:
one forward for everything, later linears see the errors of earlier ones, and the stream ends past the block. What
waits costs memory: the widest activation of every token. It is built on `stages`, which is the pauses alone.
`parallel` runs the block once with the weights it has, one batch at a time, and leaves the stream where it was.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmpare.compress import memory, routing
from llmpare.compress.errors import InputError
from llmpare.compress.gram import Gram, shared_inputs, watched
from llmpare.compress.grid import Statistics
from llmpare.compress.model.experts import Mixture, Routed
from llmpare.compress.model.replay import Replay
from llmpare.compress.stages import staged
from llmpare.compress.streams import Stream

Groups = Iterator[list[tuple[list[str], Statistics]]]


@dataclass(frozen=True)
class Inputs:
    """Whose inputs are to be learned about: linears by name, and mixtures of experts.

    everything: every expert learns from every token.
    """

    linears: Mapping[str, nn.Module]
    mixtures: Sequence[Mixture] = ()
    everything: bool = False

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What is called with inputs: the linears, and the doors of mixtures that linears read at."""
        doors = {place: each.doors[place] for each in self.mixtures for place in each.readers}
        return {**self.linears, **doors}

    @property
    def readers(self) -> dict[str, dict[int, list[str]]]:
        """Of every door, the names of the linears that read there, by expert."""
        return {place: readers for each in self.mixtures for place, readers in each.readers.items()}

    @contextmanager
    def opened(self, *, check: bool = False) -> Iterator[None]:
        """Within the context, experts' inputs go through the doors: see Mixture."""
        with ExitStack() as stack:
            for mixture in self.mixtures:
                stack.enter_context(mixture.opened(everything=self.everything, check=check))
            yield


@torch.no_grad()
def sequential(replay: Replay, index: int, inputs: Inputs, stream: Stream, *, together: bool = True) -> Groups:
    """Statistics of block `index`, one shared input at a time; the stream is advanced past the block.

    together: all batches wait at each input; otherwise only one is inside the block at a time, and comes anew for the
    next input. The same numbers either way.
    """
    memory.trim()
    groups, modules, readers = _groups(replay, index, inputs, stream), inputs.modules, inputs.readers
    stages = staged(replay, index, modules, groups, stream, together=together)
    with inputs.opened():
        for stage, (names, waiting) in enumerate(stages):
            first = next(waiting)
            if isinstance(first.input, Routed):
                flows = [first.input, *(traveller.input for traveller in waiting)]
                yield from routing.learn(flows, readers[names[0]], everything=inputs.everything)
                del flows
                continue
            gram = Gram(first.input.shape[-1], first.input.device)
            gram.add(first.input)
            for traveller in waiting:
                gram.add(traveller.input)
            yield [(list(names), gram.statistics())]
            if stage == len(groups) - 2:  # before the last, usually the widest input, even where freed memory is kept
                memory.trim()


@torch.no_grad()
def parallel(
    replay: Replay,
    index: int,
    inputs: Inputs,
    stream: Stream,
    dense: Stream | None,
    *,
    with_drift: bool,
) -> Groups:
    """Statistics of all inputs of block `index` under its present weights; the stream stays where it is.

    dense: the original model's stream, which is advanced past the block; its inputs give the drift, if asked for.
    """
    groups, modules, readers = _groups(replay, index, inputs, stream), inputs.modules, inputs.readers
    grams: dict[int, Gram] = {}
    routed: dict[int, routing.Grams] = {}
    for batch in range(len(stream)):
        original: dict[int, Tensor] = {}

        def accumulate(group: int, x: Tensor | Routed, original: dict[int, Tensor] = original) -> None:
            if isinstance(x, Routed):
                routed.setdefault(group, routing.Grams(list(readers[groups[group][0]]))).add(x)
                return
            gram = grams.setdefault(group, Gram(x.shape[-1], x.device, with_drift=with_drift))
            gram.add(x, original.get(group))

        same = dense is not None and dense.hidden[batch] is stream.hidden[batch]
        if dense is not None and not same:
            with watched(modules, groups if with_drift else (), original.__setitem__):
                dense.hidden[batch] = replay.run(index, dense.hidden[batch])
        with inputs.opened(), watched(modules, groups, accumulate):
            out = replay.run(index, stream.hidden[batch])
        if dense is not None and same:
            dense.hidden[batch] = out
    for group, names in enumerate(groups):
        if group in routed:
            yield from routed.pop(group).statistics(readers[names[0]], everything=inputs.everything)
        else:
            yield [(names, grams.pop(group).statistics())]


def _groups(replay: Replay, index: int, inputs: Inputs, stream: Stream) -> list[list[str]]:
    modules = inputs.modules
    with inputs.opened(check=True):
        groups = shared_inputs(modules, lambda: replay.run(index, stream.hidden[0][:1]))
    idle = sorted(modules.keys() - {name for names in groups for name in names})
    if idle:
        raise InputError(f"nothing flows through {', '.join(idle)}", "leave what the model does not use to --ignore")
    return groups
