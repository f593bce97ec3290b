"""Every row of the fault table that an offline command line can meet, at the level of that command line.

Tests are named after the number of their row. What each asserts: the exit code, what stderr says, and what is on the
disk afterwards. Row 29, kill −9 at every operation, is in test_crash.py; details of the parts are tested beside them.
"""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from faults.kit import Llmpare, StopAfter

from llmpare.cli import exits
from llmpare.cli.progress import Watcher


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """How a sum is shared out among threads is in its last bits, and here runs in several processes are compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def llmpare(capsys: pytest.CaptureFixture[str]) -> Llmpare:
    """The command line, in this process."""

    def call(arguments: list[str]) -> tiny.Ended:
        code = exits.main(arguments)
        said = capsys.readouterr()
        assert "a bug in llmpare" not in said.err, said.err
        return tiny.Ended(code, said.out, said.err)

    return call


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model, which no test may change."""
    return tiny.llama(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture(scope="package")
def text(tmp_path_factory: pytest.TempPathFactory) -> tiny.Text:
    return tiny.texts(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="package")
def zygote() -> Iterator[tiny.Zygote]:
    with tiny.Zygote() as zygote:
        yield zygote


@pytest.fixture(scope="package")
def undisturbed(
    zygote: tiny.Zygote, model: Path, text: tiny.Text, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What the plain command writes for the sound model."""
    out = tmp_path_factory.mktemp("undisturbed") / "w4"
    assert zygote.run(tiny.quantize(model, out, text)).code == 0
    return tiny.contents(out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "w4"


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the sound model, to be broken."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


@pytest.fixture
def stop_after(llmpare: Llmpare, monkeypatch: pytest.MonkeyPatch) -> StopAfter:
    """Runs a command until block number `index` is finished; there it is stopped as by SIGINT."""

    def stop_after(index: int, command: list[str]) -> None:
        def block(self: Watcher, done: int, total: int, facts: object) -> None:
            if done == index:
                raise exits.Stopped(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(Watcher, "block", block)
            assert llmpare(command).code == 130

    return stop_after
