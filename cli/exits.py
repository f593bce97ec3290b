"""How the process ends: the one table of exit codes, the one broad except, signals.

0 fine, 1 our bug, 2 command line, 3 input, 4 gate, --strict or a part not measured, 5 output, 6 memory, 7 busy,
128 + n stopped by signal n (130 SIGINT, 143 SIGTERM), 141 standard output closed by its reader.
"""

import errno
import os
import platform
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TextIO

import typer

from llmpare.cli.app import app
from llmpare.cli.output import Output, StdoutClosed, of_process
from llmpare.compress import errors, memory
from llmpare.compress.version import VERSION

BUG = 1
USAGE = 2
OUTPUT = 5
MEMORY = 6
EXIT_CODES: tuple[tuple[type[errors.LlmpareError], int], ...] = (
    (errors.UsageError, USAGE),
    (errors.InputError, 3),
    (errors.GateError, 4),
    (errors.OutputError, OUTPUT),
    (errors.MemoryLimitError, MEMORY),
    (errors.BusyError, 7),
)
STDOUT_CLOSED = 128 + signal.SIGPIPE

# What a write can end with although nothing is wrong with the program. A disk can fill up under any file we write,
# not only under those that the writer of checkpoints guards.
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


class Stopped(BaseException):
    """A signal asked us to stop. Not an Exception, so that nothing on the way out mistakes it for a failure."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; arguments default to those of the process."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    output = of_process(words, os.environ)
    _prefer_huge_pages()
    try:
        with _stopping_on_signals():
            code = app(words, prog_name="llmpare", standalone_mode=False, obj=output)
            return int(code or 0)
    except Stopped as stopped:
        resumes = words[:1] != ["evaluate"]  # which leaves nothing behind
        output.error("stopped; run the same command to resume" if resumes else "stopped", "", stopped.exit_code)
        return stopped.exit_code
    except (StdoutClosed, SystemExit):  # the latter is how typer ends when --help meets a closed pipe
        return STDOUT_CLOSED
    except Exception as error:
        return _explain(error, output)
    finally:
        _drop_unwritable(sys.stdout)
        _drop_unwritable(sys.stderr)


def _prefer_huge_pages() -> None:
    """Has torch, which is not loaded yet, ask for huge pages for large tensors, unless the user decided (Linux).

    Most systems give them only to who asks. One fault then takes the place of 512, which can take longer than the
    operations on what they bring.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _explain(error: Exception, output: Output) -> int:
    """Say why the run failed and return the exit code for it."""
    message, hint, code = str(error), "", BUG
    if isinstance(error, errors.LlmpareError):
        hint = error.hint
        code = next((number for kind, number in EXIT_CODES if isinstance(error, kind)), BUG)
    elif isinstance(error, typer.TyperException):
        message, hint, code = error.format_message(), "llmpare --help, llmpare COMMAND --help", USAGE
    elif memory.exhausted(error):
        hint = "see --max-memory, --nsamples and --seqlen; --device cpu does without the memory of a GPU"
        message, code = "out of memory", MEMORY
    elif isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        place = "" if error.filename is None else f"{error.filename}: "
        message, code = f"{place}{error.strerror}", OUTPUT
    if code == BUG:
        message = f"a bug in llmpare: {type(error).__name__}: {error}"
        hint = f"please report it with {_record(error)}"
    output.error(message, hint, code)
    return code


def _record(error: Exception) -> str:
    """Write the traceback to a file and return its path; where no file can be had, the traceback itself."""
    about = f"llmpare {VERSION}, Python {platform.python_version()}, {platform.platform()}"
    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="llmpare-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"{about}\n{sys.argv}\n\n{trace}")
    except OSError:
        return trace
    return file.name


@contextmanager
def _stopping_on_signals() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM raises Stopped and the second ends the process at once."""

    def stop_now(signum: int, _frame: FrameType | None) -> NoReturn:
        os._exit(128 + signum)

    def stop(signum: int, _frame: FrameType | None) -> NoReturn:
        for each in before:
            signal.signal(each, stop_now)
        raise Stopped(signum)

    # A signal that was ignored when we were started (nohup, a background job) stays ignored.
    wanted = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {each: signal.signal(each, stop) for each in wanted}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _drop_unwritable(stream: TextIO | None) -> None:
    """Send what a stream could not write nowhere, or the interpreter would fail once more on its way out."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
