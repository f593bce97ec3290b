"""The "gemm" layout of AutoAWQ, 4 bits.

Per linear [rows, columns]: qweight int32 [columns, rows/8] and qzeros int32 [groups, rows/8], both packed along the
output, scales [groups, rows]. Of the eight values in a word the lowest four bits hold the first, then come the third,
fifth and seventh, then the second, fourth, sixth and eighth. Zero points are stored as they are; groups are
consecutive columns.

Rounding: (code − zero point) · scale is formed exactly, with the scales as they are stored, and rounded once.
"""

from collections.abc import Mapping
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

_BITS = 4
_IN_WORD = 32 // _BITS
_SLOT = [0, 4, 1, 5, 2, 6, 3, 7]  # where value i of a word lies


def find(checkpoint: Checkpoint, leaves: Mapping[str, Leaves], quantization: Mapping[str, Any]) -> list[Packed]:
    """Every module that has a qweight. Raises InputError for other layouts, and naming what is missing or amiss."""
    layout = quantization.get("version", "gemm")
    bits = quantization.get("bits", quantization.get("w_bit"))
    if str(layout).lower() != "gemm" or bits != _BITS:
        raise InputError(
            f"the AWQ checkpoint has {clipped(bits)} bits in the layout {clipped(repr(layout))}, which cannot be read",
            "4 bits in the layout 'gemm' can",
        )
    return [_linear(checkpoint, name, found) for name, found in leaves.items() if "qweight" in found]


class Awq(Packed):
    """See the top of this file."""

    def decode(self, tensors: "Mapping[str, Tensor]", dtype: "torch.dtype") -> "Tensor":
        """The weight [rows, columns]."""
        codes = _unpack(tensors["qweight"]).t().contiguous()
        zero = _unpack(tensors["qzeros"]).t().float()
        scale = finite(self.parts["scales"], tensors["scales"]).t()
        return dequantize(codes, scale, zero, None, dtype)


def _unpack(packed: "Tensor") -> "Tensor":
    """int32 [n, words] → uint8 [n, 8 · words]."""
    from llmpare.compress.formats.packing import unpack

    codes = unpack(packed, _BITS, packed.shape[1] * _IN_WORD).view(len(packed), -1, _IN_WORD)
    return codes[:, :, _SLOT].flatten(1)


def _linear(checkpoint: Checkpoint, name: str, leaves: Leaves) -> Awq:
    columns, words = expect_matrix(need(name, leaves, "qweight"), "I32")
    groups, rows = expect_matrix(need(name, leaves, "scales"), *FLOATS)
    if columns % groups:
        raise InputError(f"{name}.scales has {groups} groups, which do not divide {columns} columns")
    expect(leaves["scales"], FLOATS, (groups, words * _IN_WORD))
    expect(need(name, leaves, "qzeros"), ("I32",), (groups, words))
    return Awq(
        name=name,
        parts={leaf: leaves[leaf] for leaf in ("qweight", "qzeros", "scales")},
        rows=rows,
        columns=columns,
        dtype=dense_dtype(checkpoint.config, leaves["scales"]),
        scheme=f"W4A16_ASYM {'channel' if groups == 1 else f'g{columns // groups}'}",
        transposed=False,
    )
