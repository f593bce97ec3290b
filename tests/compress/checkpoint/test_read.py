"""Opening a model folder: what is read, what is carried over, and every folder that is refused."""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.errors import InputError, UsageError

MEGABYTE = 1 << 20


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_shard(path: Path, header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that lacks nothing but the weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def sharded(model: Path, weight_map: dict[str, Any], shards: dict[str, list[str]]) -> None:
    for shard, names in shards.items():
        header = {name: entry("U8", [1], i, i + 1) for i, name in enumerate(names)}
        write_shard(model / shard, header, bytes(len(names)))
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(model: Path) -> str:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(model)
    return caught.value.message


# --- what is read


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


def test_files_to_carry_over(model: Path) -> None:
    carried = [
        "LICENSE",
        "additional_chat_templates/tool use.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "modeling_x.py",
        "original/config.json",
        "original/tokenizer.model",
        "tokenizer.json",
        "vocab\n[/x].txt",
    ]
    left = [
        ".gitattributes",
        ".cache/huggingface/x.json",
        "consolidated.safetensors",
        "manifest.json",
        "model.fp32-00001-of-00002.safetensors",
        "model.safetensors.index.fp32.index.json",
        "onnx/model.onnx",
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "report.json",
        "report.md",
    ]
    for name in carried + left:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("x")
    os.mkfifo(model / "pipe")
    write_shard(model / "model.safetensors", {})
    with Checkpoint.open(model) as checkpoint:
        assert checkpoint.files == tuple(sorted(carried))


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


# --- fault 1 and 2: folder and config


@pytest.mark.parametrize("name", ["missing", "file"])
def test_not_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="expected a folder with config.json") as caught:
        Checkpoint.open(tmp_path / name)
    assert str(tmp_path / name) in caught.value.message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a": 1,\n  "b": }', "config.json':2:8: Expecting value"),
        (b"[1]", "config.json':1:1: holds a list"),
        (b"", "config.json':1:1: "),
        (b'{"a":\n"\xff"}', "config.json':2:2: is not UTF-8"),
        (b"[" * 100_000, "config.json':1:1: is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "config.json':1:1: Exceeds the limit"),
        (b" " * 8_000_001, "has 8,000,001 bytes"),
    ],
)
def test_broken_config(model: Path, content: bytes, expected: str) -> None:
    (model / "config.json").write_bytes(content)
    assert expected in refusal(model)


def test_config_missing_or_not_a_file(model: Path) -> None:
    (model / "config.json").unlink()
    assert "has no config.json" in refusal(model)
    os.mkfifo(model / "config.json")
    assert "is not a regular file" in refusal(model)
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("nowhere")
    assert "No such file" in refusal(model)


# --- fault 5: weights that are not safetensors


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_is_not_loaded(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).write_bytes(pickle.dumps(Malicious(tmp_path / "owned")))
    with pytest.raises(InputError) as caught:
        Checkpoint.open(model)
    assert f"{name!r}: pickle is not loaded" in caught.value.message
    assert "convert it to safetensors" in caught.value.hint
    assert not (tmp_path / "owned").exists()
    pickle.loads((model / name).read_bytes())
    assert (tmp_path / "owned").exists(), "the bait is not poisonous"


def test_pickles_are_never_opened(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "pytorch_model.bin").write_bytes(b"x")
    assert record_opens(monkeypatch, lambda: pytest.raises(InputError, Checkpoint.open, model)) == ["config.json"]
    write_shard(model / "model.safetensors", {})
    assert record_opens(monkeypatch, lambda: Checkpoint.open(model).close()) == ["config.json", "model.safetensors"]


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


def test_no_weights_at_all(model: Path) -> None:
    assert "has no weights: expected model.safetensors" in refusal(model)
    (model / "model.gguf").write_bytes(b"x")
    assert "it has 'model.gguf'" in refusal(model)


# --- fault 6: headers that lie


