"""Rows 16 to 23: tokenizers, texts, names, the network."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
from faults.kit import Llmpare, edit_json, flip_bit, none, refused, report

from llmpare.calibration_data import presets
from llmpare.compress import chat
from llmpare.compress.hub import transport_error


def test_16_tokenizer_missing(llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text) -> None:
    (broken / "tokenizer.json").unlink()
    refused(llmpare, tiny.quantize(broken, out, text), 3, str(broken), "expected tokenizer.json")
    assert none(out)


@pytest.mark.parametrize("content", [b"{", b'{"model": 3}', b"\xff"])
def test_16_tokenizer_corrupt(llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text, content: bytes) -> None:
    (broken / "tokenizer.json").write_bytes(content)
    refused(llmpare, tiny.quantize(broken, out, text), 3, str(broken / "tokenizer.json"))
    assert none(out)


def test_16_special_tokens_nested_without_end(llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text) -> None:
    (broken / "special_tokens_map.json").write_text('{"a":' * 100_000)
    refused(llmpare, tiny.quantize(broken, out, text), 3, "cannot be loaded as a tokenizer")
    assert none(out)


def test_16_tokens_outside_the_vocabulary(
    llmpare: Llmpare, model: Path, broken: Path, tmp_path: Path, out: Path, text: tiny.Text
) -> None:
    edit_json(broken / "config.json", vocab_size=50)
    refused(llmpare, tiny.quantize(broken, out, text), 3, "is outside the model's vocabulary of 50")
    ids = tmp_path / "ids.jsonl"
    ids.write_text(json.dumps({"input_ids": [4096] * 40}))
    command = tiny.quantize(model, out, text, "--dataset", str(ids), "--nsamples", "1")
    refused(llmpare, command, 3, "ids.jsonl, line 1: token id 4096 is outside the model's vocabulary of 4096")
    assert none(out)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ 'x' * 10 ** 11 }}",
    ],
    ids=["loop", "attribute access", "memory"],
)
def test_17_hostile_chat_template(
    llmpare: Llmpare, broken: Path, tmp_path: Path, out: Path, text: tiny.Text, template: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(chat, "SECONDS", 1)
    edit_json(broken / "tokenizer_config.json", chat_template=template)
    dialogues = tmp_path / "dialogues.jsonl"
    row = {"messages": [{"role": "user", "content": text[0].read_text(encoding="utf-8")}]}
    dialogues.write_text(json.dumps(row))
    command = tiny.quantize(broken, out, text, "--dataset", str(dialogues))
    refused(llmpare, [*command, "--chat-template"], 3, "template rejected", "without --chat-template")
    assert none(out)
    assert llmpare(command).code == 0, "a template nobody asked for is not looked at"


HOSTILE = "a\x1b[31m[/x]\n{{x}}"


def test_18_hostile_names(
    llmpare: Llmpare, model: Path, tmp_path: Path, text: tiny.Text, undisturbed: dict[str, bytes]
) -> None:
    folder = tmp_path / HOSTILE
    shutil.copytree(model, folder / "model")
    (folder / "model" / HOSTILE).parent.mkdir()
    (folder / "model" / HOSTILE).write_text("carried over")
    out = folder / "out"
    ended = llmpare(tiny.quantize(folder / "model", out, text))
    assert ended.code == 0
    assert ended.out == str(out).replace("\x1b", "\\x1b").replace("\n", "\\n") + "\n"
    assert all(line.isprintable() for line in ended.err.splitlines())
    assert (out / HOSTILE).read_text() == "carried over"
    assert (out / "model.safetensors").read_bytes() == undisturbed["model.safetensors"]
    assert llmpare(["verify", str(out)]).code == 0
    assert all(line.isprintable() for line in (out / "report.md").read_text(encoding="utf-8").splitlines())
    flip_bit(out / HOSTILE, 0)
    refused(llmpare, ["verify", str(out)], 3, "a\\x1b[31m[/x]\\n{{x}}' is damaged")


def test_19_text_empty(llmpare: Llmpare, model: Path, tmp_path: Path, out: Path, text: tiny.Text) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    refused(llmpare, tiny.quantize(model, out, text, "--dataset", str(empty)), 3, "0 tokens, and 128 are needed")
    assert none(out)


@pytest.mark.parametrize("flag", ["--nsamples", "--eval-nsamples"])
def test_19_text_too_short(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text, flag: str) -> None:
    ended = llmpare(tiny.quantize(model, out, text, flag, "99"))
    assert ended.code == 3
    assert re.search(r"1\d\d\d tokens, and 99 windows of 32 need 3168", ended.err)
    assert none(out)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        file.truncate(10**9)


BAD_TEXT: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "not UTF-8": ("a.txt", lambda path: path.write_bytes(b"fine\nfine\nna\xefve\n"), "byte 0xef at offset 12, line 3"),
    "bad JSON": ("a.jsonl", lambda path: path.write_text('{"text": "a"}\n{"text": oops}\n'), "line 2: not JSON"),
    "no text": ("a.jsonl", lambda path: path.write_text('{"text": "a"}\n{"texts": "b"}\n'), "line 2: no text"),
    "one line of 1 GB": ("a.jsonl", sparse, "line 2: longer than 16 MiB"),
    "1 GB": ("a.txt", sparse, "larger than 64 MiB"),
}


@pytest.mark.parametrize("kind", BAD_TEXT)
def test_20_bad_text(llmpare: Llmpare, model: Path, tmp_path: Path, out: Path, text: tiny.Text, kind: str) -> None:
    name, make, said = BAD_TEXT[kind]
    path = tmp_path / name
    make(path)
    tracemalloc.start()
    refused(llmpare, tiny.quantize(model, out, text, "--dataset", str(path)), 3, str(path), said)
    _, memory = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert memory < 200e6
    assert none(out)


def test_21_archives(llmpare: Llmpare, model: Path, tmp_path: Path, out: Path, text: tiny.Text) -> None:
    for name in ("model.zip", "model.tar.gz"):
        (tmp_path / name).write_bytes(b"PK")
        said = str(tmp_path / name), "archives are not unpacked"
        refused(llmpare, tiny.quantize(tmp_path / name, out, text), 2, *said)
        refused(llmpare, ["plan", str(tmp_path / name)], 2, *said)
        refused(llmpare, tiny.quantize(model, out, text, "--dataset", str(tmp_path / name)), 2, *said)
    assert none(out)


def test_22_no_network(tmp_path: Path, out: Path, text: tiny.Text) -> None:
    """In a process of its own: the hub's client reads its environment when it is imported."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{probe.getsockname()[1]}"
    settings = {"HF_ENDPOINT": nowhere, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    start = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "llmpare.cli", *tiny.quantize("org/name", out, text, "--dry-run")],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 3, ended.stderr
    assert time.monotonic() - start < 10
    assert "the hub cannot be reached, and its cache has no complete copy" in ended.stderr
    assert "examples/tiny-llama" in ended.stderr
    assert none(out)


