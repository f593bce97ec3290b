"""Opening a model folder, and reading tensors in the order of their bytes."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from shards import entry, sharded, write_shard

from llmpare.compress.checkpoint.read import Checkpoint


def test_tensors_come_in_the_order_of_their_bytes(model: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "late": entry("F32", [2, 1], 4, 12),
        "early": entry("BF16", [2], 0, 4),
        "empty": entry("I64", [0, 5], 12, 12),
        "scalar": entry("F64", [], 12, 20),
    }
    write_shard(model / "model.safetensors", header, bytes(range(20)))
    with Checkpoint.open(model) as checkpoint:
        assert list(checkpoint.tensors) == ["early", "late", "empty", "scalar"]
        late = checkpoint.tensors["late"]
        assert (late.dtype, late.shape, late.shard) == ("F32", (2, 1), "model.safetensors")
        assert (late.nbytes, late.numel) == (8, 2)
        assert checkpoint.tensors["scalar"].numel == 1
        assert checkpoint.read("late") == bytes(range(4, 12))
        assert checkpoint.read("empty") == b""
        assert checkpoint.digests["late"] == sha256(bytes(range(4, 12))).hexdigest()
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.folder == model


def test_shards_are_read_in_the_order_of_their_names(model: Path) -> None:
    weight_map = {"a": "z.safetensors", "b": "y.safetensors", "c": "z.safetensors"}
    sharded(model, weight_map, {"z.safetensors": ["a", "c"], "y.safetensors": ["b"]})
    with Checkpoint.open(model) as checkpoint:
        assert [(t.name, t.shard) for t in checkpoint.tensors.values()] == [
            ("b", "y.safetensors"),
            ("a", "z.safetensors"),
            ("c", "z.safetensors"),
        ]


def test_the_hub_cache_is_made_of_symbolic_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_shard(blobs / "b1", {"a": entry("U8", [1], 0, 1)}, b"x")
    for blob, name, text in (
        ("b2", "config.json", "{}"),
        ("b3", "tokenizer.json", "{}"),
        ("b4", "model.safetensors.index.json", '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'),
    ):
        (blobs / blob).write_text(text)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    (snapshot / "model-00001-of-00001.safetensors").symlink_to("../../blobs/b1")
    with Checkpoint.open(snapshot) as checkpoint:
        assert checkpoint.read("a") == b"x"
        assert checkpoint.files == ("tokenizer.json",)
        checkpoint.check_unchanged()


def test_threads_read_the_same_bytes(model: Path) -> None:
    size = 1 << 16
    data = os.urandom(16 * size)
    header = {f"t{i}": entry("U8", [size], i * size, (i + 1) * size) for i in range(16)}
    write_shard(model / "model.safetensors", header, data)
    with Checkpoint.open(model) as checkpoint, ThreadPoolExecutor(4) as pool:
        for i, read in enumerate(pool.map(checkpoint.read, [f"t{i % 16}" for i in range(64)])):
            assert read == data[i % 16 * size :][:size]


def test_a_large_model_opens_at_once(model: Path) -> None:
    """16 GB in four sparse shards with the tensors of a model of 32 blocks."""
    weight_map = {}
    for shard in range(4):
        name = f"model-0000{shard + 1}-of-00004.safetensors"
        header, size = {}, 4_000_000_000 // 80
        for i in range(80):
            tensor = f"model.layers.{shard}.{i}.weight"
            header[tensor] = entry("BF16", [size // 2], i * size, (i + 1) * size)
            weight_map[tensor] = name
        write_shard(model / name, header)
        os.truncate(model / name, (model / name).stat().st_size + 80 * size)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with Checkpoint.open(model) as checkpoint:
            assert sum(t.nbytes for t in checkpoint.tensors.values()) == 16_000_000_000
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1, "reading 16 GB takes longer"


def test_imports_are_light() -> None:
    """What `plan` needs must start without the libraries that take seconds to import."""
    modules = ("files", "header", "read", "locate", "write", "journal", "manifest", "publish")
    code = "\n".join(f"import llmpare.compress.checkpoint.{name}" for name in modules)
    code += "\nimport sys; print(*{'torch', 'numpy', 'transformers', 'huggingface_hub'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
