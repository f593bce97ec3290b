"""The only place that prints.

stdout carries the result and nothing else: a path, a plan, or with --json one JSON object, also when the run
failed. Everything else goes to stderr. Whatever comes from a model, a data set or a path is escaped, so that a
terminal shows it and never acts on it; nothing is wrapped or styled by a library that would interpret it.
"""

import io
import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from llmpare.compress.errors import OutputError
from llmpare.compress.report import show
from llmpare.compress.report.build import finite

RED, YELLOW, PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[0m"
CLEAR_LINE = "\r\x1b[K"


class StdoutClosed(Exception):
    """Whoever was reading our stdout has gone, as in `llmpare plan … | head`."""


class Plan(Protocol):
    """What a command would do."""

    def lines(self) -> list[str]:
        """For people."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""


class Output:
    """Where this process writes, and how.

    stdout, stderr: None when the process was started with them closed. environment: the process's variables, of
    which NO_COLOR, TERM and GITHUB_STEP_SUMMARY count. as_json: a first guess, for errors that come up before the
    flags are parsed and `configure` is called.
    """

    def __init__(
        self,
        stdout: TextIO | None,
        stderr: TextIO | None,
        environment: Mapping[str, str],
        *,
        as_json: bool = False,
    ) -> None:
        self._stdout = stdout
        self._stderr = stderr
        self._as_json = as_json
        self._quiet = False
        terminal = stderr is not None and stderr.isatty() and environment.get("TERM") != "dumb"
        self.live = terminal
        self._color = terminal and not environment.get("NO_COLOR")
        self._summary = environment.get("GITHUB_STEP_SUMMARY")
        self._line_shown = False
        self._result_shown = False
        for stream in (stdout, stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a path in an ASCII locale must not end the run

    def configure(self, *, as_json: bool, quiet: bool, no_color: bool) -> None:
        """What the parsed flags and the config file say about output."""
        self._as_json = as_json
        self._quiet = quiet
        self.live = self.live and not quiet
        self._color = self._color and not no_color

    def note(self, text: str) -> None:
        """A line of information; not shown with --quiet."""
        if not self._quiet:
            self._say("", "", text)

    def warn(self, text: str) -> None:
        self._say("warning: ", YELLOW, text)

    def error(self, text: str, hint: str, exit_code: int) -> None:
        """Why the run failed, on stderr; with --json also as the result, unless the result is already out."""
        self._say("error: ", RED, text)
        if hint:
            self._say("hint: ", "", hint)
        if self._as_json and not self._result_shown:
            error = {"message": text, "hint": hint, "exit_code": exit_code}
            try:
                self.result("", {"error": error})
            except (StdoutClosed, OutputError):
                return  # the reason is on stderr, and the exit code stays that of the error

    def status(self, text: str) -> None:
        """What is going on right now: one line of a terminal, overwritten by whatever comes next."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            self._write(CLEAR_LINE + show.printable(text)[:width])
            self._line_shown = True

    def clear_status(self) -> None:
        if self._line_shown:
            self._write(CLEAR_LINE)
            self._line_shown = False

    def _say(self, label: str, color: str, text: str) -> None:
        self.clear_status()
        if self._color and color:
            label = f"{color}{label}{PLAIN}"
        self._write(f"{label}{show.printable(text)}\n")

    def _write(self, text: str) -> None:
        if self._stderr is None:
            return
        try:
            self._stderr.write(text)
            self._stderr.flush()
        except (OSError, ValueError):
            self._stderr = None  # nobody reads it any more; hours of work must not end for that

    def result(self, text: str, data: Mapping[str, Any]) -> None:
        """The one result of the run: `text` for people and shells (lines of printable text), `data` with --json.

        Raises StdoutClosed when its reader has gone, OutputError when it cannot be written.
        """
        self.clear_status()
        if self._as_json:
            text = json.dumps(finite(data), allow_nan=False)
        if self._stdout is None:
            raise OutputError("standard output is closed, the result cannot be shown")
        try:
            self._stdout.write(text + "\n")
            self._stdout.flush()
        except BrokenPipeError:
            raise StdoutClosed from None
        except OSError as error:
            raise OutputError(f"standard output: {error.strerror}") from None
        self._result_shown = True

    def lines(self, lines: Iterable[str], data: Mapping[str, Any]) -> None:
        """A result of several lines."""
        self.result("\n".join(show.printable(line) for line in lines), data)

    def plan(self, plan: Plan) -> None:
        """A plan, which is made into text or data, not both: some models have tens of thousands of tensors."""
        if self._as_json:
            self.result("", plan.to_json())
        else:
            self.lines(plan.lines(), {})

    def path(self, path: Path, data: Mapping[str, Any]) -> None:
        """A result that is a folder, which is complete whether or not stdout can take its name."""
        try:
            self.result(show.printable(str(path)), data)
        except (StdoutClosed, OutputError):
            self._say("complete: ", "", str(path))
            raise

    def report(self, data: Mapping[str, Any]) -> None:
        """A result that is in no file: shown with --json; people have read its figures on stderr."""
        if self._as_json:
            self.result("", data)

    def version(self, number: str) -> None:
        self.result(f"llmpare {number}", {"version": number})

    def step_summary(self, markdown: str) -> None:
        """Append the report to the page of a CI job, where there is one."""
        if not self._summary:
            return
        try:
            with open(self._summary, "a", encoding="utf-8") as file:
                file.write(markdown + "\n")
        except OSError as error:
            self.warn(f"GITHUB_STEP_SUMMARY, {self._summary}: {error.strerror}")


def of_process(arguments: Iterable[str], environment: Mapping[str, str]) -> Output:
    """The output of this process, whose command line is `arguments`."""
    return Output(sys.stdout, sys.stderr, environment, as_json="--json" in arguments)