def test_22_no_network_for_a_data_set(
    llmpare: Llmpare, model: Path, out: Path, text: tiny.Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "_reachable", lambda url: False)
    command = tiny.quantize(model, out, text, "--dataset", "wikitext2")
    refused(llmpare, command, 3, "'wikitext2' is not a local file, and the hub", "HF_HUB_OFFLINE=1", "bundled")
    assert none(out)


def test_22_network_lost_between_rows(
    llmpare: Llmpare, model: Path, out: Path, text: tiny.Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    def some_rows(*_: object, **__: object) -> Iterator[dict[str, str]]:
        yield {"text": "one row"}
        raise transport_error()("The read operation timed out")

    monkeypatch.setattr(presets, "_reachable", lambda url: True)
    monkeypatch.setattr(datasets, "load_dataset", some_rows)
    command = tiny.quantize(model, out, text, "--dataset", "pile")
    refused(llmpare, command, 3, "'pile': The read operation timed out", "run the same command again")
    assert none(out)


def test_23_overlap(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text) -> None:
    same = "--eval-dataset", str(text[0]), "--nsamples", "39"
    ended = llmpare(tiny.quantize(model, out, text, *same))
    assert ended.code == 0
    assert "100% of the evaluation text is also in the calibration text" in ended.err
    assert "100% of the evaluation text" in report(out)["warnings"][0]
    assert report(out)["overlap"] == 1
    strict = llmpare(tiny.quantize(model, out.with_name("strict"), text, *same, "--strict"))
    assert strict.code == 4
    assert "--strict: 1 warning" in strict.err
    assert report(out.with_name("strict"))["passed"] is False
    assert llmpare(tiny.quantize(model, out.with_name("other"), text, "--strict")).code == 0
