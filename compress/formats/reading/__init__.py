"""Linears stored by any tool, read back as weights: one file per way of storing them, chosen by the config alone.

A reader looks at headers and finds the packed linears; decoding one reads that one. Nothing is imported from the tools
that wrote them. What cannot be decoded exactly is refused by name.
"""

from collections.abc import Callable, Mapping
from typing import Any

from llmpare.compress.checkpoint.files import clipped
from llmpare.compress.checkpoint.read import Checkpoint, quantization_of
from llmpare.compress.errors import InputError
from llmpare.compress.formats.reading import awq, compressed_tensors, fp8, gptq, mxfp4
from llmpare.compress.formats.reading.packed import Leaves, Packed, modules

Reader = Callable[[Checkpoint, Mapping[str, Leaves], Mapping[str, Any]], list[Packed]]

READERS: dict[str, Reader] = {
    "compressed-tensors": compressed_tensors.find,
    "gptq": gptq.find,
    "awq": awq.find,
    "fp8": fp8.find,
    "mxfp4": mxfp4.find,
}
_TELLTALE = ("weight_packed", "qweight", "bitmask", "weight_scale", "weight_scale_inv")


def find(checkpoint: Checkpoint) -> tuple[str, list[Packed]]:
    """What the checkpoint's way of storing linears is called, 'dense' or 'gptq v1', and those that are packed.

    Raises InputError for whatever is quantized in a way that no reader decodes exactly.
    """
    leaves = modules(checkpoint)
    quantization = quantization_of(checkpoint.config)
    if quantization is None:
        _refuse_unexplained(leaves)
        return "dense", []
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if not isinstance(method, str) or method not in READERS:
        raise InputError(
            f"the model is quantized with the method {clipped(repr(method))} (config.json), which cannot be read",
            f"what can be read: dense weights, {', '.join(READERS)}",
        )
    packed = READERS[method](checkpoint, leaves, quantization)
    if not packed:
        raise InputError(
            f"config.json says the model is quantized with {method}, but no weight is packed",
            "remove quantization_config if the weights are dense",
        )
    return f"gptq {gptq.version(quantization)}" if method == "gptq" else method, packed


def _refuse_unexplained(leaves: Mapping[str, Leaves]) -> None:
    """A loader would take the codes for weights, or leave those linears random."""
    for found in leaves.values():
        for leaf in _TELLTALE:
            if leaf in found:
                raise InputError(
                    f"{found[leaf].name} belongs to a quantized weight, but config.json has no quantization_config",
                    "config.json and the weights do not belong together",
                )