TWO = {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 8, 16)}

LIES: dict[str, tuple[Any, bytes, int | None, str]] = {
    # name: header, data, length of the header as claimed, what the message says
    "length beyond the file": (TWO, bytes(16), 5000, "is truncated: its header claims 5000 bytes"),
    "length beyond 100 MB": (TWO, bytes(16), 2**63, "claims 9,223,372,036,854,775,808 bytes, more than 100,000,000"),
    "not JSON": (b'{"a": oops}', b"", None, "model.safetensors':1:7: Expecting value"),
    "hole": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 8, 12)}, bytes(12), None, "tensor 'b' .* a hole"),
    "hole at the start": ({"a": entry("U8", [4], 4, 8)}, bytes(8), None, "tensor 'a' .* a hole"),
    "overlap": (
        {"a": entry("U8", [8], 0, 8), "b": entry("U8", [8], 4, 12)},
        bytes(12),
        None,
        "tensor 'b' .* an overlap",
    ),
    "size is not that of shape and dtype": (
        {"a": entry("F32", [3], 0, 8)},
        bytes(8),
        None,
        "tensor 'a': F32 .3. takes 12 bytes",
    ),
    "overflow": ({"a": entry("F32", [2**40, 2**40], 0, 8)}, bytes(8), None, "tensor 'a': its shape overflows"),
    "overflow by many": ({"a": entry("U8", [2**62] * 9999, 0, 8)}, bytes(8), None, "tensor 'a': its shape overflows"),
    "overflow by product": ({"a": entry("U8", [2**32, 2**32], 0, 0)}, b"", None, "tensor 'a': its shape overflows"),
    "negative shape": ({"a": entry("F32", [-1, -2], 0, 8)}, bytes(8), None, "tensor 'a': negative size -1"),
    "negative offset": ({"a": entry("U8", [8], -8, 0)}, bytes(8), None, "tensor 'a': negative"),
    "offsets reversed": ({"a": entry("U8", [8], 8, 0)}, bytes(8), None, "tensor 'a': negative"),
    "unknown dtype": ({"a": entry("F31", [2], 0, 8)}, bytes(8), None, "tensor 'a': unknown dtype 'F31'"),
    "half a byte": ({"a": entry("F4", [3], 0, 2)}, bytes(2), None, "tensor 'a': 12 bits are not a whole number"),
    "trailing bytes": (TWO, bytes(19), None, "3 trailing bytes after 'b'"),
    "not an object": ({"a": [1]}, b"", None, "tensor 'a': is not described by an object"),
    "no dtype": ({"a": {"shape": [1]}}, b"", None, "tensor 'a': has no dtype"),
    "shape of text": ({"a": {"dtype": "U8", "shape": "8"}}, b"", None, "tensor 'a': its shape is not a list"),
    "shape of truth": ({"a": entry("U8", [True], 0, 1)}, b"x", None, "tensor 'a': its shape is not a list"),
    "one offset": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"x", None, "not two integers"),
    "fraction": ({"a": entry("U8", [1], 0, 1.0)}, b"x", None, "not two integers"),  # type: ignore[arg-type]
    "a list": (b"[1, 2]", b"", None, "does not begin with '{'"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__ is not an object of strings"),
    "nesting": (b'{"a":' + b"[" * 200_000, b"", None, "nested too deeply"),
    "lone surrogate": (b'{"\\ud800": {}}', b"", None, "not valid Unicode"),
}


def traced_refusal(model: Path) -> tuple[str, int]:
    """The message, and the bytes that were allocated on the way at most."""
    tracemalloc.start()
    try:
        return refusal(model), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("lie", LIES)
def test_header_that_lies(model: Path, lie: str) -> None:
    header, data, length, expected = LIES[lie]
    write_shard(model / "model.safetensors", header, data, length)
    start = time.perf_counter()
    message, memory = traced_refusal(model)
    assert re.search(expected, message)
    assert "model.safetensors" in message
    assert time.perf_counter() - start < 5
    assert memory < 10 * MEGABYTE


