"""File operations that say whose fault a failure is, and writes that survive a power cut.

An OSError while reading becomes an InputError and one while writing an OutputError, here and nowhere else.
"""

import errno
import hashlib
import json
import os
import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from llmpare.compress.errors import InputError, OutputError

SHOWN = 300  # characters of a name or path that a message shows
CHUNK = 1 << 20

_WRITE_HINTS = {
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some of the quota, then run the same command again",
    errno.EROFS: "choose another place with -o",
    errno.EACCES: "choose another place with -o",
    errno.EPERM: "choose another place with -o",
}


def shown(name: object) -> str:
    """A name or path as it may appear in a message: quoted, control codes escaped, of bounded length."""
    return repr(clipped(name))


def clipped(value: object) -> str:
    """A value as text of bounded length."""
    text = str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def destination(out: Path) -> Path:
    """Where the system puts `out`, as an absolute path; a symbolic link in its last place is not followed."""
    return out.resolve() if out.name in ("", "..") else out.parent.resolve() / out.name


def nested(one: Path, other: Path) -> bool:
    """Whether two absolute paths, without links, are the same or lie inside each other."""
    return one == other or one in other.parents or other in one.parents


class Closing(ABC):
    """What is closed at the end of its `with` block."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError into an InputError that names `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {shown(path)}: {error.strerror or error}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError into an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        hint = _WRITE_HINTS.get(error.errno or 0, "")
        raise OutputError(f"cannot write {shown(path)}: {error.strerror or error}", hint) from error


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file descriptor to read the regular file `path` with. Raises InputError for anything else."""
    fd = open_regular(path)
    try:
        yield fd
    finally:
        os.close(fd)


def open_regular(path: Path) -> int:
    """Like `opened`, for a descriptor that outlives the call."""
    with reading(path):
        # Without O_NONBLOCK the open of a FIFO waits for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError(f"{shown(path)} is not a regular file")
    return fd


def read_at(fd: int, offset: int, size: int, path: Path) -> bytearray:
    """Exactly `size` bytes from `offset`. Raises InputError when the file ends before; safe in any thread."""
    data = bytearray(size)
    view = memoryview(data)
    done = 0
    while done < size:
        with reading(path):
            count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise InputError(
                f"{shown(path)} is truncated: expected at least {offset + size} bytes, it has {os.fstat(fd).st_size}"
            )
        done += count
    return data


def sha256_at(fd: int, offset: int, size: int, path: Path) -> str:
    """The sha256 of what `read_at` reads, in hexadecimal, without holding more than a piece of it."""
    digest = hashlib.sha256()
    for start in range(0, size, CHUNK):
        digest.update(read_at(fd, offset + start, min(CHUNK, size - start), path))
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with opened(path) as fd, reading(path), open(fd, "rb", buffering=0, closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, *, limit: int, unique: bool = False) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; see `parse_json`."""
    return parse_json(read_file(path, limit=limit), path, unique=unique)


def read_file(path: Path, *, limit: int) -> bytearray:
    """The bytes of a regular file of at most `limit` bytes. Raises InputError."""
    with opened(path) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise InputError(f"{shown(path)} has {size:,} bytes, more than the {limit:,} allowed for such a file")
        return read_at(fd, 0, size, path)


def parse_json(data: bytes | bytearray, path: Path, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object in `data`, which came from `path`. unique: a key that occurs twice is an error.

    Raises InputError with line and column.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: dict[str, Any] = {}
            for key, value in pairs:
                if key in seen:
                    places = f"{shown(seen[key])} and {shown(value)}"
                    raise InputError(f"{shown(path)}: {shown(key)} occurs twice: {places}")
                seen[key] = value
        return found

    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=without_duplicates if unique else None)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise InputError(f"{shown(path)}:{line}:{column}: is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{shown(path)}:{error.lineno}:{error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise InputError(f"{shown(path)}:1:1: is nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{shown(path)}:1:1: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{shown(path)}:1:1: holds a {type(value).__name__}, expected an object {{…}}")
    return value


def create(path: Path) -> int:
    """A new or emptied file to write; the mode is left to the umask, and a symbolic link is not followed."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)


def allocate(fd: int, size: int) -> None:
    """Makes the file `size` bytes long, with blocks on disk where the file system can reserve them."""
    if sys.platform == "darwin":  # has no such call
        os.ftruncate(fd, size)
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        os.ftruncate(fd, size)


def write_at(fd: int, offset: int, data: bytes | memoryview) -> None:
    """All of `data` at `offset`, however many calls it takes."""
    view = memoryview(data)
    while view.nbytes:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.EOPNOTSUPP,
        ):  # some network file systems have no such thing
            raise
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file so that, whatever happens, `path` holds all of `data` or what it held before.

    Creates the folder. Raises OutputError.
    """
    with _replacing(path) as fd:
        write_at(fd, 0, data)


def copy_file(source: Path, path: Path) -> None:
    """Copies the bytes of a regular file with the guarantees of `write_file`. Raises InputError, OutputError."""
    with opened(source) as original, _replacing(path) as fd:
        offset = 0
        while chunk := _read_some(original, offset, source):
            write_at(fd, offset, chunk)
            offset += len(chunk)


def _read_some(fd: int, offset: int, path: Path) -> bytes:
    with reading(path):
        return os.pread(fd, CHUNK, offset)


def files_below(folder: Path) -> Iterator[Path]:
    """Every file in a folder and its sub-folders."""
    for where, _, files in os.walk(folder):
        for name in files:
            yield Path(where, name)


def temporary(name: str) -> str:
    """What a file is called until `write_file` has written it."""
    return f".{name}.tmp"


def is_temporary(name: str) -> bool:
    """Whether a file name is one that a kill may leave behind: of `write_file`, or of a file about to lose its name."""
    return name.startswith(".") and name.endswith(".tmp")


@contextmanager
def _replacing(path: Path) -> Iterator[int]:
    unfinished = path.with_name(temporary(path.name))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = create(unfinished)
        complete = False
        try:
            yield fd
            os.fsync(fd)
            complete = True
        finally:
            os.close(fd)
            if not complete:
                with suppress(OSError):  # the failure that matters is the one on its way out
                    os.unlink(unfinished)
        os.replace(unfinished, path)
        sync_folder(path.parent)
