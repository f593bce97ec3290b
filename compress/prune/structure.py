"""What feeds what in a block: which rows and columns of which tensors belong to one FFN channel or one KV group.

No torch and no list of models. Linears under one parent (`…self_attn`, `…mlp`) work together: one of them *writes* to
the residual stream, the others *read* from it, and unit u of what lies between is a run of the writer's columns and of
the readers' rows. Fused readers hold several such runs: gate and up, or query, key and value. What looks otherwise is
refused by name, and what was found is checked on the model before it is relied on (shrink.check).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmpare.compress.checkpoint.read import TensorInfo
from llmpare.compress.errors import UnsupportedError
from llmpare.compress.model.layout import Layout, Linear, find

HIDDEN = ("hidden_size", "n_embd", "d_model")
CHANNELS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff")
HEADS = ("num_attention_heads", "n_head", "n_heads")
KV_HEADS = ("num_key_value_heads",)

_QUERY = re.compile(r"(^|[._])(q|query|qkv|c_attn|wqkv)", re.IGNORECASE)
_KEY = re.compile(r"(^|[._])(k|v|key|value)_?(proj)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Run:
    """Where a tensor's rows of all units lie: those of unit u are start + u·size … start + (u + 1)·size − 1."""

    start: int
    size: int


@dataclass(frozen=True)
class Units:
    """What lies between readers and writer: `count` FFN channels or KV groups of one block.

    columns: of the writer, per unit, in order. rows: tensor name → its runs; weights and biases of all readers.
    """

    writer: Linear
    count: int
    columns: int
    rows: Mapping[str, tuple[Run, ...]]

    def kept_columns(self, units: Sequence[int]) -> list[int]:
        """The writer's columns that belong to these units."""
        return [u * self.columns + i for u in units for i in range(self.columns)]

    def kept_rows(self, name: str, units: Sequence[int]) -> list[int]:
        """The rows of a reader's tensor that belong to these units, each run in its order."""
        return [run.start + u * run.size + i for run in self.rows[name] for u in units for i in range(run.size)]


def mask_of(kept: Sequence[int]) -> str:
    """Numbers of units as a hexadecimal number: bit u, from the least, is set if unit u is among them."""
    return f"{sum(1 << u for u in kept):x}"


def kept_of(mask: str) -> list[int]:
    """The numbers again, ascending."""
    return [u for u, bit in enumerate(reversed(f"{int(mask, 16):b}")) if bit == "1"]


def hidden_size(config: Mapping[str, Any], found: Layout) -> int:
    """Channels of the residual stream."""
    size: int = find(config, *HIDDEN, default=min(linear.columns for linear in found.linears))
    return size


def of_block(
    found: Layout, index: int, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], kind: str
) -> Units:
    """The units of one kind, 'ffn' or 'heads', in one block. Raises UnsupportedError, naming what is in the way."""
    attention, feed_forward = _split(found, index)
    if kind == "ffn":
        return _ffn(found, feed_forward, hidden_size(config, found), tensors)
    return _heads(found, attention, config, tensors)


def residual_axes(
    found: Layout, hidden: int, units: Sequence[Units], tensors: Mapping[str, TensorInfo], name: str
) -> list[int]:
    """The axes of a tensor that run over residual channels. units: of the tensor's block, none if it is in no block."""
    shape = tensors[name].shape
    for part in units:
        stored = part.writer.transposed
        if name == part.writer.weight:
            return [1 if stored else 0]
        if name in part.rows:
            return [] if len(shape) == 1 else [0 if stored else 1]
    if len(shape) == 1:
        return [0] if shape[0] == hidden else []
    if not units and len(shape) == 2 and shape[1] == hidden:
        return [1]
    raise _unsupported(found, f"{name} {list(shape)} is neither an embedding nor a linear of its blocks")


def _split(found: Layout, index: int) -> tuple[list[Linear], list[Linear]]:
    """The linears of attention and those of the feed-forward network."""
    linears = found.of_block(index)
    parents = {_parent(linear) for linear in linears if _QUERY.search(_leaf(linear))}
    attention = [linear for linear in linears if _parent(linear) in parents]
    return attention, [linear for linear in linears if _parent(linear) not in parents]