def test_a_header_that_is_too_long_is_not_read(model: Path) -> None:
    """The file is as long as it claims, so only the limit protects the memory."""
    path = model / "model.safetensors"
    write_shard(path, b"{", length=300 * MEGABYTE)
    os.truncate(path, 400 * MEGABYTE)
    message, memory = traced_refusal(model)
    assert "more than 100,000,000" in message
    assert memory < MEGABYTE


# --- fault 7: one name, two places


def test_duplicate_key_in_a_header(model: Path) -> None:
    write_shard(
        model / "model.safetensors",
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}',
        bytes(8),
    )
    message = refusal(model)
    assert "'a' occurs twice" in message
    assert "[0, 4]" in message
    assert "[4, 8]" in message


def test_one_tensor_in_two_shards(model: Path) -> None:
    shards = {"x.safetensors": ["a", "b"], "y.safetensors": ["b"]}
    sharded(model, {"a": "x.safetensors", "b": "y.safetensors"}, shards)
    assert "tensor 'b' is in 'x.safetensors' and in 'y.safetensors'" in refusal(model)


def test_duplicate_key_in_the_index(model: Path) -> None:
    sharded(model, {"a": "x.safetensors"}, {"x.safetensors": ["a"]})
    index = '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
    (model / "model.safetensors.index.json").write_text(index)
    assert "'a' occurs twice: 'x.safetensors' and 'y.safetensors'" in refusal(model)


# --- fault 8: files that are something else


def test_truncated_shard(model: Path) -> None:
    path = model / "model.safetensors"
    write_shard(path, TWO, bytes(16))
    size = path.stat().st_size
    os.truncate(path, size - 5)
    assert f"expected {size} bytes, the file has {size - 5}" in refusal(model)
    os.truncate(path, 7)
    assert "expected at least 8 bytes, it has 7" in refusal(model)
    os.truncate(path, 0)
    assert "expected at least 8 bytes, it has 0" in refusal(model)


def test_lfs_pointer(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(InputError, match="git-LFS pointer") as caught:
        Checkpoint.open(model)
    assert "git lfs pull" in caught.value.hint


@pytest.mark.parametrize("start", ["<!DOCTYPE html>", "\n <html>", "<?xml version='1.0'?>"])
def test_error_page(model: Path, start: str) -> None:
    (model / "model.safetensors").write_text(start + "<body>404 Not Found</body>")
    assert "is an HTML page" in refusal(model)


def test_shard_is_a_pipe_or_a_folder(model: Path) -> None:
    os.mkfifo(model / "model.safetensors")
    assert "is not a regular file" in refusal(model)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()
    assert "is not a regular file" in refusal(model)


# --- fault 9 and 10: the index


def test_index_names_missing_shards(model: Path) -> None:
    sharded(model, {f"t{i}": f"s{i}.safetensors" for i in range(8)}, {"s0.safetensors": ["t0"]})
    message = refusal(model)
    assert ", ".join(f"'s{i}.safetensors'" for i in range(1, 6)) + " and 2 more" in message
    assert "s6" not in message


def test_index_and_headers_disagree(model: Path) -> None:
    sharded(model, {"a": "x.safetensors"}, {"x.safetensors": ["a", *"bcdefgh"]})
    message = refusal(model)
    assert "it does not name 'b', 'c', 'd', 'e', 'f' and 2 more" in message
    sharded(model, {"a": "x.safetensors", "z": "x.safetensors"}, {"x.safetensors": ["a"]})
    assert "not in the shard it names: 'z'" in refusal(model)
    sharded(
        model,
        {"a": "x.safetensors", "b": "x.safetensors"},
        {"x.safetensors": ["a"], "y.safetensors": ["b"]},
    )
    assert "not in the shard it names: 'b'" in refusal(model)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "[]", "{"])
