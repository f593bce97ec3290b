"""What tests of tasks need: lm-eval, and a folder with tasks of each kind."""

from pathlib import Path

import pytest
from questions import CHOICE, PAGES, QUESTIONS, ROLLING, write_rows


@pytest.fixture(scope="module", autouse=True)
def _needs_lm_eval(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'llmpare[eval]'")
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks of each kind, their documents beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "choice.yaml").write_text(CHOICE.format(name="choice"))
    write_rows(folder / "documents.jsonl", QUESTIONS)
    write_rows(folder / "examples.jsonl", [{**row, "answer": 1} for row in QUESTIONS[::-1]])
    (folder / "reading.yaml").write_text(ROLLING)
    write_rows(folder / "pages.jsonl", [{"page": page} for page in PAGES])
    return folder