def _ffn(found: Layout, linears: Sequence[Linear], hidden: int, tensors: Mapping[str, TensorInfo]) -> Units:
    writers = [linear for linear in linears if linear.rows == hidden and linear.columns != hidden]
    readers = [linear for linear in linears if linear.columns == hidden]
    if len(writers) != 1 or len(writers) + len(readers) != len(linears) or not readers:
        shapes = ", ".join(f"{n.name} [{n.rows}, {n.columns}]" for n in linears) or "there is none"
        raise _unsupported(found, f"the feed-forward network is not one that can be read off its shapes: {shapes}")
    (writer,) = writers
    rows: dict[str, tuple[Run, ...]] = {}
    for reader in readers:
        pieces, rest = divmod(reader.rows, writer.columns)
        if rest or pieces not in (1, 2):
            raise _unsupported(found, f"{reader.name} has {reader.rows} rows for {writer.columns} channels")
        rows |= _both(reader, tuple(Run(piece * writer.columns, 1) for piece in range(pieces)), tensors)
    _refuse_others(found, writer, readers, {writer.columns}, tensors)
    return Units(writer, writer.columns, 1, rows)


def _heads(
    found: Layout, linears: Sequence[Linear], config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> Units:
    heads: int = find(config, *HEADS, default=0)
    groups: int = find(config, *KV_HEADS, default=heads)
    readers = [n for n in linears if _QUERY.search(_leaf(n)) or _KEY.search(_leaf(n))]
    writers = [linear for linear in linears if linear not in readers]
    if not heads or heads % groups or len(writers) != 1 or writers[0].columns % heads:
        shapes = ", ".join(f"{n.name} [{n.rows}, {n.columns}]" for n in linears) or "there is none"
        raise _unsupported(found, f"attention is not one that can be read off its names and shapes: {shapes}")
    writer = writers[0]
    size = writer.columns // heads
    query, key = Run(0, heads // groups * size), size
    rows: dict[str, tuple[Run, ...]] = {}
    for reader in readers:
        if reader.rows == heads * size and _QUERY.search(_leaf(reader)):
            runs: tuple[Run, ...] = (query,)
        elif reader.rows == groups * size and _KEY.search(_leaf(reader)):
            runs = (Run(0, key),)
        elif reader.rows == (heads + 2 * groups) * size and len(readers) == 1:
            runs = _fused(found, reader, heads, groups, size)
        else:
            raise _unsupported(found, f"{reader.name} has {reader.rows} rows for {heads} heads of {size}")
        rows |= _both(reader, runs, tensors)
    _refuse_others(found, writer, readers, {heads, groups, heads * size, groups * size} - {size}, tensors)
    return Units(writer, groups, heads // groups * size, rows)


def _fused(found: Layout, reader: Linear, heads: int, groups: int, size: int) -> tuple[Run, ...]:
    """Query, key and value in one matrix: head by head, as those named query_key_value are, or one after the other."""
    if "query_key_value" not in _leaf(reader):
        return (
            Run(0, heads // groups * size),
            Run(heads * size, size),
            Run((heads + groups) * size, size),
        )
    if heads != groups:
        raise _unsupported(found, f"{reader.name} interleaves grouped heads")
    return (Run(0, 3 * size),)


def _both(reader: Linear, runs: tuple[Run, ...], tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[Run, ...]]:
    """The same runs for a reader's weight and, if it has one, its bias."""
    bias = f"{reader.name}.bias"
    return {reader.weight: runs} | ({bias: runs} if bias in tensors else {})


def _refuse_others(
    found: Layout, writer: Linear, readers: Sequence[Linear], sizes: set[int], tensors: Mapping[str, TensorInfo]
) -> None:
    """Raises UnsupportedError for a vector beside the linears that has an entry per unit, such as a norm of them."""
    known = {f"{linear.name}.bias" for linear in (writer, *readers)}
    parent = _parent(writer) + "."
    for name in found.blocks[writer.block]:
        shape = tensors[name].shape
        if name.startswith(parent) and name not in known and len(shape) == 1 and shape[0] in sizes:
            raise _unsupported(found, f"{name} [{shape[0]}] is a vector of what is to be removed")


def _parent(linear: Linear) -> str:
    return linear.name.rpartition(".")[0]


def _leaf(linear: Linear) -> str:
    return linear.name.rpartition(".")[2]


def _unsupported(found: Layout, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"architecture {found.architecture} cannot be made narrower: {why}", "--layers and sparse masks work on it"
    )
