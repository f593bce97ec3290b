"""Hidden states of a set of windows on their way through the model, a batch at a time."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from llmpare.compress.model.replay import Replay
from llmpare.compress.spill import Batches


class Stream:
    """ids and hidden: one tensor [windows, tokens] and one [windows, tokens, hidden] per batch, on the device.

    A stream stands before some block; `advance` takes it past that block. hidden need not lie in memory: see spill.
    """

    def __init__(self, ids: Sequence[Tensor], hidden: Batches) -> None:
        self.ids = list(ids)
        self.hidden = hidden

    @classmethod
    def enter(
        cls, windows: Tensor, replay: Replay, batch: int, keep: Callable[[Iterable[Tensor]], Batches] = list
    ) -> "Stream":
        """The stream before block 0, for windows [windows, tokens], `batch` of them at a time.

        keep: makes the list that the hidden states wait in.
        """
        ids = list(windows.to(replay.device).split(batch))
        return cls(ids, keep(replay.embed(part) for part in ids))

    def fork(self) -> "Stream":
        """A second stream at the same place; what is shared is never written to."""
        return Stream(self.ids, self.hidden.copy())

    def __len__(self) -> int:
        return len(self.hidden)

    @torch.no_grad()
    def advance(self, replay: Replay, index: int) -> None:
        """Through block `index`, which must be loaded."""
        for batch, hidden in enumerate(self.hidden):
            self.hidden[batch] = replay.run(index, hidden)

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return sum(len(part) for part in self.ids)

    def pick(self, indices: Sequence[int]) -> Tensor:
        """Hidden states [len(indices), tokens, hidden] of some windows, by their number."""
        size = len(self.ids[0])  # every batch but the last
        return torch.stack([self.hidden[index // size][index % size] for index in indices])

    def finite(self) -> bool:
        """Whether no activation is NaN or infinite. One synchronisation."""
        return bool(torch.stack([hidden.isfinite().all() for hidden in self.hidden]).all())


@torch.no_grad()
def relative_error(dense: Stream, compressed: Stream, channels: Sequence[int] | None = None) -> float:
    """‖compressed − dense‖² / ‖dense‖² over all hidden states.

    channels: those of the dense stream that the compressed one has, in order; None for all.
    """
    miss = torch.zeros((), dtype=torch.float64, device=dense.ids[0].device)
    norm = torch.zeros_like(miss)
    for a, b in zip(dense.hidden, compressed.hidden, strict=True):
        a = a if channels is None else a[..., channels]
        miss += (a.float() - b.float()).square().sum()
        norm += a.float().square().sum()
    return float(miss / norm) if norm != 0 else 0.0  # NaN must not become 0
