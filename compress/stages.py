"""Batches that pause inside a block, wherever its linears are to get new weights, and go on through these."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from llmpare.compress.gram import watched
from llmpare.compress.hooks import after
from llmpare.compress.model.replay import Replay
from llmpare.compress.streams import Stream


class Traveller(greenlet):
    """A batch on its way through a block.

    input: what flows into the modules that it waits at, usually a tensor. written: what came out of the modules to be
    noted, so far.
    """

    def __init__(self, run: Callable[[int], None], batch: int) -> None:
        super().__init__(run)
        self.batch = batch
        self.input: Any = None
        self.written: dict[str, Tensor] = {}


@torch.no_grad()
def staged(
    replay: Replay,
    index: int,
    modules: Mapping[str, nn.Module],
    groups: Sequence[Sequence[str]],
    stream: Stream,
    *,
    together: bool = True,
    noted: Mapping[str, nn.Module] | None = None,
) -> Iterator[tuple[Sequence[str], Iterator[Traveller]]]:
    """One stage per group of modules that share an input: the group, and every batch as it waits there, in turn.

    Whoever iterates looks at all batches of a stage, puts new weights in place, and asks for the next; after the last
    the stream is past block `index`. together: all batches wait at each stage, in one forward; otherwise every batch
    begins anew for every stage. noted: modules whose outputs travellers note down.
    """
    hub = getcurrent()

    def travel(batch: int) -> None:
        stream.hidden[batch] = replay.run(index, stream.hidden[batch])

    def pause(group: int, x: Any) -> None:
        me = _traveller()
        me.input = x
        try:
            hub.switch(group)
        finally:  # also where the way ends here
            me.input = None  # whatever still needs it holds it

    def note(name: str, out: Tensor) -> None:
        _traveller().written[name] = out

    def stopping_at(group: int) -> Iterator[Traveller]:
        for batch in range(len(stream)):
            traveller = Traveller(travel, batch)
            stage = traveller.switch(batch)
            while stage != group:
                stage = traveller.switch()
            yield traveller
            traveller.throw()

    with watched(modules, groups, pause), after(noted or {}, note):
        if not together:
            for group, names in enumerate(groups):
                yield names, stopping_at(group)
        else:
            travellers = [Traveller(travel, batch) for batch in range(len(stream))]
            stage = [traveller.switch(traveller.batch) for traveller in travellers][0]
            while stage is not None:  # what a traveller hands over at its end
                yield groups[stage], iter(travellers)
                stage = [traveller.switch() for traveller in travellers][0]
    if not together:
        stream.advance(replay, index)


def _traveller() -> Traveller:
    """The one that is on its way right now."""
    me = getcurrent()
    assert isinstance(me, Traveller)
    return me
