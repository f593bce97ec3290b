"""The integer and FP8 layouts of compressed-tensors, as written by any tool.

Per linear [rows, columns]:
pack-quantized: weight_packed int32 [rows, ⌈columns·bits/32⌉], weight_shape int64 [2], weight_scale, and with a zero
    point weight_zero_point int32 [⌈rows·bits/32⌉, groups], packed along the rows. Codes are stored less their minimum.
int-, float-, naive-quantized: weight int8 or float8_e4m3 [rows, columns], weight_scale, weight_zero_point int8.
weight_scale is [1] per tensor, [rows, 1] per channel, [rows, groups], or [⌈rows/h⌉, ⌈columns/w⌉] for blocks of h × w.
weight_g_idx int32 [columns] names the group of every column when they are out of order.

Rounding, as where transformers loads the file in some precision: the scales are rounded to it, then the product is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmpare.compress.checkpoint.read import Checkpoint, TensorInfo
from llmpare.compress.errors import InputError
from llmpare.compress.formats.reading.groups import Group, groups_of
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

_WORD = 32
_BYTES = {"I8": "int", "F8_E4M3": "float"}
_SCALES = ("weight_scale", "weight_zero_point", "weight_g_idx")
_MISMATCH = "config.json and the weights do not belong together"


def find(checkpoint: Checkpoint, leaves: Mapping[str, Leaves], quantization: Mapping[str, Any]) -> list[Packed]:
    """Every module with packed or scaled weights. Raises InputError naming what is missing, amiss or unreadable."""
    groups = groups_of(quantization)
    found: list[Packed] = []
    for name, there in leaves.items():
        nearest = sorted(groups, key=lambda group: group.rank(name))
        if "bitmask" in there:
            raise InputError(f"{name} is stored as a sparse bitmask, which cannot be read")
        if "weight_packed" in there:
            found.append(_words(checkpoint, name, there, nearest))
        elif "weight" in there and ("weight_scale" in there or there["weight"].dtype in _BYTES):
            found.append(_bytes(checkpoint, name, there, nearest))
    return found


@dataclass(frozen=True)
class Packing:
    """How codes lie in 32-bit words. aligned: no code is split between two of them, as before version 0.18."""

    bits: int
    aligned: bool

    def words(self, count: int) -> int:
        """Words for that many codes."""
        return -(-count // (_WORD // self.bits)) if self.aligned else -(-count * self.bits // _WORD)

    def unpack(self, packed: "Tensor", count: int) -> "Tensor":
        """int32 [n, words] → uint8 [n, count]."""
        import torch

        from llmpare.compress.formats.packing import unpack

        if not self.aligned:
            return unpack(packed, self.bits, count)
        shifts = range(0, _WORD - self.bits + 1, self.bits)
        codes = [(packed >> shift).bitwise_and_(2**self.bits - 1).to(torch.uint8) for shift in shifts]
        return torch.stack(codes, dim=-1).flatten(1)[:, :count]


@dataclass(frozen=True)
class CompressedTensors(Packed):
    """See the top of this file. packing: None when codes are bytes."""

    group: Group
    packing: Packing | None

    def decode(self, tensors: "Mapping[str, Tensor]", dtype: "torch.dtype") -> "Tensor":
        """The weight [rows, columns]."""
        scale = finite(self.parts["weight_scale"], tensors["weight_scale"].to(dtype))
        zero = self._zero(tensors, scale)
        index = self._index(tensors)
        per_row = (self._per_row(scale), None if zero is None else self._per_row(zero))
        return dequantize(self._codes(tensors), *per_row, index, dtype)

    def _codes(self, tensors: "Mapping[str, Tensor]") -> "Tensor":
        if self.packing is None:
            return tensors["weight"]
        return self.packing.unpack(tensors["weight_packed"], self.columns)

    def _zero(self, tensors: "Mapping[str, Tensor]", scale: "Tensor") -> "Tensor | None":
        """What to take off the codes, in the shape of the scales."""
        import torch

        stored = tensors.get("weight_zero_point")
        if self.packing is None:
            return stored if stored is None else stored.float()
        middle = 1 << (self.packing.bits - 1)
        if stored is None:
            return torch.full_like(scale, middle)
        if stored.dtype == torch.int8:
            return stored.float() + middle
        zero: Tensor = self.packing.unpack(stored.t().contiguous(), self.rows).t().float()
        return zero

    def _per_row(self, values: "Tensor") -> "Tensor":
        """[rows, groups] of what there is one of per tensor, row, group or block."""
        values = values.reshape(len(values), -1) if values.ndim else values.reshape(1, 1)
        if self.group.block is not None:
            return values.repeat_interleave(self.group.block[0], 0)[: self.rows]
        return values.expand(self.rows, -1)

    def _index(self, tensors: "Mapping[str, Tensor]") -> "Tensor | None":
        """The group of every column; None for runs of equal length."""
        import torch

        width = self.group.block[1] if self.group.block is not None else self.group.group_size
        if width is None:
            return None
        groups = -(-self.columns // width)
        named = tensors.get("weight_g_idx")
        if named is not None and not bool((named == -1).all()):  # −1: never set, so in order
            return grouped(self.parts["weight_g_idx"], named, groups, self.columns)
        return None if self.columns == groups * width else torch.arange(self.columns) // width


def _words(checkpoint: Checkpoint, name: str, leaves: Leaves, groups: list[Group]) -> CompressedTensors:
    """A linear whose codes are packed, in the first scheme that its sizes agree with."""
    rows, words = expect_matrix(leaves["weight_packed"], "I32")
    columns = _stored_columns(checkpoint, need(name, leaves, "weight_shape"), rows)
    for group in groups:
        for packing in (Packing(group.bits, False), Packing(group.bits, True)):
            if group.kind == "int" and packing.words(columns) == words:
                return _linear(checkpoint, name, leaves, group, rows, columns, packing)
    widths = " or ".join(str(group.bits) for group in groups)
    raise InputError(f"{name}.weight_packed has {words} words for {columns} columns of {widths} bits", _MISMATCH)


def _stored_columns(checkpoint: Checkpoint, shape: TensorInfo, rows: int) -> int:
    """Packed words are padded, so only this tensor of two integers knows the number of columns."""
    expect(shape, ("I64", "I32"), (2,))
    data = checkpoint.read(shape.name)
    half = len(data) // 2
    sizes = [int.from_bytes(part, "little", signed=True) for part in (data[:half], data[half:])]
    if sizes[0] != rows or sizes[1] < 1:
        raise InputError(f"{shape.name} holds {sizes}, but {rows} rows are stored", "download the model again")
    return sizes[1]


def _bytes(checkpoint: Checkpoint, name: str, leaves: Leaves, groups: list[Group]) -> CompressedTensors:
    """A linear whose codes are bytes, in the first scheme of that type."""
    weight = leaves["weight"]
    if weight.dtype not in _BYTES:
        raise InputError(
            f"{weight.name} is {weight.dtype} with a scale beside it: it was saved before it was compressed",
            "save the model compressed, or dense without scales",
        )
    rows, columns = expect_matrix(weight, *_BYTES)
    group = next((group for group in groups if group.kind == _BYTES[weight.dtype]), None)
    if group is None:
        raise InputError(f"{weight.name} is {weight.dtype}, and no scheme in config.json is", _MISMATCH)
    return _linear(checkpoint, name, leaves, group, rows, columns, None)


def _linear(
    checkpoint: Checkpoint,
    name: str,
    leaves: Leaves,
    group: Group,
    rows: int,
    columns: int,
    packing: Packing | None,
) -> CompressedTensors:
    scale = need(name, leaves, "weight_scale")
    expect(scale, FLOATS, *group.scale_shapes(rows, columns))
    if not group.symmetric or "weight_zero_point" in leaves:
        zero = need(name, leaves, "weight_zero_point")
        if packing is not None and zero.dtype == "I32":
            expect(zero, ("I32",), (packing.words(rows), scale.shape[1] if len(scale.shape) == 2 else 1))
        else:
            expect(zero, ("I8",), scale.shape)
    if "weight_g_idx" in leaves:
        expect(leaves["weight_g_idx"], ("I32", "I64"), (columns,))
    codes = ("weight",) if packing is None else ("weight_packed", "weight_shape")
    return CompressedTensors(
        name=name,
        parts={leaf: leaves[leaf] for leaf in (*codes, *_SCALES) if leaf in leaves},
        rows=rows,
        columns=columns,
        dtype=dense_dtype(checkpoint.config, scale),
        scheme=group.scheme,
        transposed=False,
        group=group,
        packing=packing,
    )
