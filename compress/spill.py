"""Hidden states that memory has no room for: on their way through the model they wait in host memory or in a file.

The file has no name, so that nothing is left of it however the process ends. It is read and written, not mapped: pages
of a mapped file count as memory of the process.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llmpare.compress.checkpoint.files import Closing, read_at, write_at, writing
from llmpare.compress.checkpoint.tensors import to_bytes


class Batches(Protocol):
    """As much of a list of tensors as a stream needs."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def __getitem__(self, index: int, /) -> Tensor: ...

    def __setitem__(self, index: int, value: Tensor, /) -> None: ...

    def copy(self) -> "Batches": ...


class Spill(Closing):
    """A place outside the device's memory for the hidden states of any number of streams; close it, or use `with`.

    folder: where the file is to be. host: bytes of pinned memory to use before the file, for a device of its own.
    """

    def __init__(self, folder: Path, host: int = 0) -> None:
        self._folder, self._host = folder, host
        with writing(folder):
            self._fd = _nameless(folder)
        self._end = 0

    def keep(self, tensors: Iterable[Tensor]) -> "Spilled":
        """The tensors as a list that holds none of them."""
        return Spilled(self, tensors)

    def room(self, size: int) -> int | None:
        """Takes `size` bytes of pinned memory, if there are so many left: None. Else their offset in the file."""
        if size <= self._host:
            self._host -= size
            return None
        self._end += size
        return self._end - size

    def write(self, offset: int, tensor: Tensor) -> None:
        """Puts a tensor's bytes there. Raises OutputError."""
        with writing(self._folder):
            write_at(self._fd, offset, to_bytes(tensor))

    def read(self, offset: int, size: int) -> bytearray:
        """The bytes there. Raises InputError."""
        return read_at(self._fd, offset, size, self._folder)

    def close(self) -> None:
        """Gives the file's space back. What was kept is gone."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Spilled:
    """A list of tensors, each of which is on its device only while somebody holds it. See Batches."""

    def __init__(self, spill: Spill, tensors: Iterable[Tensor]) -> None:
        self._spill = spill
        self._places: list[_Place] = []
        for tensor in tensors:
            offset = spill.room(tensor.nbytes)
            self._places.append(_Place(spill, tensor, offset))

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Tensor]:
        return (place.get() for place in self._places)

    def __getitem__(self, index: int, /) -> Tensor:
        return self._places[index].get()

    def __setitem__(self, index: int, value: Tensor, /) -> None:
        self._places[index].put(value)

    def copy(self) -> "Spilled":
        """The same tensors in places of their own."""
        return Spilled(self._spill, self)


class _Place:
    """Where one tensor waits: in pinned memory if it has no offset, else in the file."""

    def __init__(self, spill: Spill, tensor: Tensor, offset: int | None) -> None:
        self._spill, self._offset = spill, offset
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._pinned: Tensor | None = None
        if offset is None:
            self._pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self.put(tensor)

    def put(self, tensor: Tensor) -> None:
        if self._pinned is not None:
            self._pinned.copy_(tensor)
        elif self._offset is not None:
            self._spill.write(self._offset, tensor)

    def get(self) -> Tensor:
        if self._pinned is not None:
            return self._pinned.to(self._device, copy=True)
        assert self._offset is not None
        size = self._shape.numel() * self._dtype.itemsize
        data = torch.frombuffer(self._spill.read(self._offset, size), dtype=self._dtype)
        return data.view(self._shape).to(self._device)


def _nameless(folder: Path) -> int:
    """A file descriptor of a file that no folder lists."""
    fd, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=".tmp")  # see files.is_temporary
    os.unlink(name)
    return fd
