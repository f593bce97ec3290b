"""What a checkpoint holds, from its headers: format, schemes, sizes, bits per weight. Needs no torch.

Schemes are read off the shapes of the tensors rather than believed from the configuration, so that the outputs of
other tools and mixed precision come out as they are.
"""

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpare.compress.checkpoint.manifest import MANIFEST, read_manifest
from llmpare.compress.checkpoint.read import Checkpoint, TensorInfo, quantization_of
from llmpare.compress.report import show

_BYTES = ("I8", "U8", "F8_E4M3", "F8_E5M2")

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Linear:
    """A quantized linear. scheme: 'W4A16 g128'; weights: rows × columns; nbytes: all its tensors but the bias."""

    scheme: str
    weights: int
    nbytes: int


def inspect(folder: Path) -> dict[str, Any]:
    """Facts about the model in `folder` as plain JSON values; see `lines` for how they read.

    Raises UsageError when there is no such folder, InputError when headers or files are not in order.
    """
    with Checkpoint.open(folder) as checkpoint:
        config = checkpoint.config
        quantization = quantization_of(config)
        linears, dense = _split(checkpoint, quantization if isinstance(quantization, dict) else {})
        stored = Counter[str]()
        for tensor in checkpoint.tensors.values():
            stored[tensor.dtype] += tensor.nbytes
        quantized = sum(linear.weights for linear in linears)
        return {
            "command": "inspect",
            "path": str(folder),
            "architecture": _first(config.get("architectures")),
            "format": _format(quantization),
            "schemes": dict(Counter(linear.scheme for linear in linears).most_common()),
            "linear_bits_per_weight": 8 * sum(linear.nbytes for linear in linears) / quantized if quantized else None,
            "parameters": {"total": quantized + sum(t.numel for t in dense), "quantized": quantized},
            "bytes": {"total": stored.total(), "by_dtype": dict(stored.most_common())},
            "tensors": len(checkpoint.tensors),
            "shards": len({tensor.shard for tensor in checkpoint.tensors.values()}),
            "other_files": len(checkpoint.files),
            "manifest": _manifest(folder),
        }


def lines(facts: Mapping[str, Any]) -> list[str]:
    """The facts of `inspect` as they read in a terminal."""
    parameters, stored, manifest = facts["parameters"], facts["bytes"], facts["manifest"]
    bits = facts["linear_bits_per_weight"]
    schemes = ", ".join(f"{count} linears {scheme}" for scheme, count in facts["schemes"].items())
    by_dtype = ", ".join(f"{show.size(count)} {dtype}" for dtype, count in stored["by_dtype"].items())
    result = [
        f"model       {facts['path']}, {facts['architecture'] or 'no architecture named'}",
        f"format      {facts['format']}" + (f": {schemes}" if schemes else ""),
        f"parameters  {show.count(parameters['total'])}, {show.count(parameters['quantized'])} of them quantized",
        f"size        {show.size(stored['total'])} in {facts['tensors']} tensors, files of weights: {facts['shards']}",
        f"stored as   {by_dtype}",
    ]
    if bits is not None:
        result.append(f"quantized   {bits:.3f} bits per weight, scales and zero points included")
    if manifest is None:
        result.append("manifest    none: not written by llmpare, or not finished")
    elif manifest["wrong"]:
        result.append(
            f"manifest    {len(manifest['wrong'])} files do not have its sizes: {', '.join(manifest['wrong'])}"
        )
    else:
        result.append(f"manifest    {manifest['files']} files have the sizes it says; 'llmpare verify' reads them")
    return result


