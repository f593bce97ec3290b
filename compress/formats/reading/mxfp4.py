"""Experts in MXFP4, as gpt-oss is published (quant_method "mxfp4").

Per fused matrix of all experts [experts, columns, rows], as the model keeps it: `…_blocks` uint8 [experts, rows,
columns / 32, 16] with two E2M1 numbers per byte, the first in the low nibble, and `…_scales` uint8 [experts, rows,
columns / 32], exponents of two less 127 (E8M0). Every product is exact in bfloat16: nothing is rounded.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.errors import InputError
from llmpare.compress.formats.reading.packed import Leaves, Packed, dense_dtype, expect, need, strips

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BLOCK, _BYTES = 32, 16
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127


def find(checkpoint: Checkpoint, leaves: Mapping[str, Leaves], quantization: Mapping[str, Any]) -> list[Packed]:
    """Every matrix stored as blocks and scales. Raises InputError naming what is missing or amiss."""
    return [
        _experts(checkpoint, module, found, leaf.removesuffix("_blocks"))
        for module, found in leaves.items()
        for leaf in found
        if leaf.endswith("_blocks")
    ]


class Mxfp4(Packed):
    """See the top of this file. rows: of all experts together."""

    @property
    def weight(self) -> str:
        """A parameter by itself: there is no module with a `.weight`."""
        return self.name

    @property
    def shape(self) -> tuple[int, ...]:
        """[experts, columns, rows of one]."""
        experts = self.parts["blocks"].shape[0]
        return (experts, self.columns, self.rows // experts)

    def decode(self, tensors: "Mapping[str, Tensor]", dtype: "torch.dtype") -> "Tensor":
        """The weights [experts, columns, rows of one]."""
        import torch

        codes, numbers = torch.arange(256), torch.tensor([*_E2M1, *(-value for value in _E2M1)])
        pairs = torch.stack((numbers[codes & 15], numbers[codes >> 4]), dim=-1).view(torch.int64).flatten()
        powers = torch.ldexp(torch.ones(256), codes - _BIAS)
        blocks, scales = tensors["blocks"], tensors["scales"]
        weight = torch.empty(self.shape, dtype=dtype)
        for expert, own in enumerate(weight):
            for part in strips(blocks.shape[1], self.columns):
                decoded = pairs[blocks[expert, part].int()].view(torch.float32)
                decoded.mul_(powers[scales[expert, part].int()].unsqueeze(-1))
                own[:, part] = decoded.flatten(1).to(dtype).t()
        return weight


def _experts(checkpoint: Checkpoint, module: str, leaves: Leaves, name: str) -> Mxfp4:
    blocks, scales = leaves[f"{name}_blocks"], need(module, leaves, f"{name}_scales")
    if len(blocks.shape) != 4 or not math.prod(blocks.shape):
        raise InputError(f"{blocks.name} has shape {list(blocks.shape)}, expected four dimensions that are not empty")
    expect(blocks, ("U8",), (*blocks.shape[:3], _BYTES))
    expect(scales, ("U8",), blocks.shape[:3])
    experts, rows, groups, _ = blocks.shape
    return Mxfp4(
        name=f"{module}.{name}",
        parts={"blocks": blocks, "scales": scales},
        rows=experts * rows,
        columns=groups * _BLOCK,
        dtype=dense_dtype(checkpoint.config, scales),
        scheme="experts",
        transposed=False,
    )
