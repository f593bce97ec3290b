"""A model without its weights; and a source, the place of an output, and what an undisturbed run writes there."""

import os
from pathlib import Path

import pytest
from publishing import contents, produce, put_source


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that lacks nothing but the weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return put_source(tmp_path / "source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "out"


@pytest.fixture
def quick_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process leaves the kernel's cache as it is: what really reaches the disk only costs time here."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    folder = tmp_path_factory.mktemp("expected")
    produce(folder / "out", put_source(folder / "source"))
    return contents(folder / "out")
