"""What every plan is made for: a model, and a processor that multiplies in every precision."""

from pathlib import Path

import pytest
from families import write

from llmpare.compress import hardware


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that multiplies in every precision, whatever runs these tests."""
    monkeypatch.setattr(hardware, "multiplies", lambda dtype: True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plan") / "llama", "llama")