def test_broken_index(model: Path, index: str) -> None:
    (model / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refusal(model)


HOSTILE = [
    "../x.safetensors",
    "/etc/x.safetensors",
    "a/../../x.safetensors",
    "sub/x.safetensors",
    "..",
    "",
    ".",
    "x\0.safetensors",
    "..\\x.safetensors",
    "\ud800.safetensors",
    "\x1b[31m/[/x]\n.safetensors",
    "pytorch_model.bin",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_shard_name(model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(model.parent / "x.safetensors", {"a": entry("U8", [1], 0, 1)}, b"x")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    opened = record_opens(monkeypatch, lambda: pytest.raises(InputError, Checkpoint.open, model))
    assert opened == ["config.json", "model.safetensors.index.json"]
    message = refusal(model)
    assert repr(name) in message
    assert message.isprintable()
    message.encode("utf-8")


def test_long_shard_name(model: Path) -> None:
    name = 300 * "x" + ".safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert "missing from the folder" in refusal(model)


# --- fault 18: hostile names elsewhere


@pytest.mark.parametrize("name", ["\x1b[2J", "[/x]", "a\nb", "[red]", "\u202e"])
def test_names_are_escaped(tmp_path: Path, name: str) -> None:
    model = tmp_path / name.replace("/", "")
    model.mkdir()
    (model / "config.json").write_text("{}")
    write_shard(model / "model.safetensors", {name: entry("F31", [1], 0, 1)}, b"x")
    message = refusal(model)
    assert repr(name) in message
    assert message.isprintable()


# --- fault 40: a shard that changes while it is used


def test_unchanged(model: Path) -> None:
    path = model / "model.safetensors"
    write_shard(path, TWO, bytes(16))
    with Checkpoint.open(model) as checkpoint:
        checkpoint.read("a")
        checkpoint.read("a")
        checkpoint.check_unchanged()


def test_shard_rewritten_in_place(model: Path) -> None:
    path = model / "model.safetensors"
    write_shard(path, TWO, bytes(16))
    with Checkpoint.open(model) as checkpoint:
        checkpoint.read("b")
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        with pytest.raises(InputError, match=r"model.safetensors': tensor 'b' changed"):
            checkpoint.read("b")
        os.utime(path, ns=(1, 1))
        with pytest.raises(InputError, match=r"model.safetensors' changed"):
            checkpoint.check_unchanged()


def test_shard_replaced_or_removed_or_cut(model: Path) -> None:
    path, other = model / "model.safetensors", model / "other"
    write_shard(path, TWO, bytes(16))
    write_shard(other, TWO, bytes(16))
    with Checkpoint.open(model) as checkpoint:
        status = path.stat()
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(other, path)
        with pytest.raises(InputError, match="changed"):
            checkpoint.check_unchanged()
        path.unlink()
        with pytest.raises(InputError, match="No such file"):
            checkpoint.check_unchanged()
    write_shard(path, TWO, bytes(16))
    with Checkpoint.open(model) as checkpoint:
        os.truncate(path, 100)
        with pytest.raises(InputError, match="it has 100"):
            checkpoint.read("b")


def test_unreadable_shard(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing disk is named, with the system's words for it."""
    path = model / "model.safetensors"
    write_shard(path, TWO, bytes(16))
    with Checkpoint.open(model) as checkpoint:

        def failing(*_: object) -> int:
            raise OSError(5, os.strerror(5))

        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(InputError, match=r"cannot read .*model.safetensors': Input/output error"):
            checkpoint.read("a")


def test_descriptors_are_closed_on_refusal(model: Path) -> None:
    sharded(model, {"a": "x.safetensors", "z": "x.safetensors"}, {"x.safetensors": ["a"]})
    before = os.listdir("/proc/self/fd")
    refusal(model)
    assert os.listdir("/proc/self/fd") == before
