"""Row 29 of the fault table: the real command, dying at every operation that changes the disk, one after the other.

What a death leaves is what is on the disk at that moment, so one run shows all of it: its folder is copied wherever
it changes. Some processes are killed for real, to see that this is what they leave.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import tiny

from llmpare.compress.checkpoint.publish import verify

SIDE_BY_SIDE = 2  # processes; each takes up its share of what deaths have left
# One in so many deaths is looked at; odd, since every other one leaves a write half done. How files are written is
# tested at every operation, with no model behind it: see test_killed.
EVERY = 5
KILLED = 25  # every so many states, the run is killed for real where it leaves them


@pytest.fixture(scope="module")
def zygotes() -> Iterator[list[tiny.Zygote]]:
    with ExitStack() as running:
        yield [running.enter_context(tiny.Zygote()) for _ in range(SIDE_BY_SIDE)]


def files(folder: Path) -> dict[str, int]:
    """The size of every file; the journal and the reports hold clocks."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: 0 if "report" in name or "journal" in name else path.stat().st_size for name, path in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "blocks"),
    [
        (tiny.quantize, ("--method", "gptq", "--rounds", "1"), 2),
        (tiny.quantize, ("--method", "tuned", "--rounds", "0", "--steps", "3"), 2),
        (tiny.prune, ("--ffn", "0.5", "--round-to", "16", "--drop-layers", "1"), 3),
        (tiny.prune, ("--hidden", "0.75", "--round-to", "8"), 2),
    ],
    ids=["gptq", "tuned", "channels and a block", "residual channels"],
)
def test_29_killed_at_every_durable_operation(
    zygotes: list[tiny.Zygote],
    tmp_path: Path,
    kind: Callable[..., list[str]],
    options: tuple[str, ...],
    blocks: int,
    record_property: Callable[[str, object], None],
) -> None:
    """After each death OUT is absent or complete, and the same command makes it what an undisturbed run makes it."""
    model, text = tiny.llama(tmp_path / "model", blocks=blocks, hidden=32, inner=64), tiny.texts(tmp_path)
    parent, copies = tmp_path / "undisturbed", tmp_path / "copies"
    parent.mkdir()
    assert zygotes[0].states(kind(model, parent / "out", text, *options), parent, copies).code == 0
    expected = tiny.contents(parent / "out")
    states = sorted(copies.iterdir(), key=lambda state: (int(state.name.split("-")[0]), state.name))
    record_property("states", len(states))
    print(len(states), "states")
    assert len(states) > 60
    assert any("torn" in state.name for state in states)

    for state in [state for state in states if "torn" not in state.name][KILLED::KILLED]:
        killed = tmp_path / "killed" / "out"
        killed.parent.mkdir()
        ended = zygotes[0].run(kind(model, killed, text, *options), signum=signal.SIGKILL, at=int(state.name))
        assert ended.code == -signal.SIGKILL, ended.err
        assert files(killed.parent) == files(state)
        shutil.rmtree(killed.parent)

    def take_up(zygote: tiny.Zygote, share: Sequence[Path]) -> dict[Path, int | None]:
        """Runs the command on each state. Returns the blocks it took up, None if it had none to compress."""
        taken_up: dict[Path, int | None] = {}
        for state in share:
            out = state / "out"
            if out.exists():
                verify(out)
            again = zygote.run(kind(model, out, text, *options))
            assert again.code == 0, f"killed at operation {state.name}: {again.err}"
            assert again.out == f"{out}\n"
            assert tiny.contents(out) == expected, f"killed at operation {state.name}"
            assert os.listdir(out.parent) == ["out"]
            taken_up[state] = None
            if "compressing" in again.err:
                records = json.loads((out / "report.json").read_bytes())["blocks"]
                taken_up[state] = sum(record["resumed"] for record in records)
        return taken_up

    states = states[::EVERY]
    shares = [states[share::SIDE_BY_SIDE] for share in range(SIDE_BY_SIDE)]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        found = {state: n for part in pool.map(take_up, zygotes, shares) for state, n in part.items()}
    taken_up = [n for state in states if (n := found[state]) is not None]
    assert taken_up == sorted(taken_up)
    assert {*taken_up} == {*range(blocks + 1)}
