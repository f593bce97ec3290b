"""Model folders whose weight files are written byte by byte, so that anything can be wrong with them."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.errors import InputError


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_shard(path: Path, header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


TWO = {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 8, 16)}


def sharded(model: Path, weight_map: dict[str, Any], shards: dict[str, list[str]]) -> None:
    for shard, names in shards.items():
        header = {name: entry("U8", [1], i, i + 1) for i, name in enumerate(names)}
        write_shard(model / shard, header, bytes(len(names)))
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(model: Path) -> str:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(model)
    return caught.value.message


def record_opens(monkeypatch: pytest.MonkeyPatch, action: Any) -> list[str]:
    names: list[str] = []
    real = os.open

    def recording(path: Any, *arguments: Any, **options: Any) -> int:
        names.append(Path(path).name)
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", recording)
        action()
    return names
