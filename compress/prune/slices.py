"""Tensors with the rows and columns of the units that remain."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmpare.compress.prune.structure import Units


def sliced(name: str, tensor: Tensor, units: Sequence[tuple[Units, Sequence[int]]]) -> Tensor:
    """A tensor of a block as it is stored; units: of that block, each with the numbers of those that remain."""
    for part, kept in units:
        turned = part.writer.transposed and tensor.ndim == 2
        if name == part.writer.weight:
            return tensor.index_select(0 if turned else 1, torch.tensor(part.kept_columns(kept)))
        if name in part.rows:
            return tensor.index_select(1 if turned else 0, torch.tensor(part.kept_rows(name, kept)))
    return tensor