def _split(checkpoint: Checkpoint, quantization: Mapping[str, Any]) -> tuple[list[Linear], list[TensorInfo]]:
    """The quantized linears, and the tensors that belong to none."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    linears: list[Linear] = []
    dense: list[TensorInfo] = []
    for leaves in modules.values():
        linears += _mxfp4(leaves)
        weight = {leaf: tensor for leaf, tensor in leaves.items() if leaf != "bias"}
        linear = (
            _compressed_tensors(weight, checkpoint) or _gptq(weight, quantization) or _awq(weight) or _bytes(weight)
        )
        if linear is None:
            dense += leaves.values()
        else:
            linears.append(linear)
            dense += [tensor for leaf, tensor in leaves.items() if leaf == "bias"]
    return linears, dense


def _matrices(leaves: Tensors, *names: str) -> list[tuple[int, ...]] | None:
    """The shapes of those tensors, or None unless all are there, have two sizes, and hold something."""
    shapes = [leaves[name].shape for name in names if name in leaves]
    return shapes if len(shapes) == len(names) and all(len(s) == 2 and math.prod(s) for s in shapes) else None


def _linear(leaves: Tensors, name: str, rows: int, columns: int, groups: int) -> Linear:
    group = "channel" if groups == 1 else f"g{columns // groups}"
    return Linear(f"{name} {group}", rows * columns, sum(tensor.nbytes for tensor in leaves.values()))


def _integer(bits: int, symmetric: bool) -> str:
    return f"W{bits}A16{'' if symmetric else '_ASYM'}"


def _compressed_tensors(leaves: Tensors, checkpoint: Checkpoint) -> Linear | None:
    """weight_packed [rows, words], weight_scale [rows, groups]: integers of 32 bits, or FP4 pairs in bytes."""
    shapes = _matrices(leaves, "weight_packed", "weight_scale")
    if shapes is None:
        return None
    (rows, words), (_, groups) = shapes
    if leaves["weight_packed"].dtype == "U8":
        return _linear(leaves, "FP4", rows, 2 * words, groups)
    if "weight_shape" not in leaves:
        return None
    # Packed words are padded, so only this tensor of two integers knows the number of columns.
    shape = checkpoint.read(leaves["weight_shape"].name)
    columns = int.from_bytes(shape[len(shape) // 2 :], "little")
    if not 1 <= columns <= 32 * words:
        return None
    return _linear(leaves, _integer(32 * words // columns, "weight_zero_point" not in leaves), rows, columns, groups)


def _gptq(leaves: Tensors, quantization: Mapping[str, Any]) -> Linear | None:
    """qweight [words, rows], scales [groups, rows], g_idx [columns]."""
    shapes = _matrices(leaves, "qweight", "scales")
    if shapes is None or "g_idx" not in leaves or not leaves["g_idx"].numel:
        return None
    (words, rows), (groups, _) = shapes
    columns = leaves["g_idx"].numel
    bits = 32 * words // columns
    return _linear(leaves, _integer(bits, bool(quantization.get("sym", True))), rows, columns, groups)


def _awq(leaves: Tensors) -> Linear | None:
    """qweight [columns, words], scales [groups, rows], zero points always stored."""
    shapes = _matrices(leaves, "qweight", "qzeros", "scales")
    if shapes is None:
        return None
    (columns, words), _, (groups, rows) = shapes
    return _linear(leaves, _integer(32 * words // rows, symmetric=False), rows, columns, groups)


def _mxfp4(leaves: dict[str, TensorInfo]) -> list[Linear]:
    """NAME_blocks [experts, rows, groups, bytes], two numbers per byte, NAME_scales [experts, rows, groups].

    Takes them out of a module's leaves, and leaves the rest.
    """
    linears: list[Linear] = []
    for name in [leaf.removesuffix("_blocks") for leaf in leaves if leaf.endswith("_blocks")]:
        blocks, scales = leaves[f"{name}_blocks"], leaves.get(f"{name}_scales")
        if scales is None or len(blocks.shape) != 4 or blocks.shape[:3] != scales.shape or not blocks.numel:
            continue
        del leaves[f"{name}_blocks"], leaves[f"{name}_scales"]
        experts = blocks.shape[0]
        one = Linear(
            f"MXFP4 g{2 * blocks.shape[3]}", 2 * blocks.numel // experts, (blocks.nbytes + scales.nbytes) // experts
        )
        linears += [one] * experts
    return linears


def _bytes(leaves: Tensors) -> Linear | None:
    """weight [rows, columns] of one byte each, with scales of any shape: INT8 and FP8."""
    shapes = _matrices(leaves, "weight")
    scaled = leaves.keys() & {"weight_scale", "weight_scale_inv"}
    if shapes is None or not scaled or leaves["weight"].dtype not in _BYTES:
        return None
    ((rows, columns),) = shapes
    return Linear(leaves["weight"].dtype, rows * columns, sum(tensor.nbytes for tensor in leaves.values()))


def _format(quantization: object) -> str:
    """'dense', 'gptq', 'compressed-tensors pack-quantized': what the configuration calls it."""
    if not isinstance(quantization, dict):
        return "dense"
    named = (quantization.get(key) for key in ("quant_method", "format", "checkpoint_format"))
    return " ".join(dict.fromkeys(str(name) for name in named if name)) or "quantized, method not named"


def _first(names: object) -> str | None:
    return str(names[0]) if isinstance(names, list) and names else None


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What the manifest says against the sizes on disk, or None when there is none."""
    if not os.path.lexists(folder / MANIFEST):
        return None
    listed = read_manifest(folder)["files"]
    wrong = [name for name, entry in listed.items() if not _has_size(folder / name, entry["bytes"])]
    return {"files": len(listed), "wrong": wrong}


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
