"""The weight files: their layout, what other software reads in them, and taking up what a killed run left."""

import errno
import itertools
import json
import os
import stat
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llmpare.compress.checkpoint.files import CHUNK
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.checkpoint.write import CheckpointWriter, TensorSpec, weight_files
from llmpare.compress.errors import OutputError

SPECS = [
    TensorSpec("embed.weight", "BF16", (4, 3)),
    TensorSpec("layer.codes", "I32", (2, 2)),
    TensorSpec("layer.odd", "U8", (3,)),
    TensorSpec("layer.scale", "F16", (2,)),
    TensorSpec("empty", "F32", (0, 7)),
    TensorSpec("norm\n\u00e9", "F32", ()),
]


def content(spec: TensorSpec) -> bytes:
    return bytes((len(spec.name) + i) % 251 for i in range(spec.nbytes))


def write_all(folder: Path, specs: list[TensorSpec] = SPECS, max_shard_bytes: int = 5 * 10**9) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    with CheckpointWriter(folder, specs, max_shard_bytes=max_shard_bytes) as writer:
        digests = {spec.name: writer.write(spec.name, content(spec)) for spec in specs}
        writer.sync()
    return digests


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("BF16", (3, 5), 30), ("F4", (2, 3), 3), ("F6_E2M3", (4,), 3), ("I64", (), 8), ("BOOL", (0,), 0)],
)
def test_size_of_a_tensor(dtype: str, shape: tuple[int, ...], size: int) -> None:
    assert TensorSpec("x", dtype, shape).nbytes == size


def test_single_file(tmp_path: Path) -> None:
    digests = write_all(tmp_path)
    assert digests == {spec.name: sha256(content(spec)).hexdigest() for spec in SPECS}
    assert os.listdir(tmp_path) == ["model.safetensors"]
    data = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert list(header) == ["__metadata__", *(spec.name for spec in SPECS)]
    assert header["__metadata__"] == {"format": "pt"}
    assert data[8 + length :] == b"".join(map(content, SPECS))


def test_other_software_reads_it(tmp_path: Path) -> None:
    """safetensors checks the header by rules of its own; odd sizes leave what follows unaligned."""
    write_all(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for spec in SPECS:
        tensor = tensors[spec.name]
        assert tuple(tensor.shape) == spec.shape
        assert tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() == content(spec)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_our_reader_reads_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    digests = write_all(tmp_path, max_shard_bytes=20)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == [spec.name for spec in SPECS]
        for spec in SPECS:
            assert checkpoint.read(spec.name) == content(spec)
        assert checkpoint.digests == digests
        assert checkpoint.files == ()


def test_shards(tmp_path: Path) -> None:
    write_all(tmp_path, max_shard_bytes=20)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, second, third = (f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3))
    # 24 bytes are more than fit, and get a shard; then 16 + 3; then 4 + 0 + 4.
    assert index == {
        "metadata": {"total_size": sum(spec.nbytes for spec in SPECS)},
        "weight_map": dict(
            zip([spec.name for spec in SPECS], [first, second, second, third, third, third], strict=True)
        ),
    }
    assert sorted(os.listdir(tmp_path)) == [first, second, third, "model.safetensors.index.json"]


@pytest.mark.parametrize("limit", [20, 5 * 10**9], ids=["shards", "single"])
def test_sizes_are_known_before_anything_is_written(tmp_path: Path, limit: int) -> None:
    write_all(tmp_path, max_shard_bytes=limit)
    found = {name: len(data) for name, data in bytes_of(tmp_path).items()}
    assert weight_files(SPECS, max_shard_bytes=limit) == found


def test_limit_is_inclusive(tmp_path: Path) -> None:
    specs = [TensorSpec(name, "U8", (4,)) for name in "abcd"]
    write_all(tmp_path, specs, max_shard_bytes=8)
    assert sorted(os.listdir(tmp_path))[:2] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_no_tensors(tmp_path: Path) -> None:
    write_all(tmp_path, [])
    assert load_file(tmp_path / "model.safetensors") == {}


def test_any_order_gives_the_same_bytes(tmp_path: Path) -> None:
    write_all(tmp_path / "a", max_shard_bytes=20)
    (tmp_path / "b").mkdir()
    with CheckpointWriter(tmp_path / "b", SPECS, max_shard_bytes=20) as writer, ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda spec: writer.write(spec.name, content(spec)), reversed(SPECS)))
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


@pytest.mark.parametrize("data", [np.arange(4, dtype=np.int32).reshape(2, 2), memoryview(bytes(16)), bytearray(16)])
def test_any_buffer(tmp_path: Path, data: Any) -> None:
    with CheckpointWriter(tmp_path, SPECS) as writer:
        assert writer.write("layer.codes", data) == sha256(bytes(data)).hexdigest()
        assert writer.read("layer.codes") == bytes(data)
        writer.write("empty", np.zeros((0, 7), np.float32))


def test_our_own_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="written twice"):
        CheckpointWriter(tmp_path, [SPECS[0], SPECS[0]])
    with CheckpointWriter(tmp_path, SPECS) as writer:
        with pytest.raises(ValueError, match="15 bytes, 16 were announced"):
            writer.write("layer.codes", bytes(15))
        with pytest.raises(TypeError, match="C-contiguous"):
            writer.write("layer.codes", np.zeros((2, 4), np.int32)[:, ::2])
        with pytest.raises(KeyError):
            writer.write("unknown", b"")


