"""Rows 30, 31 and 38 to 40: stopped by a signal, and taken up again."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from faults.kit import DOWN_1, Llmpare, StopAfter, edit_json, flip_bit, none, place, refused, report, resumable
from safetensors.torch import load_file, save_file

from llmpare.cli.progress import Watcher
from llmpare.compress import run


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["30", "31"])
def test_30_31_signals(tmp_path: Path, text: tiny.Text, out: Path, signum: int, code: int, llmpare: Llmpare) -> None:
    """The real process, in the middle of its work; a second signal on the heels of the first changes nothing."""
    model = tiny.llama(tmp_path / "model", blocks=16)
    command = tiny.quantize(model, out, text)
    process = subprocess.Popen(
        [sys.executable, "-m", "llmpare.cli", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert any("block 2 of 16" in line for line in process.stderr)
    process.send_signal(signum)
    process.send_signal(signum)
    start = time.monotonic()
    stdout, stderr = process.communicate(timeout=30)
    assert time.monotonic() - start < 5
    assert process.returncode == code
    assert stdout == ""
    assert "Traceback" not in stderr
    assert "block 16 of 16" not in stderr
    assert resumable(out)
    assert llmpare(command).code == 0
    assert report(out)["blocks"][1]["resumed"]
    assert llmpare(tiny.quantize(model, out.with_name("undisturbed"), text)).code == 0
    assert tiny.contents(out) == tiny.contents(out.with_name("undisturbed"))


@pytest.mark.parametrize(
    ("signum", "code", "start"), [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 13)], ids=["30", "31"]
)
def test_30_31_signals_at_any_time(
    zygote: tiny.Zygote,
    model: Path,
    text: tiny.Text,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    signum: int,
    code: int,
    start: int,
) -> None:
    for point in itertools.count(start, 23):
        out = tmp_path / str(point) / "w4"
        command = tiny.quantize(model, out, text)
        stopped = zygote.run(command, signum=signum, at=point)
        if stopped.code == 0:
            break
        assert stopped.code == code
        assert "stopped; run the same command to resume" in stopped.err
        assert "Traceback" not in stopped.err
        assert none(out) or resumable(out) or "w4" in os.listdir(out.parent)
        assert zygote.run(command).code == 0
        assert tiny.contents(out) == undisturbed
        assert os.listdir(out.parent) == ["w4"]
    assert point > 100


@pytest.mark.parametrize(
    "what", ["config", "tokenizer", "headers", "weights", "scheme", "text", "other text", "version"]
)
def test_38_resumed_with_something_else(
    llmpare: Llmpare,
    stop_after: StopAfter,
    broken: Path,
    out: Path,
    text: tiny.Text,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = tiny.quantize(broken, out, text)
    stop_after(0, command)
    before = tiny.contents(out.parent)
    if what == "config":
        edit_json(broken / "config.json", rms_norm_eps=1e-5)
        said = ["source.config_sha256: "]
    elif what == "tokenizer":
        known = json.loads((broken / "tokenizer.json").read_bytes())["model"]
        edit_json(broken / "tokenizer.json", model={**known, "merges": known["merges"][::2]})
        said = ["source.files_sha256.tokenizer.json: ", "text.calibration_ids_sha256: "]
    elif what == "headers":
        weights = load_file(broken / "model.safetensors")
        save_file({**weights, "extra.weight": torch.ones(1)}, broken / "model.safetensors", metadata={"format": "pt"})
        said = ["source.headers_sha256: "]
    elif what == "weights":
        flip_bit(broken / "model.safetensors", place(broken, "model.layers.0.mlp.up_proj.weight"))
        said = ["block 0 is not the one that the unfinished output was begun with"]
    elif what == "scheme":
        command += ["--bits", "3", "--asym"]
        said = ["request.scheme.bits: 4, now 3", "request.scheme.symmetric: true, now false"]
    elif what == "text":
        command += ["--dataset", str(text[1])]
        said = ["text.calibration_sha256: ", f'"{text[0]}", now "{text[1]}"']
    elif what == "other text":
        command += ["--eval-dataset", str(text[0])]
        said = ["text.evaluation_sha256: ", f'"{text[1]}", now "{text[0]}"']
    else:
        monkeypatch.setattr(run, "VERSION", "99.0")
        said = ["versions.llmpare: ", 'now "99.0"']
    refused(llmpare, command, 3, *said, "--restart")
    after = tiny.contents(out.parent)
    assert {n: d for n, d in after.items() if n != "w4.partial/lock"} == {
        n: d for n, d in before.items() if n != "w4.partial/lock"
    }
    assert llmpare([*command, "--restart"]).code == 0
    assert llmpare(["verify", str(out)]).code == 0


@pytest.fixture(scope="module")
def three_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("three") / "model", blocks=3)


def corrupt_line(unit: str) -> Callable[[Path], None]:
    """Damages the line of the journal that speaks of a unit."""

    def corrupt(partial: Path) -> None:
        path = partial / "journal.jsonl"
        text = path.read_text()
        assert f'"unit": "{unit}"' in text
        path.write_text(text.replace(f'"unit": "{unit}"', '"unit": "block 9"'))

    return corrupt


def tear_last_line(partial: Path) -> None:
    path = partial / "journal.jsonl"
    os.truncate(path, path.stat().st_size - 7)


def damage(tensor: str) -> Callable[[Path], None]:
    """Flips a bit of a tensor in the unfinished output."""

    def flip(partial: Path) -> None:
        (partial / "config.json").write_text("{}")  # a checkpoint is found by it; the run replaces it
        flip_bit(partial / "model.safetensors", place(partial, tensor))

    return flip


DAMAGE: dict[str, tuple[Callable[[Path], None], str, list[bool]]] = {
    "line of block 0": (corrupt_line("block 0"), "journal.jsonl':3: failed its checksum, redoing", [False, True]),
    "torn line": (tear_last_line, "journal.jsonl':4: failed its checksum, redoing", [True, False]),
    "codes": (
        damage("model.layers.0.mlp.up_proj.weight_packed"),
        "block 0 failed its checksum, redoing",
        [False, True],
    ),
    "scale": (
        damage("model.layers.1.self_attn.q_proj.weight_scale"),
        "block 1 failed its checksum, redoing",
        [True, False],
    ),
    "embeddings": (damage("model.embed_tokens.weight"), "outside failed its checksum, redoing", [True, True]),
    "weights gone": (
        lambda partial: (partial / "model.safetensors").unlink(),
        "block 1 failed its checksum, redoing",
        [False, False],
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_39_damaged_while_unfinished(
    llmpare: Llmpare,
    stop_after: StopAfter,
    three_blocks: Path,
    tmp_path: Path,
    out: Path,
    text: tiny.Text,
    kind: str,
) -> None:
    make, said, resumed = DAMAGE[kind]
    command = tiny.quantize(three_blocks, out, text)
    stop_after(1, command)
    make(out.parent / "w4.partial")
    ended = llmpare(command)
    assert ended.code == 0
    assert said in ended.err
    assert [block["resumed"] for block in report(out)["blocks"]] == [*resumed, False]
    assert llmpare(tiny.quantize(three_blocks, tmp_path / "clean", text)).code == 0
    assert tiny.contents(out) == tiny.contents(tmp_path / "clean")


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def replace_by_a_copy(path: Path) -> None:
    status = path.stat()
    shutil.copyfile(path, path.with_name("copy"))
    os.utime(path.with_name("copy"), ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(path.with_name("copy"), path)


def change_the_last_block(path: Path) -> None:
    flip_bit(path, place(path.parent, DOWN_1))


def change_the_config(path: Path) -> None:
    edit_json(path.parent / "config.json", rms_norm_eps=0.1)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (touch, "model.safetensors"),
        (replace_by_a_copy, "model.safetensors"),
        (change_the_last_block, "model.safetensors"),
        (change_the_config, "config.json"),
    ],
)
def test_40_source_changes_during_the_run(
    llmpare: Llmpare,
    broken: Path,
    out: Path,
    text: tiny.Text,
    change: Callable[[Path], None],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Watcher.block

    def block(self: Watcher, index: int, total: int, facts: Any) -> None:
        if index == 0:
            change(broken / "model.safetensors")
        real(self, index, total, facts)

    monkeypatch.setattr(Watcher, "block", block)
    refused(llmpare, tiny.quantize(broken, out, text), 3, f"{name}' changed while it was in use")
    assert not out.exists()
