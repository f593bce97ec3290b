"""How much memory this process may still take, as the machine and its limits tell; no torch."""

import ctypes
import os
import resource
from pathlib import Path

GIB = 2**30

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of malloc.h, with an M in front
_OF_DEVICES = ("STATUS_ALLOC_FAILED", "CUDA error: out of memory")  # of cuBLAS and its like, and of the driver
_LARGE, _HUGE = 4 * 2**20, 8 * 2**20  # bytes from which an allocation is mapped on its own: when lean, and when not


def available() -> int:
    """Bytes this process can still allocate: the least of free memory, control-group limit and address-space limit."""
    limits = [_meminfo(), _cgroup(), _address_space()]
    return min(limit for limit in limits if limit is not None)


def physical() -> int:
    """Bytes of memory the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes of physical memory this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """The most physical memory this program ever held, in bytes.

    Not ru_maxrss, which starts at what the process held before it became this program: a large parent's memory.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def forget_peak() -> None:
    """Lets `peak_resident` count from what is held now. Where the kernel does not allow it, it stays as it was."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def exhausted(error: BaseException) -> bool:
    """Whether memory ran out, the machine's or a device's."""
    return device_exhausted(error) or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def device_exhausted(error: BaseException) -> bool:
    """Whether a device's memory ran out. torch, which need not be loaded, has a type for what its own allocator is
    refused, and only words for what libraries and the driver are.
    """
    return type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in _OF_DEVICES)


def show(count: float) -> str:
    """A number of bytes for people: '3.1 GiB', '820 MiB'."""
    if count >= GIB:
        return f"{count / GIB:.1f} GiB"
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 1024:.0f} KiB"


def _meminfo() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return physical()


def _cgroup(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Room under the control group's limit (version 2), which containers see at the root of the tree.

    Files held in the page cache count as used there, but make room when it is needed.
    """
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        cached = int(stat["active_file"]) + int(stat["inactive_file"])
        return None if limit == "max" else int(limit) - used + cached
    except (OSError, ValueError, KeyError):
        return None


def _address_space() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return soft - mapped


def keep_lean() -> None:
    """Has every large allocation of this process mapped on its own, so that freeing it gives it back at once (glibc).

    glibc would otherwise learn, from the first large block that is freed, to carve the next ones out of its heap, where
    activations that come and go by the megabyte leave holes between those that stay; and it would give threads that
    allocate at the same time heaps of their own, each as large as it ever was.
    """
    _libc("mallopt", _MMAP_THRESHOLD, _LARGE)
    _libc("mallopt", _ARENA_MAX, 1)


def keep_ready() -> None:
    """Has this process keep what it has freed for what it allocates next (glibc).

    New memory comes page by page, and a fault for each page costs more than most operations on it.
    """
    _libc("mallopt", _MMAP_THRESHOLD, _HUGE)
    _libc("mallopt", _TRIM_THRESHOLD, 2**31 - 1)
    _libc("mallopt", _ARENA_MAX, 1)


def trim() -> None:
    """Gives memory that was freed in smaller pieces back to the system, where the allocator can be told to (glibc)."""
    _libc("malloc_trim", 0)


def _libc(function: str, *arguments: int) -> None:
    try:
        ctypes.CDLL(None)[function](*arguments)
    except AttributeError:  # another C library
        return
