import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from llmpare.compress import memory

MIB = 2**20
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-llama"


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 KiB"),
        (1536, "2 KiB"),
        (MIB - 1, "1024 KiB"),
        (MIB, "1 MiB"),
        (820 * MIB, "820 MiB"),
        (memory.GIB, "1.0 GiB"),
        (3.14 * memory.GIB, "3.1 GiB"),
    ],
)
def test_bytes_for_people(count: float, shown: str) -> None:
    assert memory.show(count) == shown


def test_resident_grows_with_what_is_written_to() -> None:
    before = memory.resident()
    block = bytearray(64 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    assert 60 * MIB < memory.resident() - before < 80 * MIB
    assert memory.resident() <= memory.peak_resident() + 4 * MIB


def test_the_peak_stays_when_memory_is_given_back() -> None:
    script = (
        "from llmpare.compress import memory\n"
        "block = bytearray(b'x') * (200 << 20)\n"
        "del block\n"
        "print(memory.resident(), memory.peak_resident())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True)
    resident, peak = map(int, done.stdout.split())
    assert peak > 200 * MIB
    assert resident < 100 * MIB


def test_available_is_no_more_than_the_machine_has() -> None:
    total = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    assert 0 < memory.available() < total


def test_a_limit_of_the_address_space_counts() -> None:
    """`ulimit -v`: what is mapped already is gone."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (300 * MIB, 300 * MIB))

    script = (
        "from llmpare.compress import memory\n"
        "first = memory.available()\n"
        "block = bytearray(64 << 20)\n"
        "print(first, memory.available())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True, preexec_fn=limit
    )
    first, second = map(int, done.stdout.split())
    assert 64 * MIB < first < 300 * MIB
    assert 60 * MIB < first - second < 70 * MIB


def group(folder: Path, limit: str, current: int, *, active: int = 0, inactive: int = 0) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    stat = f"anon {current - active - inactive}\nfile 12345\nactive_file {active}\ninactive_file {inactive}\n"
    (folder / "memory.stat").write_text(stat)
    return folder


def test_a_limit_of_the_control_group_counts(tmp_path: Path) -> None:
    assert memory._cgroup(group(tmp_path, str(1000 * MIB), 300 * MIB)) == 700 * MIB
    assert memory._cgroup(group(tmp_path, str(100 * MIB), 300 * MIB)) == -200 * MIB


def test_a_control_group_without_limit_is_none(tmp_path: Path) -> None:
    assert memory._cgroup(group(tmp_path, "max", 300 * MIB)) is None
    assert memory._cgroup(tmp_path / "missing") is None


def test_files_in_the_page_cache_make_room_when_needed(tmp_path: Path) -> None:
    """A model that was just downloaded in the same container fills it up with nothing but cache."""
    found = memory._cgroup(group(tmp_path, str(1000 * MIB), 990 * MIB, active=100 * MIB, inactive=690 * MIB))
    assert found == 800 * MIB


@pytest.mark.parametrize("smallest", ["_meminfo", "_cgroup", "_address_space"])
def test_the_least_of_all_limits_counts(smallest: str, monkeypatch) -> None:
    for name in ("_meminfo", "_cgroup", "_address_space"):
        monkeypatch.setattr(memory, name, lambda name=name: MIB if name == smallest else 5 * MIB)
    assert memory.available() == MIB
    monkeypatch.setattr(memory, "_cgroup", lambda: None)
    monkeypatch.setattr(memory, "_address_space", lambda: None)
    assert memory.available() == (MIB if smallest == "_meminfo" else 5 * MIB)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to")
def test_trim_gives_back_what_was_freed_between_things_that_stay() -> None:
    script = (
        "from llmpare.compress import memory\n"
        "blocks = [bytearray(b'x') * 100_000 for _ in range(2000)]\n"
        "blocks = blocks[::100]\n"
        "before = memory.resident()\n"
        "memory.trim()\n"
        "print(before - memory.resident())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True)
    assert int(done.stdout) > 100 * MIB


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE.exists() or "[never]" in HUGE.read_text(), reason="no huge pages here")
@pytest.mark.parametrize(("decided", "expected"), [({}, True), ({"THP_MEM_ALLOC_ENABLE": "0"}, False)])
def test_every_command_asks_for_huge_pages_unless_the_user_decided(decided: dict[str, str], expected: bool) -> None:
    """The flags of the mapping that a large tensor lies in, after a command in the same process."""
    script = (
        "from llmpare.cli.exits import main\n"
        f"assert main(['inspect', {str(EXAMPLE)!r}]) == 0\n"
        "import torch\n"
        "tensor = torch.ones(2**25)\n"
        "where = tensor.data_ptr() + 2**20\n"
        "inside = False\n"
        "for line in open('/proc/self/smaps'):\n"
        "    first, _, rest = line.partition(' ')\n"
        "    if '-' in first:\n"
        "        start, end = (int(each, 16) for each in first.split('-'))\n"
        "        inside = start <= where < end\n"
        "    elif first == 'VmFlags:' and inside:\n"
        "        print('huge' if 'hg' in rest.split() else 'small')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"} | decided
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ("huge" if expected else "small")
