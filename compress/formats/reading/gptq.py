"""The GPTQ layout, v1 (zero point − 1 is stored) and v2 (stored as it is), as written by any tool.

Per linear [rows, columns]: qweight int32 [columns·bits/32, rows] packed along the input, qzeros int32
[groups, rows·bits/32] packed along the output, scales [groups, rows], g_idx int32 [columns]. Every column has the
group that g_idx gives it, whatever desc_act says, as in GPTQModel; without g_idx groups are consecutive columns.

Rounding: (code − zero point) · scale is formed exactly, with the scales as they are stored, and rounded once.
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
    grouped,
    need,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BITS = (2, 3, 4, 8)
# Families that keep their linears as Conv1D. A packed weight does not tell: it is stored alike for both.
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_VERSIONS = {"gptq": "v1", "gptq_v2": "v2"}


def version(quantization: Mapping[str, Any]) -> str:
    """'v1' or 'v2'. Raises InputError for packings that only one kernel knows (Marlin, BitBLAS)."""
    stored = "marlin" if quantization.get("is_marlin_format") else quantization.get("checkpoint_format", "gptq")
    found = _VERSIONS.get(str(stored))
    if found is None:
        raise InputError(
            f"the GPTQ checkpoint is packed as {clipped(repr(stored))}, which cannot be read",
            f"checkpoint_format {' and '.join(_VERSIONS)} can",
        )
    return found


def find(checkpoint: Checkpoint, leaves: Mapping[str, Leaves], quantization: Mapping[str, Any]) -> list[Packed]:
    """Every module that has a qweight, the head included. Raises InputError naming what is missing or amiss."""
    less = 1 if version(quantization) == "v1" else 0
    return [
        _linear(checkpoint, name, found, quantization, less) for name, found in leaves.items() if "qweight" in found
    ]


@dataclass(frozen=True)
class Gptq(Packed):
    """See the top of this file. less: what is added to a stored zero point."""

    bits: int
    less: int

    def decode(self, tensors: "Mapping[str, Tensor]", dtype: "torch.dtype") -> "Tensor":
        """The weight [rows, columns]."""
        from llmpare.compress.formats.packing import unpack

        codes = unpack(tensors["qweight"].t().contiguous(), self.bits, self.columns)
        zero = unpack(tensors["qzeros"], self.bits, self.rows).float().t() + self.less
        scale = finite(self.parts["scales"], tensors["scales"]).t()
        index = None
        if "g_idx" in tensors:
            index = grouped(self.parts["g_idx"], tensors["g_idx"], scale.shape[1], self.columns)
        return dequantize(codes, scale, zero, index, dtype)


def _linear(checkpoint: Checkpoint, name: str, leaves: Leaves, quantization: Mapping[str, Any], less: int) -> Gptq:
    words, rows = expect_matrix(need(name, leaves, "qweight"), "I32")
    groups, _ = expect_matrix(need(name, leaves, "scales"), *FLOATS)
    configured = quantization.get("bits", quantization.get("w_bit"))
    columns = _columns(leaves, words, configured)
    bits = next((bits for bits in BITS if columns * bits == 32 * words), None)
    # Single modules may have bits of their own, under "dynamic".
    if bits is None or (bits != configured and not quantization.get("dynamic")):
        raise InputError(
            f"{name}.qweight has shape {[words, rows]}, which is not {columns} columns of {clipped(configured)} bits",
            "config.json and the weights do not belong together",
        )
    if "g_idx" in leaves:
        expect(leaves["g_idx"], ("I32", "I64"), (columns,))
    elif columns % groups:
        raise InputError(f"{name}.g_idx is missing, and {groups} groups do not divide {columns} columns")
    expect(leaves["scales"], FLOATS, (groups, rows))
    expect(need(name, leaves, "qzeros"), ("I32",), (groups, -(-rows * bits // 32)))
    parts = {leaf: leaves[leaf] for leaf in ("qweight", "qzeros", "scales", "g_idx") if leaf in leaves}
    kind = f"W{bits}A16{'' if quantization.get('sym', True) else '_ASYM'}"
    return Gptq(
        name=name,
        parts=parts,
        rows=rows,
        columns=columns,
        dtype=dense_dtype(checkpoint.config, leaves["scales"]),
        scheme=f"{kind} {'channel' if groups == 1 else f'g{-(-columns // groups)}'}",
        transposed=checkpoint.config.get("model_type") in CONV1D and name != "lm_head",
        bits=bits,
        less=less,
    )


def _columns(leaves: Leaves, words: int, bits: object) -> int:
    """Input features: what g_idx counts, else what the bits of the config make of the words."""
    if "g_idx" in leaves:
        return leaves["g_idx"].numel
    return 32 * words // bits if isinstance(bits, int) and bits in BITS else 0
