"""Makes a finished folder visible in one step, and proves later that it is still what was made.

The work goes on in OUT.partial, beside OUT. When it is done a manifest is written there and the folder is renamed to
OUT, so that nothing called OUT is ever incomplete. Whatever step a kill interrupts, the same command ends well:
OUT.partial with a manifest only needs the rename, and OUT with a lock in it only needs its leftovers removed.
"""

import fcntl
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmpare.compress.checkpoint.files import (
    copy_file,
    destination,
    files_below,
    is_temporary,
    shown,
    sync_folder,
    write_file,
    writing,
)
from llmpare.compress.checkpoint.journal import differences, require_same
from llmpare.compress.checkpoint.manifest import (
    JOURNAL,
    LOCK,
    MANIFEST,
    build_manifest,
    finished,
    read_manifest,
    signed,
    verify,
)
from llmpare.compress.errors import BusyError, InputError, OutputError

__all__ = [
    "JOURNAL",
    "MANIFEST",
    "Workspace",
    "build_manifest",
    "copy_file",
    "finished",
    "settle",
    "verify",
    "write_file",
]

SIGNATURE = "llmpare"  # how a lock of ours begins


class Workspace:
    """The right to produce OUT, for as long as the context lasts, and the folder to do it in.

    partial: the folder to work in, OUT.partial. journal: where the journal belongs. messages: what was found damaged
    and is redone. On entry raises OutputError when OUT cannot become what it should, BusyError when another run is at
    it. On exit a folder in which nothing was journalled is removed; one with a journal is kept for the next run.
    """

    def __init__(self, out: Path, *, force: bool, restart: bool, spec: Mapping[str, Any] | None = None) -> None:
        """spec: what is asked for, to say in what a finished OUT differs from it."""
        self.out = destination(out)
        self.partial = _sibling(self.out, ".partial")
        self.journal = self.partial / JOURNAL
        self.messages: list[str] = []
        self._spec = spec
        self._force = force
        self._restart = restart
        self._lock: int | None = None

    def __enter__(self) -> Self:
        _refuse_unusual(self.out)
        _refuse_unusual(self.partial)
        with ExitStack() as on_failure:
            self._lock = _acquire(self.partial)
            on_failure.callback(self._release)
            with writing(self.partial / LOCK):
                # One call of fixed length: a kill leaves the old line or the new one.
                os.pwrite(self._lock, f"{SIGNATURE} pid {os.getpid():<12}\n".encode(), 0)
            _roll_back(self.out)
            settle(self.out)
            self._refuse_occupied()
            with writing(self.partial):
                self._tidy()
            on_failure.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def pending(self, spec: Mapping[str, Any]) -> dict[str, Any] | None:
        """The manifest of a run that was killed when all was done but the rename; to be given to `publish`.

        None when there is none, or when the files are not what it says (see `messages`): then the work goes on.
        Raises InputError when it was made with another spec.
        """
        if not os.path.lexists(self.partial / MANIFEST):
            return None
        try:
            manifest = read_manifest(self.partial)
            if finished(self.partial, spec):
                verify(self.partial)
        except InputError as error:
            self.messages.append(f"{error.message}, redoing")
            with writing(self.partial):
                os.unlink(self.partial / MANIFEST)
            return None
        require_same(manifest["spec"], spec, self.partial)
        return manifest

    def publish(self, manifest: Mapping[str, Any]) -> None:
        """Turns OUT.partial into OUT, complete with its manifest. Raises OutputError."""
        write_file(self.partial / MANIFEST, signed(manifest))
        replaced = _sibling(self.out, ".replaced")
        with writing(self.partial):
            self.journal.unlink(missing_ok=True)
            for folder, _, _ in os.walk(self.partial):
                sync_folder(Path(folder))
        with writing(self.out):
            if _entries(self.out) and self._force:
                os.rename(self.out, replaced)
            try:
                os.rename(self.partial, self.out)
            except OSError:
                _roll_back(self.out)
                raise
            sync_folder(self.out.parent)
        _remove_leftovers(self.out)
        self._close()

    def _refuse_occupied(self) -> None:
        if self.out.is_mount():
            raise OutputError(
                f"{shown(self.out)} is a mount point and cannot be put in place in one step",
                "name a folder inside it",
            )
        replaced = _sibling(self.out, ".replaced")
        if os.path.lexists(replaced):
            raise OutputError(f"{shown(replaced)} is in the way, a run needs that name", "move it away")
        with writing(self.out):
            entries = _entries(self.out)
        if not entries:
            return
        if not self._force:
            raise OutputError(
                f"{shown(self.out)} exists and {self._occupant(entries)}",
                "choose another name with -o, or --force to replace the whole folder",
            )
        if Path.cwd().is_relative_to(self.out):
            raise OutputError(f"{shown(self.out)} is the current folder or one above it; --force would delete it")

    def _occupant(self, entries: Sequence[str]) -> str:
        with suppress(InputError):
            found = read_manifest(self.out)["spec"]
            if self._spec is not None:
                return f"was made with other settings: {differences(found, self._spec)}"
        return f"holds something else, {shown(entries[0])} for example"

    def _tidy(self) -> None:
        """Leaves in OUT.partial only what can be taken up again."""
        if self._restart or not self._is_resumable():
            _clear(self.partial)
        for path in files_below(self.partial):
            if is_temporary(path.name):
                os.unlink(path)

    def _is_resumable(self) -> bool:
        return os.path.lexists(self.journal) or os.path.lexists(self.partial / MANIFEST)

    def _release(self) -> None:
        if self._lock is None:
            return
        # After a publish the name OUT.partial is another run's.
        if _is_same_file(self._lock, self.partial / LOCK) and not self._is_resumable():
            with suppress(OSError):  # nothing is lost when it stays, and the error on its way out says more
                _clear(self.partial)
                os.unlink(self.partial / LOCK)
                os.rmdir(self.partial)
        self._close()

    def _close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def settle(out: Path) -> None:
    """Finishes a publish that was killed after OUT became visible: removes the folder it replaced and the lock.

    Raises BusyError when that run is alive, OutputError when the file system does.
    """
    if not (os.path.lexists(out / MANIFEST) and _is_our_lock(out / LOCK)):
        return
    with writing(out / LOCK):
        try:
            fd = os.open(out / LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            return  # that run has just done it itself
        try:
            _lock_or_busy(fd, out)
            if _is_same_file(fd, out / LOCK):
                _remove_leftovers(out)
        finally:
            os.close(fd)


def _remove_leftovers(out: Path) -> None:
    """The lock goes last: as long as it is there, OUT.replaced is known to be ours."""
    replaced = _sibling(out, ".replaced")
    with writing(replaced):
        if os.path.lexists(replaced):
            shutil.rmtree(replaced)
        (out / LOCK).unlink(missing_ok=True)


def _roll_back(out: Path) -> None:
    """Undoes a publish that was killed between moving the old OUT away and putting the new one in place."""
    replaced = _sibling(out, ".replaced")
    manifest = _sibling(out, ".partial") / MANIFEST
    if os.path.lexists(manifest) and os.path.lexists(replaced) and not os.path.lexists(out):
        with writing(out):
            os.rename(replaced, out)


def _acquire(partial: Path) -> int:
    """Creates and locks OUT.partial. The kernel frees the lock with the descriptor returned, or with the process."""
    path = partial / LOCK
    while True:
        with writing(partial):
            partial.mkdir(parents=True, exist_ok=True)
            entries = _entries(partial)
        if entries and LOCK not in entries:  # ours is the first file to come and the last to go
            raise _not_ours(partial)
        with writing(path), ExitStack() as on_failure:
            on_failure.callback(_remove_if_empty, partial)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:
                continue  # the run before us has removed or published the folder just now
            on_failure.callback(os.close, fd)
            _lock_or_busy(fd, partial)
            if not _is_same_file(fd, path):
                continue  # likewise, between the open and the lock
            if set(_entries(partial)) != {LOCK} and not _is_our_lock(path):
                raise _not_ours(partial)
            on_failure.pop_all()
            return fd


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        os.rmdir(folder)


def _not_ours(partial: Path) -> OutputError:
    return OutputError(
        f"{shown(partial)} holds files that are not ours", "move it away, or choose another name with -o"
    )


def _lock_or_busy(fd: int, folder: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(fd, 64, 0).decode(errors="replace").removeprefix(SIGNATURE).strip()
        raise BusyError(
            f"another run ({holder or 'just started'}) is working in {shown(folder)}",
            "wait for it, or stop it",
        ) from error


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _is_our_lock(path: Path) -> bool:
    """Whether this is a lock of ours. Nothing is removed beside one that is not."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode) and os.pread(fd, len(SIGNATURE), 0) == SIGNATURE.encode()
    finally:
        os.close(fd)


def _refuse_unusual(path: Path) -> None:
    """A symbolic link, a file or a device in the place of a folder is not replaced, with or without --force."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"cannot write {shown(path)}: {error.strerror}") from error
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFREG: "a file", stat.S_IFIFO: "a pipe"}
    if not stat.S_ISDIR(mode):
        kind = kinds.get(stat.S_IFMT(mode), "a device or socket")
        raise OutputError(f"{shown(path)} is {kind}, expected a folder or nothing", "choose another name with -o")


def _sibling(out: Path, suffix: str) -> Path:
    return out.parent / (out.name + suffix)


def _entries(folder: Path) -> list[str]:
    """The names in a folder, sorted; none if there is no folder."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _clear(partial: Path) -> None:
    """Empties OUT.partial but for the lock."""
    for name in _entries(partial):
        path = partial / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif name != LOCK:
            os.unlink(path)
