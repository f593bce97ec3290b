"""Which files a model folder must have, which of them are carried over, and which are never opened."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from shards import record_opens, refusal, write_shard

from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.errors import InputError, UsageError


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


def test_no_weights_at_all(model: Path) -> None:
    assert "has no weights: expected model.safetensors" in refusal(model)
    (model / "model.gguf").write_bytes(b"x")
    assert "it has 'model.gguf'" in refusal(model)
