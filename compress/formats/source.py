"""The checkpoint a run starts from. One whose makers publish it in FP8 or MXFP4 is seen as the dense model it stands
for, decoded a tensor at a time; one that was made smaller after the fact, by integers, is refused where all are.
"""

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llmpare.compress.checkpoint.read import Checkpoint, quantization_of
from llmpare.compress.formats import reading
from llmpare.compress.formats.decoded import DenseSource
from llmpare.compress.formats.reading.packed import DECODING, modules

_ACTIVATIONS = ("input_activations", "output_activations")
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "activation_scale")


class LowPrecision(Checkpoint):
    """A checkpoint in FP8 or MXFP4 as a dense one.

    tensors, config and read: of the model it stands for. digests, weight_bytes: of what is on disk.
    """

    def __init__(self, dense: DenseSource) -> None:
        stale = {f"{linear.name}.{leaf}" for linear in dense.packed.values() for leaf in _OF_ACTIVATIONS}
        tensors = {name: info for name, info in dense.tensors.items() if name not in stale}
        super().__init__(dense.folder, dense.config, {}, tensors)
        self.digests = dense.checkpoint.digests
        self._dense = dense

    @property
    def scheme(self) -> str:
        """See Checkpoint."""
        return self._dense.scheme

    @property
    def weight_bytes(self) -> int:
        """See Checkpoint."""
        return self._dense.weight_bytes

    @property
    def decoding(self) -> int:
        """See Checkpoint."""
        return max((linear.nbytes for linear in self._dense.packed.values()), default=0) + DECODING

    def read(self, name: str) -> bytearray | memoryview:
        """The bytes of one tensor in the precision that `tensors` says, decoded if need be; safe in any thread."""
        if name not in self._dense.packed:
            return self._dense.checkpoint.read(name)
        from llmpare.compress.checkpoint.tensors import DTYPES, to_bytes

        data = to_bytes(self._dense.tensor(name, DTYPES[self.tensors[name].dtype]))
        self.bytes_read = self._dense.checkpoint.bytes_read
        return data

    def hash(self) -> None:
        """See Checkpoint; of what `read` would look at."""
        packed = [self._dense.packed[name] for name in self.tensors if name in self._dense.packed]
        parts = [info.name for linear in packed for info in linear.parts.values()]
        self._dense.checkpoint.hash_all([*parts, *(self.tensors.keys() - self._dense.packed.keys())])

    def digest(self, name: str) -> str:
        """One for all the tensors that a decoded one is made of."""
        linear = self._dense.packed.get(name)
        if linear is None:
            return super().digest(name)
        text = "".join(f"{leaf} {self.digests[info.name]}\n" for leaf, info in linear.parts.items())
        return hashlib.sha256(text.encode()).hexdigest()

    def check_unchanged(self) -> None:
        """See Checkpoint."""
        self._dense.checkpoint.check_unchanged()

    def close(self) -> None:
        """See Checkpoint."""
        self._dense.checkpoint.close()


def open_source(folder: Path) -> Checkpoint:
    """Opens the checkpoint in `folder`; see Checkpoint.open. Raises InputError for broken FP8 and MXFP4."""
    with ExitStack() as on_failure:
        checkpoint = on_failure.enter_context(Checkpoint.open(folder))
        opened = _decoded(checkpoint)
        on_failure.pop_all()
    return opened


def _decoded(checkpoint: Checkpoint) -> Checkpoint:
    quantization = quantization_of(checkpoint.config)
    if not isinstance(quantization, Mapping):
        return checkpoint
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        if not _is_float(quantization):
            return checkpoint
        quantization = _weights_only(quantization)
    elif method not in ("fp8", "mxfp4"):
        return checkpoint
    packed = reading.READERS[method](checkpoint, modules(checkpoint), quantization)
    return LowPrecision(DenseSource(checkpoint, method, packed))


def _is_float(quantization: Mapping[str, Any]) -> bool:
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return False
    weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
    return len(weights) == len(groups) and all(
        isinstance(each, Mapping) and each.get("type") == "float" and each.get("num_bits") == 8 for each in weights
    )


def _weights_only(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """What servers do to activations besides is no property of the weights that the run starts from."""
    groups = {
        name: {key: value for key, value in group.items() if key not in _ACTIVATIONS}
        for name, group in quantization["config_groups"].items()
    }
    return {**quantization, "config_groups": groups}
