"""Options, tasks and data that are refused before or while a model is asked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from questions import CHOICE, QUESTIONS, score, write_rows

from llmpare.calibration_data import presets
from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.evaluate import harness
from llmpare.compress.evaluate.request import EvaluateRequest, TasksRequest, TextRequest
from llmpare.compress.evaluate.run import run_evaluate
from llmpare.compress.progress import Silent


def test_without_lm_eval(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="'lm-eval', which is not installed") as caught:
        score("choice", folder)
    assert caught.value.hint == "pip install 'llmpare[eval]'"


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        ([], {}, "names no task"),
        (["choice"], {"limit": 0}, "--limit 0"),
        (["choice"], {"limit": -3}, "--limit -3"),
        (["choice"], {"num_fewshot": -1}, "--num-fewshot -1"),
    ],
)
def test_options_that_make_no_sense(folder: Path, names: list[str], options: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        score(names, folder, **options)


def test_unknown_tasks(folder: Path) -> None:
    with pytest.raises(UsageError, match="unknown task 'choise'") as caught:
        score(["reading", "choise"], folder)
    assert "did you mean choice?" in caught.value.hint
    with pytest.raises(UsageError, match="unknown task 'hella_swag'") as caught:
        score("hella_swag", folder)
    assert "did you mean hellaswag?" in caught.value.hint
    with pytest.raises(UsageError, match="nowhere does not exist"):
        score("choice", folder / "nowhere")


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose data set is on the hub is refused at once, where the library would try for half a minute."""
    monkeypatch.setattr(presets, "_reachable", lambda url: False)
    with pytest.raises(InputError, match="'arc_easy' is not a local file, and the hub") as caught:
        score("arc_easy", None)
    assert "--include" in caught.value.hint


def nothing(path: Path) -> None:
    path.write_text("")


def blank(path: Path) -> None:
    path.write_text("\n")


def gone(path: Path) -> None:
    path.unlink()


def torn(path: Path) -> None:
    path.write_text('{"question": "wh')


def other_columns(path: Path) -> None:
    write_rows(path, [{"q": "Why?"}])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (nothing, "no documents"),
        (blank, "column names don't match"),
        (gone, "Unable to find '.*documents.jsonl'"),
        (torn, "JSON parse error"),
        (other_columns, "column names don't match"),
    ],
)
def test_data_that_cannot_be_used(folder: Path, tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path / "documents.jsonl")
    with pytest.raises(InputError, match=f"task 'choice' cannot be built: .*{said}") as caught:
        score("choice", tmp_path)
    assert str(tmp_path) in caught.value.hint


def test_a_document_that_does_not_fit_its_task(folder: Path, tmp_path: Path) -> None:
    """Only the first one is looked at when a task is built. All else is measured and reported."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_rows(tmp_path / "documents.jsonl", [*QUESTIONS, {**QUESTIONS[0], "choices": []}])
    model = str(tiny.llama(tmp_path / "model"))
    asked = TasksRequest(("choice", "reading"), include=tmp_path)
    text = TextRequest((str(tiny.texts(tmp_path)[1]),), 2, tiny.WINDOW)
    report = run_evaluate(EvaluateRequest((model,), model, text=text, tasks=asked, device="cpu"), Silent())
    assert report["passed"] is False
    assert [(each["model"], each["part"]) for each in report["failures"]] == [(model, "tasks")] * 2
    assert report["failures"][0]["why"].startswith("task 'choice' cannot be put to the model")
    (candidate,) = report["candidates"]
    assert candidate["fidelity"]["tokens"] == 2 * (tiny.WINDOW - 1)
    assert {row["task"] for row in candidate["tasks"]["rows"]} == {"reading"}


def test_more_examples_than_there_are(folder: Path) -> None:
    (why,) = score("choice", folder, num_fewshot=99).failures
    assert "larger than population" in why


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        ("a: [", InputError, "cannot be read as a task"),
        ("[1, 2]", InputError, "names no task"),
        ("dataset_path: json", InputError, "names no task"),
        ("task: choice\noutput_type: essay\ndataset_path: json", InputError, "invalid output_type 'essay'"),
        (CHOICE.format(name="choice") + "unsafe_code: true\n", UsageError, "runs code that the model writes"),
        (CHOICE.format(name="choice") + "process_docs: !function gone.process\n", InputError, "Cannot import module"),
    ],
)
def test_files_that_describe_no_task(folder: Path, tmp_path: Path, content: str, error: Any, said: str) -> None:
    for name in ("documents.jsonl", "examples.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "choice.yaml").write_text(content)
    with pytest.raises(error, match=said):
        score("choice", tmp_path / "choice.yaml")
