"""A model that has read the text: block by block where that is possible, else whole.

Either way it ends as the hidden states of every token before the head, from which logits are made a few positions at
a time: for a large vocabulary they would not fit all at once.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from llmpare.compress import memory
from llmpare.compress.clock import Clock
from llmpare.compress.errors import UnsupportedError
from llmpare.compress.formats.decoded import DenseSource
from llmpare.compress.model.layout import layout
from llmpare.compress.model.replay import Replay, float32_head
from llmpare.compress.model.skeleton import Skeleton
from llmpare.compress.progress import Progress
from llmpare.compress.streams import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Setup:
    """How models are run. batch: windows at a time."""

    dtype: torch.dtype
    device: torch.device
    batch: int
    trust: bool
    clock: Clock
    progress: Progress


class Reader(Protocol):
    """A model past its last block. broken: where its activations stop being numbers, or None."""

    broken: str | None

    def logits(self, windows: range, start: int, end: int) -> Tensor:
        """Float32 logits [len(windows), end − start, vocabulary] of positions start … end − 1, to be overwritten."""
        ...


def chunks(windows: int, positions: int, tokens: int) -> Iterator[tuple[range, list[tuple[int, int]]]]:
    """Windows in groups, and for each the ranges of positions, so that about `tokens` positions are done at a time."""
    group = max(1, tokens // positions)
    ranges = [(start, min(start + tokens, positions)) for start in range(0, positions, tokens)]
    for first in range(0, windows, group):
        yield range(first, min(first + group, windows)), ranges


def read(source: DenseSource, ids: Tensor, setup: Setup) -> tuple[Reader, dict[str, str] | None]:
    """The model in `source` after it has read ids [windows, tokens].

    Also returns, for a model that cannot be taken apart into blocks and was loaded whole, a fallback for the report.
    """
    try:
        return Streamed(source, ids, setup), None
    except UnsupportedError as error:
        setup.progress.warn(f"{source.folder}: {error.message}; it is loaded whole into memory")
        reader = Whole(source, ids, setup)
        return reader, {"name": str(source.folder), "cause": error.message, "action": "loaded whole into memory"}


class Streamed:
    """One block in memory at a time, the next being read meanwhile."""

    def __init__(self, source: DenseSource, ids: Tensor, setup: Setup) -> None:
        found = layout(source)
        clock = setup.clock
        with clock.phase("load"):
            skeleton = Skeleton(source, found, setup.dtype, setup.device, trust=setup.trust)
        with clock.phase("read"):
            skeleton.place_outside(_tensors(source, found.outside, setup.dtype))
            skeleton.place(_tensors(source, found.blocks[0], setup.dtype))
        with clock.phase("forward"):
            self._replay = Replay(skeleton)
            self._stream = Stream.enter(ids, self._replay, setup.batch)
        self._ids = ids.to(setup.device)
        self.broken: str | None = None
        with ThreadPoolExecutor(1, "prefetch") as reader:
            for index in range(len(found.blocks)):
                more = index + 1 < len(found.blocks)
                coming = reader.submit(_tensors, source, found.blocks[index + 1], setup.dtype) if more else None
                with clock.phase("forward"):
                    self._stream.advance(self._replay, index)
                    if self.broken is None and not self._stream.finite():
                        self.broken = f"the activations of block {index}"
                skeleton.unload(index)
                memory.trim()
                setup.progress.block(index, len(found.blocks), {})
                if coming is not None:
                    with clock.phase("read"):
                        skeleton.place(coming.result())

    def logits(self, windows: range, start: int, end: int) -> Tensor:
        return self._replay.logits(self._ids[windows.start : windows.stop], self._stream.pick(windows), start, end)


def _tensors(source: DenseSource, names: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: source.tensor(name, dtype) for name in names}


class Whole:
    """All of a model in memory, by transformers' own forward."""

    @torch.no_grad()
    def __init__(self, source: DenseSource, ids: Tensor, setup: Setup) -> None:
        from llmpare.compress.model import whole

        with setup.clock.phase("load"):
            self._model: PreTrainedModel = whole.load(source, setup.dtype, setup.device, trust=setup.trust)
        self._ids = ids.to(setup.device)
        self._hidden: list[Tensor] = []
        parts = self._ids.split(setup.batch)
        for index, part in enumerate(parts):
            with setup.clock.phase("forward"):
                out = self._model.base_model(input_ids=part, use_cache=False)
                self._hidden.extend(out.last_hidden_state)
            setup.progress.block(index, len(parts), {})
        self._kind = type(out)
        finite = all(bool(hidden.isfinite().all()) for hidden in self._hidden)
        self.broken = None if finite else "the activations of the last block"

    @torch.no_grad()
    def logits(self, windows: range, start: int, end: int) -> Tensor:
        model = self._model
        hidden = torch.stack([self._hidden[window] for window in windows])
        inner: nn.Module = model.base_model

        def read_already(*args: Any, **kwargs: Any) -> Any:
            return self._kind(last_hidden_state=hidden)

        inner.forward = read_already
        try:
            with float32_head(model.get_output_embeddings()):
                ids = self._ids[windows.start : windows.stop]
                positions = torch.arange(start, end, device=hidden.device)
                logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits
        finally:
            del inner.forward
        return logits.float()
