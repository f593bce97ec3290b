"""An index that does not fit the weight files, that contradicts itself, or that names hostile files."""

import json
import os
from pathlib import Path

import pytest
from shards import entry, record_opens, refusal, sharded, write_shard

from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.errors import InputError

# --- fault 7: one name, two places


def test_one_tensor_in_two_shards(model: Path) -> None:
    shards = {"x.safetensors": ["a", "b"], "y.safetensors": ["b"]}
    sharded(model, {"a": "x.safetensors", "b": "y.safetensors"}, shards)
    assert "tensor 'b' is in 'x.safetensors' and in 'y.safetensors'" in refusal(model)


def test_duplicate_key_in_the_index(model: Path) -> None:
    sharded(model, {"a": "x.safetensors"}, {"x.safetensors": ["a"]})
    index = '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
    (model / "model.safetensors.index.json").write_text(index)
    assert "'a' occurs twice: 'x.safetensors' and 'y.safetensors'" in refusal(model)


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


def test_descriptors_are_closed_on_refusal(model: Path) -> None:
    sharded(model, {"a": "x.safetensors", "z": "x.safetensors"}, {"x.safetensors": ["a"]})
    before = os.listdir("/proc/self/fd")
    refusal(model)
    assert os.listdir("/proc/self/fd") == before


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
