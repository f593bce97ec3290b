"""A checkpoint seen as dense tensors, whatever it is stored as; one tensor is decoded at a time, when it is asked for.

Packed linears appear under the name their weight has in the model, `<module>.weight`; everything else as it is.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmpare.compress.checkpoint.header import tensor_bytes
from llmpare.compress.checkpoint.read import QUANTIZATION, Checkpoint, TensorInfo
from llmpare.compress.errors import InputError
from llmpare.compress.formats import reading
from llmpare.compress.formats.reading.packed import Packed

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class DenseSource:
    """An open checkpoint as dense tensors. Made by `open_dense`.

    checkpoint: the files themselves, with the digests of all that was read. config: config.json without what it says
    of quantization. tensors: by name, in the order of the file; of a decoded tensor start and end say how large it is,
    not where it lies. scheme: 'dense', 'compressed-tensors W4A16 g128', 'gptq v1 W4A16 g128', the most frequent of
    several first.
    """

    def __init__(self, checkpoint: Checkpoint, stored: str, packed: list[Packed]) -> None:
        self.checkpoint = checkpoint
        self.folder: Path = checkpoint.folder
        self.config = {key: value for key, value in checkpoint.config.items() if key not in QUANTIZATION}
        self.packed = {linear.weight: linear for linear in packed}
        self.tensors = _dense(checkpoint.tensors, packed)
        schemes = Counter(linear.scheme for linear in packed).most_common()
        self.scheme = " ".join((stored, ", ".join(scheme for scheme, _ in schemes))).strip()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(info.nbytes for info in self.checkpoint.tensors.values())

    @property
    def parameters(self) -> int:
        """Values of all dense tensors."""
        return sum(info.numel for info in self.tensors.values())

    @property
    def linear_bits(self) -> float | None:
        """Bits on disk per weight of the packed linears, scales and zero points included; None if there are none."""
        weights = sum(linear.rows * linear.columns for linear in self.packed.values())
        return 8 * sum(linear.nbytes for linear in self.packed.values()) / weights if weights else None

    def tensor(self, name: str, dtype: "torch.dtype | None" = None) -> "Tensor":
        """One tensor on the CPU; safe in any thread.

        dtype: the precision it will be used in, float32 if not given. A decoded weight comes in it, rounded as loaders
        of its format round; any other tensor comes as it is stored. Raises InputError when the file ends early or has
        changed, and for scales that are no numbers.
        """
        import torch

        from llmpare.compress.checkpoint.tensors import from_info

        linear = self.packed.get(name)
        if linear is None:
            return from_info(self.checkpoint.read(name), self.checkpoint.tensors[name])
        parts = {leaf: from_info(self.checkpoint.read(info.name), info) for leaf, info in linear.parts.items()}
        weight = linear.decode(parts, dtype or torch.float32)
        return weight.t().contiguous() if linear.transposed else weight


@contextmanager
def open_dense(folder: Path) -> Iterator[DenseSource]:
    """Opens the checkpoint in `folder`, reading headers and the stored sizes of packed weights only.

    Raises UsageError when there is no such folder, and InputError by name for what is quantized in a way that cannot
    be decoded exactly, for tensors that are missing or have the wrong type or shape, and for broken files.
    """
    with Checkpoint.open(folder) as checkpoint:
        yield DenseSource(checkpoint, *reading.find(checkpoint))


def _dense(stored: Mapping[str, TensorInfo], packed: list[Packed]) -> dict[str, TensorInfo]:
    """Every weight takes the place of the first of its parts."""
    owner = {info.name: linear for linear in packed for info in linear.parts.values()}
    twice = [linear.weight for linear in packed if linear.weight in stored and linear.weight not in owner]
    if twice:
        raise InputError(f"{twice[0]} is there twice, packed and dense", "download the model again")
    found: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        linear = owner.get(name)
        if linear is None:
            found[name] = info
        elif linear.weight not in found:
            size = tensor_bytes(linear.dtype, linear.shape)
            found[linear.weight] = TensorInfo(linear.weight, linear.dtype, linear.shape, info.shard, 0, size)
    return found
