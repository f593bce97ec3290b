"""What is printed where: escaped data, live and plain progress, colours, the job summary."""

import io
import json
import math
import os
import pty
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llmpare.cli.output import Output
from llmpare.cli.progress import Watcher
from llmpare.compress.errors import OutputError

Start = Callable[..., "subprocess.Popen[str]"]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

QUANTIZE = ("quantize", "model", "-o", "out")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain_and_terminal(**environment: str) -> tuple[Output, io.StringIO, Output, Terminal]:
    plain, terminal = io.StringIO(), Terminal()
    return Output(io.StringIO(), plain, environment), plain, Output(io.StringIO(), terminal, environment), terminal


HOSTILE = "a\x1b[2Jb\nerror: forged\r[/x][int4]\u202e"
ESCAPED = "a\\x1b[2Jb\\nerror: forged\\r[/x][int4]\\u202e"


def test_data_is_escaped_wherever_it_is_shown() -> None:
    stdout, stderr = io.StringIO(), Terminal()
    output = Output(stdout, stderr, {"NO_COLOR": "1"})
    output.note(HOSTILE)
    output.warn(HOSTILE)
    output.error(HOSTILE, HOSTILE, 3)
    output.lines([HOSTILE, "second"], {})
    output.path(Path(HOSTILE), {})
    assert stderr.getvalue() == f"{ESCAPED}\nwarning: {ESCAPED}\nerror: {ESCAPED}\nhint: {ESCAPED}\n"
    assert stdout.getvalue() == f"{ESCAPED}\nsecond\n{ESCAPED}\n"


def test_row_18_hostile_paths_end_as_harmless_ones_do(llmpare: Run) -> None:
    hostile = "mod\x1b[2Jel\n[/x]"
    done = llmpare("finish", "quantize", hostile, "-o", f"out{hostile}")
    assert done.returncode == 0
    assert done.stdout == "outmod\\x1b[2Jel\\n[/x]\n"
    assert "\x1b" not in done.stderr
    exact = json.loads(llmpare("finish", "quantize", hostile, "-o", f"out{hostile}", "--json").stdout)
    assert exact["request"]["out"] == f"out{hostile}"


def test_the_log_has_a_line_per_block_and_no_control_codes(llmpare: Run) -> None:
    done = llmpare("finish", *QUANTIZE, environment={"GITHUB_ACTIONS": "true", "FORCE_COLOR": "1", "COLUMNS": "20"})
    lines = done.stderr.splitlines()
    assert lines[0] == "starting"
    blocks = [line for line in lines if "block" in line and "of 3" in line]
    assert blocks == [f"compressing: block {n} of 3, relative error 0.00123, seconds 0.5" for n in (1, 2, 3)]
    assert "warning: odd name \\x1b[2J[/x]\\nüber" in lines
    assert all(line.isprintable() for line in lines)


def test_with_json_stdout_is_one_object(llmpare: Run) -> None:
    done = llmpare("finish", *QUANTIZE, "--json")
    assert json.loads(done.stdout)["request"]["out"] == "out"
    assert done.stdout.count("\n") == 1


def test_quiet_leaves_warnings_and_the_result(llmpare: Run) -> None:
    done = llmpare("finish", *QUANTIZE, "--quiet")
    assert done.stdout == "out\n"
    assert done.stderr == "warning: odd name \\x1b[2J[/x]\\nüber\n"


def on_a_terminal(start: Start, *arguments: str, **environment: str) -> str:
    """stderr of a run whose stderr is a terminal."""
    master, slave = pty.openpty()
    process = start("finish", *QUANTIZE, *arguments, stderr=slave, environment={"TERM": "xterm"} | environment)
    os.close(slave)
    said = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # how Linux reports the end of a terminal
            break
        if not chunk:
            break
        said += chunk
    os.close(master)
    process.communicate(timeout=30)
    assert process.returncode == 0
    return said.decode()


def test_a_terminal_has_one_live_line(start: Start) -> None:
    said = on_a_terminal(start)
    assert "\r\x1b[Kcompressing: block 3 of 3" in said
    assert said.count("block 1 of 3") == 1
    shown = said.split("\r\x1b[K")[-1]
    assert "written     out" in shown, "the summary must not share the live line"


def test_colours_are_for_terminals_that_want_them(start: Start) -> None:
    assert "\x1b[33mwarning: \x1b[0m" in on_a_terminal(start)
    assert "\x1b[33m" not in on_a_terminal(start, "--no-color")
    assert "\x1b[33m" not in on_a_terminal(start, NO_COLOR="1")
    assert "\x1b" not in on_a_terminal(start, TERM="dumb")


def test_a_live_line_is_cut_to_the_width_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    _, _, output, terminal = plain_and_terminal()
    output.status("x" * 100)
    assert terminal.getvalue() == "\r\x1b[K" + "x" * 19


def test_a_warning_clears_the_live_line_first() -> None:
    _, _, output, terminal = plain_and_terminal(NO_COLOR="1")
    watcher = Watcher(output)
    watcher.phase("loading")
    watcher.warn("odd")
    assert terminal.getvalue() == "\r\x1b[Kloading\r\x1b[Kwarning: odd\n"


def test_a_run_leaves_no_live_line_behind() -> None:
    _, _, output, terminal = plain_and_terminal()
    with Watcher(output) as watcher:
        watcher.phase("loading")
    assert terminal.getvalue() == "\r\x1b[Kstarting\r\x1b[Kloading\r\x1b[K"


def test_the_time_left_is_only_guessed_on_a_terminal() -> None:
    plain, log, live, terminal = plain_and_terminal()
    for output in (plain, live):
        watcher = Watcher(output, clock=iter((0.0, 10.0, 16.0)).__next__)
        watcher.phase("compressing")
        watcher.block(1, 5, {})
    assert "compressing: block 2 of 5, about 9.0 s left" in terminal.getvalue()
    assert log.getvalue() == "compressing\ncompressing: block 2 of 5\n"


def test_what_is_not_finite_is_null_in_json() -> None:
    stdout = io.StringIO()
    Output(stdout, None, {}, as_json=True).result("", {"a": math.nan, "b": [math.inf]})
    assert json.loads(stdout.getvalue()) == {"a": None, "b": [None]}


def test_an_error_after_the_result_does_not_make_a_second_object() -> None:
    stdout = io.StringIO()
    output = Output(stdout, io.StringIO(), {}, as_json=True)
    output.result("", {"passed": False})
    output.error("gate failed", "", 4)
    assert json.loads(stdout.getvalue()) == {"passed": False}


def test_closed_streams() -> None:
    output = Output(None, None, {})
    output.note("to nobody")
    with pytest.raises(OutputError, match="standard output is closed"):
        output.result("x", {})


def test_the_job_summary_gets_the_report_appended(llmpare: Run, tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("what an earlier step wrote\n", encoding="utf-8")
    environment = {"GITHUB_STEP_SUMMARY": str(summary)}
    assert llmpare("finish", *QUANTIZE, environment=environment).returncode == 0
    assert llmpare("fail-gate", *QUANTIZE, environment=environment).returncode == 4
    page = summary.read_text(encoding="utf-8")
    assert page.startswith("what an earlier step wrote\n# `model`")
    assert page.count("| KL divergence") == 2
    assert "**Not passed.**" in page


def test_a_job_summary_that_cannot_be_written_is_a_warning(llmpare: Run) -> None:
    done = llmpare("finish", *QUANTIZE, environment={"GITHUB_STEP_SUMMARY": "/none/such"})
    assert done.returncode == 0
    assert "warning: GITHUB_STEP_SUMMARY, /none/such: No such file or directory" in done.stderr
