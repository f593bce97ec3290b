"""A linear whose weight is stored as several tensors: what every reader finds, and the checks they share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmpare.compress.checkpoint.read import Checkpoint, TensorInfo
from llmpare.compress.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Leaves = Mapping[str, TensorInfo]  # the tensors of one module, by what follows its name

FLOATS = ("F32", "F16", "BF16")
_CONFIG_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_HINT = "download the model again"
_AT_ONCE = 1 << 20  # weights
DECODING = 48 * _AT_ONCE  # bytes that decoding so many takes beside the result, at most


@dataclass(frozen=True)
class Packed(ABC):
    """One linear. name: of its module in the checkpoint. parts: the tensors its weight is made of, by leaf.

    rows × columns is output × input features. dtype: of the dense weight, as safetensors spells it. scheme: the
    field's name for how it is stored. transposed: the model keeps the weight as [columns, rows] (Conv1D).
    """

    name: str
    parts: Leaves
    rows: int
    columns: int
    dtype: str
    scheme: str
    transposed: bool

    @property
    def weight(self) -> str:
        """Name of the tensor that takes the place of the parts."""
        return f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight, as the model keeps it."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of the parts on disk."""
        return sum(info.nbytes for info in self.parts.values())

    @abstractmethod
    def decode(self, tensors: "Mapping[str, Tensor]", dtype: "torch.dtype") -> "Tensor":
        """The weight [rows, columns] in `dtype` made of `parts`, given by leaf. Raises InputError."""


def modules(checkpoint: Checkpoint) -> dict[str, dict[str, TensorInfo]]:
    """The checkpoint's tensors by module and leaf."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        found.setdefault(module, {})[leaf] = info
    return found


def dense_dtype(config: Mapping[str, Any], scale: TensorInfo) -> str:
    """The dtype the dense weight counts as: the model's, as loaders have it, else that of the scales."""
    named = str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.")
    return _CONFIG_DTYPES.get(named, scale.dtype if scale.dtype in FLOATS else "F32")


def need(module: str, leaves: Leaves, leaf: str) -> TensorInfo:
    """A tensor that must be there. Raises InputError."""
    if leaf not in leaves:
        raise InputError(f"{module}.{leaf} is missing; beside it there is {', '.join(sorted(leaves))}", _HINT)
    return leaves[leaf]


def expect(info: TensorInfo, dtypes: Sequence[str], *shapes: tuple[int, ...]) -> None:
    """Raises InputError unless the tensor has one of those dtypes and one of those shapes."""
    if info.dtype not in dtypes:
        raise InputError(f"{info.name} is {info.dtype}, expected {' or '.join(dtypes)}", _HINT)
    if info.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise InputError(f"{info.name} has shape {list(info.shape)}, expected {expected}", _HINT)


def expect_matrix(info: TensorInfo, *dtypes: str) -> tuple[int, int]:
    """The sizes of a tensor of two dimensions that holds something. Raises InputError."""
    if len(info.shape) != 2 or not math.prod(info.shape):
        raise InputError(f"{info.name} has shape {list(info.shape)}, expected two dimensions that are not empty", _HINT)
    expect(info, dtypes, info.shape)
    return info.shape[0], info.shape[1]


def finite(info: TensorInfo, scale: "Tensor") -> "Tensor":
    """The scales in float32. Raises InputError when one is NaN or infinite: the weight would be, too."""
    scale = scale.float()
    if not scale.isfinite().all():
        raise InputError(f"{info.name} holds NaN or infinite scales", _HINT)
    return scale


def grouped(info: TensorInfo, index: "Tensor", groups: int, columns: int) -> "Tensor | None":
    """The group of every column (g_idx), as an index; None when groups are runs of equal length, which is faster.

    Raises InputError for an index of a group that does not exist.
    """
    import torch

    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise InputError(
            f"{info.name} names groups {int(index.min())} to {int(index.max())}, there are 0 to {groups - 1}", _HINT
        )
    runs = columns % groups == 0 and torch.equal(index.long(), torch.arange(columns) // (columns // groups))
    return None if runs else index.long()


def strips(rows: int, columns: int) -> Iterator[slice]:
    """Runs of rows that are decoded at once, so that it takes little memory beside the result: see DECODING."""
    step = max(1, _AT_ONCE // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def dequantize(
    codes: "Tensor", scale: "Tensor", zero: "Tensor | None", index: "Tensor | None", dtype: "torch.dtype"
) -> "Tensor":
    """(code − zero point) · scale, formed in float32 and rounded to `dtype`, [rows, columns].

    codes [rows, columns] of any type; scale and zero [rows, groups] float32; index [columns]: the group of every
    column, None for runs of equal length. Codes of 8 bits less their zero point are exact in every float type, and
    so is their product with a scale of 16 bits in float32: rounded to the type of the scale, it is the product that
    loaders form in that type.
    """
    import torch

    weight = torch.empty(codes.shape, dtype=dtype)
    for part in strips(*codes.shape):
        own = codes[part].float()
        runs = own.view(len(own), scale.shape[1], -1) if index is None else own
        if zero is not None:
            runs.sub_(_of_columns(zero[part], index))
        runs.mul_(_of_columns(scale[part], index))
        weight[part] = own
    return weight


def _of_columns(values: "Tensor", index: "Tensor | None") -> "Tensor":
    """What there is one of per group, [rows, groups], in the shape that columns are in."""
    return values.unsqueeze(-1) if index is None else values[:, index]
