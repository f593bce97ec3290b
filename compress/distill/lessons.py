"""Which windows a training sees, in which order: a function of the seed and the number of the window alone."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llmpare.calibration_data import IGNORED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Lessons(Dataset[dict[str, Tensor]]):
    """`count` windows: all of ids [windows, tokens] in random order, then all of them in another, and so on.

    skipped: [windows, tokens], tokens that are not to be learned, such as prompts; None: there are none.
    """

    def __init__(
        self, ids: "NDArray[np.int64]", count: int, seed: int, skipped: "NDArray[np.bool_] | None" = None
    ) -> None:
        self._ids, self._count, self._seed, self._skipped = ids, count, seed, skipped
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """One window, as Pupil.forward takes several of them."""
        epoch, place = divmod(number, len(self._ids))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 2**20 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._ids), generator=generator)
        index = self._order[place]
        ids = torch.from_numpy(self._ids[index])
        labels = ids[1:].clone()
        if self._skipped is not None:
            labels[torch.from_numpy(self._skipped[index][1:])] = IGNORED
        return {"ids": ids, "labels": labels, "indices": index}
