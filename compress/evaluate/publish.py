"""Where the report of an evaluation goes."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from llmpare.compress.checkpoint.files import read_file, shown, temporary, write_file, writing
from llmpare.compress.errors import OutputError
from llmpare.compress.evaluate.request import EvaluateRequest
from llmpare.compress.report import files, junit

MAX_REPORT = 2**28  # bytes


@contextmanager
def prepared(request: EvaluateRequest) -> Iterator[None]:
    """Makes the folders, so that hours of work do not end at a place that cannot be written, and on a failure removes
    that of the report again if it is empty.

    Raises OutputError when one cannot be made, and when it holds anything but an earlier evaluation's report.
    """
    for path in (request.out, request.junit.parent if request.junit else None):
        if path is not None:
            with writing(path):
                os.makedirs(path, exist_ok=True)
    with ExitStack() as on_failure:
        if request.out is not None:
            on_failure.callback(_remove_if_empty, request.out)
            _refuse_occupied(request.out, request.junit)
        yield
        on_failure.pop_all()


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        os.rmdir(folder)


def _refuse_occupied(out: Path, junit: Path | None) -> None:
    if not os.access(out, os.W_OK):
        raise OutputError(f"{shown(out)} cannot be written", "choose another place with -o")
    beside = [junit.name] if junit is not None and junit.parent.resolve() == out.resolve() else []
    written = [*files.REPORTS, *beside]
    ours = {*written, *map(temporary, written)}  # the latter a kill may have left behind
    others = sorted(name for name in os.listdir(out) if name not in ours)
    if others or not _replaceable(out / files.JSON):
        what = shown(others[0]) if others else "the report of another command"
        raise OutputError(f"{shown(out)} holds {what}", "choose another place with -o")


def _replaceable(path: Path) -> bool:
    """Whether there is no report, or one that evaluate made."""
    if not path.exists():
        return True
    try:
        found = json.loads(read_file(path, limit=MAX_REPORT))
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("command") == "evaluate"


def write(request: EvaluateRequest, report: Mapping[str, Any]) -> None:
    """Writes what the request asks for."""
    if request.out is not None:
        files.write(request.out, report)
    if request.junit is not None:
        write_file(request.junit, junit.render(report).encode())
