"""How the process ends: every exit code, signals, lost outputs."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "subprocess.Popen[str]"]

QUANTIZE = ("quantize", "model", "-o", "out")


def test_a_finished_run(llmpare: Run) -> None:
    done = llmpare("finish", *QUANTIZE)
    assert done.returncode == 0
    assert done.stdout == "out\n"
    assert "58.29 -> 58.41" in done.stderr


@pytest.mark.parametrize(
    ("behaviour", "code", "said"),
    [
        ("usage", 2, "error: no such thing\nhint: do the other thing\n"),
        ("input", 3, "error: bad file \\x1b[2J[/x]\\nüber\nhint: fetch it again\n"),
        ("fail-gate", 4, "error: max-kl: not finite, the limit is 0.001\n"),
        ("output", 5, "error: cannot write\n"),
        ("disk-full", 5, "error: out/w4.partial/x: No space left on device\n"),
        ("memory", 6, "error: too big\n"),
        ("python-memory", 6, "error: out of memory\n"),
        ("torch-memory", 6, "error: out of memory\n"),
        ("device-memory", 6, "error: out of memory\nhint: see --max-memory"),
        ("busy", 7, "error: pid 1 is at it\n"),
    ],
)
def test_exit_codes(llmpare: Run, behaviour: str, code: int, said: str) -> None:
    done = llmpare(behaviour, *QUANTIZE)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("behaviour", "code"), [("usage", 2), ("input", 3), ("busy", 7), ("bug", 1)])
def test_with_json_a_failure_is_one_object_on_stdout(llmpare: Run, behaviour: str, code: int) -> None:
    done = llmpare(behaviour, *QUANTIZE, "--json")
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == code == done.returncode
    assert error["message"] in {"no such thing", "bad file \x1b[2J[/x]\nüber", "pid 1 is at it"} or code == 1
    assert done.stdout.isascii()


def test_a_gate_that_fails_leaves_the_report_as_the_one_result(llmpare: Run) -> None:
    done = llmpare("fail-gate", *QUANTIZE, "--json")
    assert done.returncode == 4
    report = json.loads(done.stdout)
    assert report["passed"] is False
    assert report["gates"][0]["value"] is None
    assert llmpare("fail-gate", *QUANTIZE).stdout == "out\n"


@pytest.mark.parametrize(("behaviour", "error"), [("bug", "KeyError"), ("os-bug", "OSError")])
def test_a_bug_of_ours_leaves_its_traceback_in_a_file(llmpare: Run, tmp_path: Path, behaviour: str, error: str) -> None:
    done = llmpare(behaviour, *QUANTIZE, environment={"TMPDIR": str(tmp_path)})
    assert done.returncode == 1
    assert f"a bug in llmpare: {error}" in done.stderr
    assert "Traceback" not in done.stderr
    named = re.search(r"report it with (\S+)", done.stderr)
    assert named is not None
    record = Path(named[1]).read_text(encoding="utf-8")
    assert "Traceback" in record
    assert error in record
    assert "llmpare 0." in record


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Missing command"),
        (("quantise",), "No such command 'quantise'"),
        (("quantize", "model", "-o", "out", "--bitz", "4"), "--bits"),
        (("quantize", "model", "--quiet", "-o"), "-o"),
        (("quantize", "model", "-o", "--force"), "--out: expected a path"),
        (("quantize", "model", "two", "-o", "out"), "two"),
    ],
)
def test_a_wrong_command_line(llmpare: Run, arguments: tuple[str, ...], said: str) -> None:
    done = llmpare("finish", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""
    as_json = llmpare("finish", *arguments, "--json")
    assert as_json.returncode == 2
    assert json.loads(as_json.stdout)["error"]["exit_code"] == 2


def _until(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stderr is not None
    assert any(line in said for said in process.stderr), f"never said {line!r}"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_in_order(start: Start, tmp_path: Path, signum: int, code: int) -> None:
    process = start("hang", *QUANTIZE, "--json")
    _until(process, "working")
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=10)
    assert process.returncode == code
    assert "stopped; run the same command to resume" in stderr
    assert json.loads(stdout)["error"]["exit_code"] == code
    assert (tmp_path / "out.closed").exists(), "the engine was not given the time to close its files"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_the_run_at_once(start: Start, signum: int) -> None:
    process = start("hang-twice", *QUANTIZE)
    _until(process, "working")
    process.send_signal(signum)
    _until(process, "closing")
    before = time.monotonic()
    process.send_signal(signum)
    process.communicate(timeout=10)
    assert process.returncode == 128 + signum
    assert time.monotonic() - before < 5


def test_a_signal_that_is_ignored_from_outside_stays_ignored(start: Start) -> None:
    """As under nohup, or for SIGINT in a background job of a script."""
    process = start("hang", *QUANTIZE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    _until(process, "working")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 143


@pytest.mark.parametrize("flags", [(), ("--json",), ("--quiet",)])
def test_a_reader_that_left(start: Start, flags: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start("finish", *QUANTIZE, *flags, stdout=writer)
    os.close(writer)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 141
    assert "complete: out" in stderr
    assert "Exception ignored" not in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("flags", [(), ("--json",), ("--quiet",)])
def test_a_full_disk_under_stdout(start: Start, flags: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        _, stderr = (process := start("finish", *QUANTIZE, *flags, stdout=full)).communicate(timeout=30)
    assert process.returncode == 5
    assert "complete: out" in stderr
    assert "No space left on device" in stderr
    assert "Exception ignored" not in stderr


def test_stdout_closed_from_the_start(start: Start) -> None:
    process = start("finish", *QUANTIZE, preexec_fn=lambda: os.close(1))
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 5
    assert "complete: out" in stderr


def test_a_stderr_that_nobody_reads_does_not_end_the_run(start: Start) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start("finish", *QUANTIZE, stderr=writer)
    os.close(writer)
    stdout, _ = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (0, "out\n")


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_an_ascii_locale(llmpare: Run, flags: tuple[str, ...]) -> None:
    ascii_only: dict[str, Any] = {
        "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"
    }  # fmt: skip
    done = llmpare("finish", "quantize", "modèle", "-o", "outé", *flags, environment=ascii_only)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert done.stderr.isascii()


def test_help_into_a_closed_pipe(start: Start) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start("finish", "--help", stdout=writer)
    os.close(writer)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 141
    assert stderr == ""