def test_space_is_reserved_at_once(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, [TensorSpec("a", "U8", (1 << 20,))]):
        assert (tmp_path / "model.safetensors").stat().st_blocks * 512 >= 1 << 20


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_file_systems_that_cannot_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    (tmp_path / "a").mkdir()
    write_all(tmp_path / "a")

    def refusing(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refusing)
    write_all(tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path / "a")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:3], offset))
    write_all(tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o000])
def test_mode_obeys_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_all(tmp_path / "out", max_shard_bytes=20)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~umask}


def test_sync_reaches_what_was_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    shards = [str(tmp_path / f"model-{i:05d}-of-00003.safetensors") for i in (1, 2, 3)]
    with CheckpointWriter(tmp_path, SPECS, max_shard_bytes=20) as writer:
        for touched, names in ((shards, []), ([], []), (shards[1:2], ["layer.codes", "layer.odd"])):
            for spec in SPECS:
                if spec.name in names:
                    writer.write(spec.name, content(spec))
            synced.clear()
            writer.sync()
            assert synced == [*touched, str(tmp_path)]


# --- resuming


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, SPECS, max_shard_bytes=20) as writer:
        writer.write("layer.codes", content(SPECS[1]))
    inodes = {path.name: path.stat().st_ino for path in tmp_path.glob("*.safetensors")}
    with CheckpointWriter(tmp_path, SPECS, max_shard_bytes=20) as writer:
        assert writer.read("layer.codes") == content(SPECS[1])
        assert writer.read("layer.scale") == bytes(4)
    assert {path.name: path.stat().st_ino for path in tmp_path.glob("*.safetensors")} == inodes


def test_digests_are_of_what_is_there_and_take_no_memory(tmp_path: Path) -> None:
    """Of several pieces, the last one short; a resumed run asks for them while the largest tensors are in memory."""
    spec = TensorSpec("large", "U8", (10 * CHUNK + 3,))
    content = np.random.default_rng(0).bytes(spec.nbytes)
    with CheckpointWriter(tmp_path, [spec]) as writer:
        written = writer.write("large", content)
        tracemalloc.start()
        try:
            assert writer.digest("large") == written == sha256(content).hexdigest()
            assert tracemalloc.get_traced_memory()[1] < 4 * CHUNK
        finally:
            tracemalloc.stop()
        writer.write("large", content[:-1] + bytes([content[-1] ^ 1]))
        assert writer.digest("large") != written


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "longer"])
def test_what_does_not_fit_is_begun_anew(tmp_path: Path, damage: str) -> None:
    write_all(tmp_path / "clean")
    write_all(tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    size = path.stat().st_size
    if damage == "header":
        path.write_bytes(path.read_bytes().replace(b"layer.codes", b"layer.sedoc"))
    else:
        os.truncate(path, {"cut": size - 1, "empty": 0, "longer": size + 1}[damage])
    with CheckpointWriter(tmp_path / "out", SPECS) as writer:
        assert writer.read("embed.weight") == bytes(24)
    write_all(tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "clean")


def test_leftovers_of_another_layout_are_removed(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    write_all(tmp_path, max_shard_bytes=10)
    write_all(tmp_path, max_shard_bytes=20)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == len(list(tmp_path.glob("model-*"))) == 3
    write_all(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "tokenizer.json"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="Too many levels of symbolic links"):
        CheckpointWriter(tmp_path / "out", SPECS)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_pipe_in_its_place(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(OutputError, match="is not a regular file"):
        CheckpointWriter(tmp_path, SPECS)


# --- fault 33: a file system that fails


def test_failures_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that may change the disk fails in turn, with each error; afterwards the same calls succeed."""
    write_all(tmp_path / "clean", max_shard_bytes=20)
    for code in (errno.ENOSPC, errno.EIO, errno.EROFS):
        for n in itertools.count(1):
            folder = tmp_path / f"{errno.errorcode[code]}-{n}"
            folder.mkdir()
            with monkeypatch.context() as patch:
                fail_at(patch, n, code)
                message = failure(folder)
            if message is None:
                break
            assert str(folder) in message
            assert os.strerror(code) in message
            write_all(folder, max_shard_bytes=20)
            assert bytes_of(folder) == bytes_of(tmp_path / "clean")
        assert n > 20


def failure(folder: Path) -> str | None:
    try:
        write_all(folder, max_shard_bytes=20)
    except OutputError as error:
        return error.message
    return None


def fail_at(patch: pytest.MonkeyPatch, n: int, code: int) -> None:
    """Makes the n-th call that writes fail."""
    left = itertools.count(n - 1, -1)

    def failing(real: Any, writes: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if writes(arguments) and next(left) == 0:
                raise OSError(code, os.strerror(code))
            return real(*arguments, **options)

        return call

    for name in ("pwrite", "posix_fallocate", "fsync", "replace", "rename", "unlink"):
        patch.setattr(os, name, failing(getattr(os, name), lambda _: True))
    patch.setattr(os, "open", failing(os.open, lambda arguments: arguments[1] & (os.O_WRONLY | os.O_RDWR)))
