"""FP8 weights with scales by block, as DeepSeek publishes its models (quant_method "fp8").

Per linear [rows, columns]: weight float8_e4m3 [rows, columns], weight_scale_inv float32 [⌈rows/h⌉, ⌈columns/w⌉] for
blocks of h × w (weight_block_size), or one for all without blocks. Despite its name it is what to multiply by.

Rounding: the product is formed in float32 with the scales as they are stored, and rounded once, as where transformers
decodes such a model because the device has no FP8. Kernels that have it quantize activations, too; that is not
simulated, and the scheme says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmpare.compress.checkpoint.files import clipped
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.errors import InputError
from llmpare.compress.formats.reading.packed import (
    FLOATS,
    Leaves,
    Packed,
    dense_dtype,
    dequantize,
    expect,
    expect_matrix,
    finite,
    need,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def find(checkpoint: Checkpoint, leaves: Mapping[str, Leaves], quantization: Mapping[str, Any]) -> list[Packed]:
    """Every module with an FP8 weight. Raises InputError naming what is missing or amiss."""
    block = quantization.get("weight_block_size")
    sizes = block if isinstance(block, list) else [0]
    if block is not None and (len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes)):
        raise InputError(f"quantization_config: weight_block_size is {clipped(block)}, expected two sizes")
    return [
        _linear(checkpoint, name, found, None if block is None else (sizes[0], sizes[1]))
        for name, found in leaves.items()
        if "weight_scale_inv" in found or ("weight" in found and found["weight"].dtype.startswith("F8"))
    ]


@dataclass(frozen=True)
class Fp8(Packed):
    """See the top of this file. block: rows × columns per scale."""

    block: tuple[int, int]

    def decode(self, tensors: "Mapping[str, Tensor]", dtype: "torch.dtype") -> "Tensor":
        """The weight [rows, columns]."""
        import torch

        height, width = self.block
        scale = finite(self.parts["weight_scale_inv"], tensors["weight_scale_inv"])
        scale = scale.reshape(-(-self.rows // height), -1).repeat_interleave(height, 0)[: self.rows]
        return dequantize(tensors["weight"], scale, None, torch.arange(self.columns) // width, dtype)


def _linear(checkpoint: Checkpoint, name: str, leaves: Leaves, block: tuple[int, int] | None) -> Fp8:
    rows, columns = expect_matrix(need(name, leaves, "weight"), "F8_E4M3")
    scale = need(name, leaves, "weight_scale_inv")
    if block is None:
        expect(scale, FLOATS, (), (1,), (1, 1))
    else:
        expect(scale, FLOATS, (-(-rows // block[0]), -(-columns // block[1])))
    return Fp8(
        name=name,
        parts={leaf: leaves[leaf] for leaf in ("weight", "weight_scale_inv")},
        rows=rows,
        columns=columns,
        dtype=dense_dtype(checkpoint.config, scale),
        scheme=f"{'tensor' if block is None else f'{block[0]}x{block[1]}'}, weights only",
        transposed=False,
        block=block or (rows, columns),
    )
