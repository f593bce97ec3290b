"""Row 29 of the fault table: the real command, killed at every operation that changes the disk, one after the other."""

import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny

from llmpare.compress.checkpoint.publish import verify


@pytest.fixture(scope="module")
def zygote() -> Iterator[tiny.Zygote]:
    with tiny.Zygote() as zygote:
        yield zygote


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
    zygote: tiny.Zygote,
    tmp_path: Path,
    options: tuple[str, ...],
    torn: bool,
    record_property: Callable[[str, object], None],
) -> None:
    """After each death OUT is absent or complete, and the same command makes it what an undisturbed run makes it."""
    model, text = tiny.llama(tmp_path / "model"), tiny.texts(tmp_path)
    undisturbed = tmp_path / "undisturbed" / "out"
    assert zygote.run(tiny.quantize(model, undisturbed, text, *options)).code == 0
    expected = tiny.contents(undisturbed)
    taken_up = []  # blocks that the second run did not have to compress again
    for point in itertools.count(1):
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
        if "compressing" in again.err:
            blocks = json.loads((out / "report.json").read_bytes())["blocks"]
            taken_up.append(sum(block["resumed"] for block in blocks))
        if killed.code == 0:
            break
    record_property("points", point - 1)
    print(f"{point - 1} points to be killed at")
    assert point > 100
    assert taken_up == sorted(taken_up)
    assert {*taken_up} == {0, 1, 2}
