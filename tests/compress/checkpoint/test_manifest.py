"""Fault 41: what verify finds in an output that is no longer what was written."""

import json
import random
from hashlib import sha256
from pathlib import Path

import pytest
from publishing import SPEC, produce, write_blocks

from llmpare.compress.checkpoint.journal import Journal
from llmpare.compress.checkpoint.publish import Workspace, build_manifest, finished, verify
from llmpare.compress.errors import InputError, OutputError


@pytest.fixture
def done(out: Path, source: Path) -> Path:
    produce(out, source)
    return out


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "templates/chat [/x].jinja", "tokenizer.json"])
def test_any_flipped_bit_is_found(done: Path, name: str) -> None:
    data = (done / name).read_bytes()
    for at in range(0, len(data), 1 + len(data) // 300):
        damaged = bytearray(data)
        damaged[at] ^= 1 << random.Random(at).randrange(8)
        (done / name).write_bytes(damaged)
        with pytest.raises(InputError) as caught:
            verify(done)
        assert name in caught.value.message
        assert (done / name).read_bytes() == damaged
    (done / name).write_bytes(data)
    verify(done)


def test_a_flipped_bit_in_a_shard_names_the_tensor(done: Path) -> None:
    path = done / "model-00002-of-00002.safetensors"
    data = path.read_bytes()
    base = len(data) - 16
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << random.Random(at).randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="model-00002-of-00002.safetensors' is damaged") as caught:
            verify(done)
        where = "'block.1.codes'" if base <= at < base + 8 else "'block.1.scale'"
        assert (f"in tensor {where}" if at >= base else " in ") in caught.value.message
    assert at > base


def test_missing_unexpected_and_cut_files(done: Path) -> None:
    (done / "extra").write_text("x")
    with pytest.raises(InputError, match="'extra' has no place in it"):
        verify(done)
    (done / "extra").unlink()
    data = (done / "tokenizer.json").read_bytes()
    (done / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="'tokenizer.json' is missing"):
        verify(done)
    (done / "tokenizer.json").write_bytes(data[:-1])
    with pytest.raises(InputError, match="tokenizer.json' is damaged: expected 2 bytes, it has 1"):
        verify(done)
    (done / "tokenizer.json").write_bytes(data)
    report = (done / "report.json").read_bytes()
    (done / "report.json").unlink()
    with pytest.raises(InputError, match="'report.json' is missing"):
        verify(done)
    (done / "report.json").write_bytes(report + b" ")
    verify(done)


def test_a_tensor_that_the_disk_got_wrong_is_not_published(out: Path, source: Path) -> None:
    with Workspace(out, force=False, restart=False) as workspace, Journal(workspace.journal, SPEC) as journal:
        tensors = write_blocks(workspace.partial, journal, [])
        shard = workspace.partial / "model-00002-of-00002.safetensors"
        data = shard.read_bytes()
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(OutputError, match="'block.1.scale' is not what was written"):
            build_manifest(workspace.partial, spec=SPEC, source={}, versions={}, tensors=tensors)
        shard.write_bytes(data)
        assert build_manifest(workspace.partial, spec=SPEC, source={}, versions={}, tensors=tensors)["files"]


def test_a_stale_lock_is_ignored(done: Path) -> None:
    (done / "lock").write_text("llmpare pid 1\n")
    verify(done)


@pytest.mark.parametrize("manifest", [None, "", "[]", '{"llmpare_manifest": 2}', "{"])
def test_not_an_output(tmp_path: Path, manifest: str | None) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match=r"manifest"):
        verify(tmp_path)
    assert not finished(tmp_path, SPEC)


def test_manifest_is_plain_json(done: Path) -> None:
    """Other tools may read it: files by name with their sha256."""
    manifest = json.loads((done / "manifest.json").read_text())
    assert manifest["files"]["tokenizer.json"] == {"bytes": 2, "sha256": sha256(b"{}").hexdigest()}
