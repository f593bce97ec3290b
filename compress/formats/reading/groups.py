"""The quantization_config of compressed-tensors: which schemes there are, and which of them can be decoded exactly.

A weight can be decoded; what is done to activations while the model runs cannot be put into a weight. Measured by its
weights alone such a model would look better than it is, so it is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmpare.compress.checkpoint.files import clipped
from llmpare.compress.errors import InputError

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense", None)
_STRATEGIES = ("tensor", "channel", "group", "block")
_DENSE_WEIGHTS = (None, "dense")  # sparsity that is only stated: zeros are stored as any other value


@dataclass(frozen=True)
class Group:
    """One scheme and the modules it is for. kind: 'int' or 'float'. group_size: columns per scale, None without
    groups. block: rows × columns per scale, None without blocks."""

    targets: tuple[str, ...]
    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None

    @property
    def scheme(self) -> str:
        """The field's name for it: 'W4A16 g128', 'W8A16_ASYM channel', 'FP8 128x128'."""
        kind = f"W{self.bits}A16{'' if self.symmetric else '_ASYM'}" if self.kind == "int" else f"FP{self.bits}"
        if self.block is not None:
            return f"{kind} {self.block[0]}x{self.block[1]}"
        return f"{kind} {self.strategy if self.group_size is None else f'g{self.group_size}'}"

    def scale_shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """The shapes its weight_scale may have for a linear of rows × columns."""
        if self.block is not None:
            return ((-(-rows // self.block[0]), -(-columns // self.block[1])),)
        if self.group_size is not None:
            return ((rows, -(-columns // self.group_size)),)
        return ((rows, 1), (rows,)) if self.strategy == "channel" else ((1,), (), (1, 1))

    def rank(self, module: str) -> int:
        """How well it suits the module: 0 its name is a target, 1 a class such as 'Linear' is one, 2 neither.

        Not more than an order to try: names on disk need not be those of modules.
        """
        if any(_names(target, module) for target in self.targets):
            return 0
        return 1 if any(target.isidentifier() and target[:1].isupper() for target in self.targets) else 2


def groups_of(quantization: Mapping[str, Any]) -> list[Group]:
    """The schemes of the config. Raises InputError for what cannot be decoded exactly, by name."""
    _refuse_format(quantization.get("format"))
    _refuse_more_than_weights(quantization)
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _malformed("config_groups", groups)
    return [_group(name, group) for name, group in groups.items()]


def _group(name: str, group: object) -> Group:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise _malformed(name, group)
    _refuse_format(group.get("format"))
    for part in ("input_activations", "output_activations"):
        if group.get(part) is not None:
            raise _refused(f"quantizes activations while it runs ({part} of {name})")
    weights = group["weights"]
    bits, kind, symmetric = weights.get("num_bits"), weights.get("type", "int"), weights.get("symmetric", True)
    size, block, targets = weights.get("group_size"), weights.get("block_structure"), group.get("targets")
    if not isinstance(bits, int) or not isinstance(symmetric, bool) or not isinstance(targets, list):
        raise _malformed(name, group)
    if not (kind == "int" and 2 <= bits <= 8) and not (kind == "float" and bits == 8):
        raise _refused(f"has weights of {clipped(kind)} {bits} in {name}")
    size = None if size in (None, -1) else size
    strategy = weights.get("strategy") or (
        "channel" if weights.get("group_size") == -1 else "group" if size else "tensor"
    )
    if strategy not in _STRATEGIES:
        raise _refused(f"has scales by {clipped(repr(strategy))} in {name}")
    if isinstance(block, str):  # '128x128', as it used to be written
        block = [int(part) if part.isdecimal() else 0 for part in block.split("x")]
    if (strategy == "group") != (isinstance(size, int) and size > 0) or (strategy == "block") != _is_block(block):
        raise _malformed(name, group)
    return Group(tuple(map(str, targets)), bits, kind, symmetric, strategy, size, tuple(block) if block else None)


def _names(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error as error:
        raise InputError(f"quantization_config: {clipped(repr(target))} is no regular expression ({error})") from error


def _is_block(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(size, int) and size > 0 for size in value)


def _refuse_format(stored: object) -> None:
    if stored not in _FORMATS:
        raise InputError(
            f"the model is stored as compressed-tensors {clipped(repr(stored))}, which cannot be read",
            f"what can be read: {', '.join(each for each in _FORMATS if each)}",
        )


def _refuse_more_than_weights(quantization: Mapping[str, Any]) -> None:
    if quantization.get("kv_cache_scheme") is not None:
        raise _refused("quantizes the KV cache while it runs (kv_cache_scheme)")
    sparsity = quantization.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format") not in _DENSE_WEIGHTS:
        raise _refused(f"is stored sparse (sparsity_config {clipped(sparsity)})")
    if quantization.get("transform_config"):
        raise _refused("transforms activations while it runs (transform_config)")


def _refused(what: str) -> InputError:
    return InputError(
        f"the compressed-tensors model {what}, which its weights alone do not show",
        "models of which only the weights are quantized, to integers of 2 to 8 bits or to FP8, can be read",
    )


def _malformed(name: str, value: object) -> InputError:
    return InputError(f"quantization_config: {name} is not what compressed-tensors writes: {clipped(value)}")
