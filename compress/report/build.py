"""What a report needs computed from plain numbers, and the bytes it is stored as."""

import json
import math
from collections.abc import Mapping
from typing import Any

SCHEMA_VERSION = 1


def size(
    *,
    source_bytes: int,
    output_bytes: int,
    linear_bytes: int | None,
    parameters_total: int,
    parameters_compressed: int,
) -> dict[str, Any]:
    """The report's `size` section.

    source_bytes, output_bytes: tensor bytes of the model and of the output. linear_bytes: what the compressed
    linears take in the output with everything that belongs to them except biases (codes, scales, zero points); None
    where they are smaller matrices, of which bits per weight say nothing.
    parameters_compressed: weights in those linears.
    """
    bits = 8 * linear_bytes / parameters_compressed if linear_bytes is not None and parameters_compressed else None
    return {
        "source_bytes": source_bytes,
        "output_bytes": output_bytes,
        "ratio": output_bytes / source_bytes,
        "linear_bits_per_weight": bits,
        "parameters_total": parameters_total,
        "parameters_compressed": parameters_compressed,
        "share_compressed": parameters_compressed / parameters_total,
    }


def finite(value: Any) -> Any:
    """value with every float that JSON has no word for (NaN, infinity) replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def encode(report: Mapping[str, Any]) -> bytes:
    """report.json: indented ASCII with a final newline; NaN and infinity are stored as null."""
    return (json.dumps(finite(report), indent=1, allow_nan=False) + "\n").encode("ascii")
