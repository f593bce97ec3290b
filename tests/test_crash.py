"""Row 29 of the fault table: the real command, killed at every operation that changes the disk, one after the other."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import tiny

from llmpare.compress.checkpoint.publish import verify

SIDE_BY_SIDE = 2  # processes; each kills at its share of the points


@pytest.fixture(scope="module")
def zygotes() -> Iterator[list[tiny.Zygote]]:
    with ExitStack() as running:
        yield [running.enter_context(tiny.Zygote()) for _ in range(SIDE_BY_SIDE)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "torn"),
    [
        (("--method", "gptq", "--rounds", "1"), False),
        (("--method", "tuned", "--rounds", "0", "--steps", "3"), True),
    ],
    ids=["gptq", "tuned, writes torn in half"],
)
def test_29_killed_at_every_durable_operation(
    zygotes: list[tiny.Zygote],
    tmp_path: Path,
    options: tuple[str, ...],
    torn: bool,
    record_property: Callable[[str, object], None],
) -> None:
    """After each death OUT is absent or complete, and the same command makes it what an undisturbed run makes it."""
    model, text = tiny.llama(tmp_path / "model", hidden=32, inner=64), tiny.texts(tmp_path)
    undisturbed = tmp_path / "undisturbed" / "out"
    assert zygotes[0].run(tiny.quantize(model, undisturbed, text, *options)).code == 0
    expected = tiny.contents(undisturbed)

    def kill(zygote: tiny.Zygote, points: Sequence[int]) -> dict[int, int | None]:
        """Runs that are killed at these points and run again, up to the first that is over before.

        Returns for each point the number of blocks that the second run took up, None if it had none to compress.
        """
        taken_up: dict[int, int | None] = {}
        for point in points:
            out = tmp_path / str(point) / "out"
            command = tiny.quantize(model, out, text, *options)
            killed = zygote.run(command, signum=signal.SIGKILL, at=point, torn=torn)
            assert killed.code in (0, -signal.SIGKILL), killed.err
            if out.exists():
                verify(out)
            again = zygote.run(command)
            assert again.code == 0, f"killed at operation {point}: {again.err}"
            assert again.out == f"{out}\n"
            assert tiny.contents(out) == expected, f"killed at operation {point}"
            assert os.listdir(out.parent) == ["out"]
            if killed.code == 0:
                break
            taken_up[point] = None
            if "compressing" in again.err:
                blocks = json.loads((out / "report.json").read_bytes())["blocks"]
                taken_up[point] = sum(block["resumed"] for block in blocks)
        return taken_up

    shares = [range(1 + share, 10_000, SIDE_BY_SIDE) for share in range(SIDE_BY_SIDE)]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        found = {point: n for part in pool.map(kill, zygotes, shares) for point, n in part.items()}
    record_property("points", len(found))
    print(f"{len(found)} points to be killed at")
    assert len(found) > 100
    assert sorted(found) == [*range(1, len(found) + 1)], "a point was left out"
    taken_up = [n for _, n in sorted(found.items()) if n is not None]
    assert taken_up == sorted(taken_up)
    assert {*taken_up} == {0, 1, 2}
