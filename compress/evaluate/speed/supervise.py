"""Runs a worker and goes on after it dies: the case that killed it is reported, the rest are tried without it."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import IO, Any, TextIO

from llmpare.compress.evaluate.speed.engine import Case, Job

WORKER = "llmpare.compress.evaluate.speed.worker"
GLANCE = 1.0  # seconds between looks at whether a silent worker still lives
PATIENCE = 1800.0  # seconds without a word from a worker, after which it is taken for hung


def supervise(job: Job) -> Iterator[dict[str, Any]]:
    """What the workers of a job tell, with cases in place of their numbers.

    {"loaded": facts}; {"case": Case, "sample": fields of worker.Sample}; {"case": Case or None, "why": text} for a
    case that was not measured, None where the engine did not even load. A growing series ends with its first failure.
    """
    left = job.cases
    while left:
        current: Case | None = None
        after = 0  # index of the first case that is not over
        error = ""
        with _worker(replace(job, cases=left)) as (process, messages, output):
            for message in messages:
                error = message.get("error", error)
                if "loaded" in message:
                    yield message
                elif "begin" in message:
                    current = left[message["begin"]]
                elif "done" in message or "skip" in message:
                    index = message.pop("done" if "done" in message else "skip")
                    current, after = None, index + 1
                    yield {
                        "case": left[index],
                        **({"why": message["why"]} if "why" in message else {"sample": message}),
                    }
            status = process.wait()
            if status == 0 and not error:
                return
            why = _why(status, error, output)
        yield {"case": current, "why": why}
        if current is None and after == 0:  # no case's fault: a second attempt would end the same way
            return
        rest = left[after:] if current is None else left[left.index(current) + 1 :]
        left = tuple(case for case in rest if not (current and current.growing and case.growing))


@contextmanager
def _worker(job: Job) -> Iterator[tuple["subprocess.Popen[bytes]", Iterator[dict[str, Any]], IO[bytes]]]:
    """A running worker, its messages, and what it prints. It and all that it started are gone afterwards."""
    fields = asdict(job) | {"model": str(job.model.resolve())}
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as output, os.fdopen(reader, encoding="utf-8") as pipe:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER, str(writer)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(writer,),
            start_new_session=True,
        )
        try:
            os.close(writer)
            assert process.stdin is not None
            process.stdin.write(json.dumps(fields).encode())
            process.stdin.close()
            yield process, _messages(process, pipe), output
        finally:
            _end(process)


def _messages(process: "subprocess.Popen[bytes]", pipe: TextIO) -> Iterator[dict[str, Any]]:
    """The lines of the pipe until it closes or the worker is gone; what it left behind may hold the pipe open.

    A worker that says nothing for too long is ended.
    """
    pending, heard = b"", time.monotonic()
    while True:
        ready, _, _ = select.select([pipe], [], [], GLANCE)
        if ready:
            data = os.read(pipe.fileno(), 65536)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            yield from (json.loads(line) for line in lines)
            heard = time.monotonic()
        elif process.poll() is not None:
            return
        elif time.monotonic() - heard > PATIENCE:
            yield {"error": f"it said nothing for {PATIENCE:.0f} s"}
            _end(process)
            return


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends the worker's whole process group; an engine may have started processes of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _why(status: int, error: str, output: IO[bytes]) -> str:
    """What a worker that died said, or else how it died and the last line it printed."""
    if error:
        return error
    output.seek(0)
    printed = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    how = f"it was ended by {signal.Signals(-status).name}" if status < 0 else f"it ended with status {status}"
    return f"{how}; the last it printed: {printed[-1]}" if printed else how
