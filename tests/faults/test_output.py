"""Rows 32 to 37: the disk and the place of the output."""

import errno
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from faults.kit import Llmpare, identity, none, refused, resumable


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


@pytest.mark.usefixtures("full_disk")
def test_32_disk_too_small(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text) -> None:
    said = str(out), "the output needs 2 MiB of disk, 977 KiB are free"
    refused(llmpare, tiny.quantize(model, out, text), 5, *said)
    assert none(out)


@pytest.mark.slow
def test_33_writes_fail_in_turn(
    llmpare: Llmpare, tmp_path: Path, text: tiny.Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the disk is in order again, so is the result.

    One in three: what writes the files is made to fail at every operation where there is no model to compress.
    """
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # nobody pulls the plug here, and waiting takes the time
    model = tiny.llama(tmp_path / "model", blocks=1)
    options = "--method", "rtn", "--dataset", "none"
    assert llmpare(tiny.quantize(model, tmp_path / "expected", text, *options)).code == 0
    expected = tiny.contents(tmp_path / "expected")
    codes = itertools.cycle([errno.ENOSPC, errno.EIO, errno.EROFS])
    for point, code in zip(itertools.count(1, 3), codes, strict=False):
        out = tmp_path / str(point) / "w4"
        out.parent.mkdir()
        command = tiny.quantize(model, out, text, *options)
        with monkeypatch.context() as patch:
            failed = fail_at(patch, point, code)
            ended = llmpare(command)
        if not failed:
            break
        if ended.code == 0:
            assert failed == ["mkdir"], "only a folder that exists need not be made"
        else:
            assert ended.code == 5, ended.err
            assert str(out.parent) in ended.err
            assert os.strerror(code) in ended.err
        if out.exists():
            assert llmpare(["verify", str(out)]).code == 0
        else:
            assert none(out) or resumable(out) or "manifest.json" in os.listdir(out.parent / "w4.partial")
        assert llmpare(command).code == 0
        assert tiny.contents(out) == expected
        assert os.listdir(out.parent) == ["w4"]
    assert point > 80


def fail_at(patch: pytest.MonkeyPatch, point: int, code: int) -> list[str]:
    """Makes the durable operation of that number fail. Returns a list that gets its name."""
    left = itertools.count(point - 1, -1)
    failed: list[str] = []

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        if next(left) == 0:
            failed.append(name)
            raise OSError(code, os.strerror(code))

    for name in tiny.DURABLE:
        patch.setattr(os, name, tiny.watched(name, vars(os)[name], before))
    return failed


def test_34_out_is_occupied(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text) -> None:
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "thesis.tex").write_bytes(b"years of work")
    before = tiny.contents(out)
    refused(llmpare, tiny.quantize(model, out, text), 5, str(out), "holds something else", "--force")
    assert tiny.contents(out) == before
    assert os.listdir(out.parent) == ["w4"]
    assert llmpare(tiny.quantize(model, out, text, "--force")).code == 0
    assert llmpare(["verify", str(out)]).code == 0
    assert os.listdir(out.parent) == ["w4"]


def test_34_finished_with_other_settings(llmpare: Llmpare, model: Path, out: Path, text: tiny.Text) -> None:
    assert llmpare(tiny.quantize(model, out, text)).code == 0
    before = tiny.contents(out)
    refused(
        llmpare,
        tiny.quantize(model, out, text, "--bits", "3"),
        5,
        "other settings: request.scheme.bits: 4, now 3",
        "--force",
    )
    assert tiny.contents(out) == before


def test_34_finished_with_other_files_beside_the_weights(
    llmpare: Llmpare, broken: Path, out: Path, text: tiny.Text
) -> None:
    """They were carried over, so what is there is not what the command would make now."""
    assert llmpare(tiny.quantize(broken, out, text)).code == 0
    (broken / "generation_config.json").write_text('{"temperature": 0.5}')
    command = tiny.quantize(broken, out, text)
    refused(llmpare, command, 5, "other settings: source.files_sha256.generation_config.json: ", "--force")
    assert llmpare([*command, "--force"]).code == 0
    assert json.loads((out / "generation_config.json").read_bytes()) == {"temperature": 0.5}


@pytest.mark.parametrize("where", [".", "inside", "inside/deeper", "..", "../beside/.."])
def test_35_out_and_model_in_each_other(llmpare: Llmpare, broken: Path, text: tiny.Text, where: str) -> None:
    before = tiny.contents(broken.parent)
    for flag in ([], ["--force"]):
        command = [*tiny.quantize(broken, broken / where, text), *flag]
        refused(llmpare, command, 2, str(broken), str(broken / where), "inside each other")
    assert tiny.contents(broken.parent) == before


@pytest.mark.parametrize("linked", ["model", "out"])
def test_35_out_in_the_model_by_another_name(
    llmpare: Llmpare, broken: Path, tmp_path: Path, text: tiny.Text, linked: str
) -> None:
    link = tmp_path / "link"
    link.symlink_to(broken)
    model, out = (link, broken / "inside") if linked == "model" else (broken, link / "inside")
    before = tiny.contents(broken)
    refused(llmpare, tiny.quantize(model, out, text), 2, str(model), str(out), "inside each other")
    assert tiny.contents(broken) == before
    assert tiny.names(broken) == sorted(before)


@pytest.mark.parametrize("kind", ["symbolic link", "dangling link", "file", "pipe", "device"])
@pytest.mark.parametrize("flag", ["--quiet", "--force"])
def test_36_out_is_no_folder(
    llmpare: Llmpare, model: Path, tmp_path: Path, text: tiny.Text, kind: str, flag: str
) -> None:
    out, target = tmp_path / "out", tmp_path / "target"
    if kind == "symbolic link":
        target.mkdir()
        out.symlink_to(target)
    elif kind == "dangling link":
        out.symlink_to(target)
    elif kind == "file":
        out.write_text("precious")
    elif kind == "pipe":
        os.mkfifo(out)
    else:
        out = Path("/dev/null")
    before = identity(out), tiny.names(tmp_path), os.path.exists(target) and os.listdir(target)
    what = {"dangling link": "symbolic link", "device": "device or socket"}.get(kind, kind)
    refused(llmpare, tiny.quantize(model, out, text, flag), 5, str(out), f"is a {what}")
    after = identity(out), tiny.names(tmp_path), os.path.exists(target) and os.listdir(target)
    assert after == before


def test_37_two_runs_at_once(
    llmpare: Llmpare,
    zygote: tiny.Zygote,
    model: Path,
    out: Path,
    text: tiny.Text,
    undisturbed: dict[str, bytes],
) -> None:
    command = tiny.quantize(model, out, text)
    first = zygote.run(command, signum=signal.SIGSTOP, at=60)
    assert first.code == -signal.SIGSTOP
    start = time.monotonic()
    refused(llmpare, command, 7, f"another run (pid {first.pid}) is working in", str(out))
    assert time.monotonic() - start < 5
    assert zygote.resume().code == 0
    assert tiny.contents(out) == undisturbed


def test_37_a_killed_run_holds_no_lock(
    llmpare: Llmpare, zygote: tiny.Zygote, model: Path, out: Path, text: tiny.Text, undisturbed: dict[str, bytes]
) -> None:
    command = tiny.quantize(model, out, text)
    assert zygote.run(command, signum=signal.SIGKILL, at=60).code == -signal.SIGKILL
    assert "lock" in os.listdir(out.parent / "w4.partial")
    assert llmpare(command).code == 0
    assert tiny.contents(out) == undisturbed
