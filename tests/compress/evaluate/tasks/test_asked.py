"""What a model is asked: which documents of which tasks, with which examples before them."""

import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import tiny
from questions import CHOICE, QUESTIONS, find, score, write_rows


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, for what does not depend on what a model knows."""
    return tiny.llama(tmp_path_factory.mktemp("small") / "model")


def test_limit_asks_the_first_documents(folder: Path) -> None:
    every, first = score("choice", folder), score("choice", folder, limit=5)
    documents = find(every, "acc").documents
    assert documents is not None
    assert find(first, "acc").documents == documents[:5]
    assert first.prompts["choice"] == every.prompts["choice"][:5]


def test_examples_come_before_the_question(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.evaluator

    asked: list[str] = []
    real = lm_eval.evaluator.evaluate

    def record(lm: Any, task_dict: Any, **more: Any) -> Any:
        results = real(lm, task_dict, **more)
        asked.extend(sample["arguments"][0][0] for sample in results["samples"]["choice"])
        return results

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", record)
    shown, alone = score("choice", folder, num_fewshot=2), score("choice", folder, num_fewshot=0)
    for prompt, row in zip(asked[: len(QUESTIONS)], QUESTIONS, strict=True):
        assert re.fullmatch(rf"(The \w+ was a \w+\n\n){{2}}{row['question']}", prompt)
    assert asked[len(QUESTIONS) :] == [row["question"] for row in QUESTIONS]
    assert not {*shown.prompts["choice"]} & {*alone.prompts["choice"]}
    assert score("choice", folder, num_fewshot=2) == shown, "the same examples every time"


def test_a_task_that_takes_no_examples_says_so(tmp_path: Path, folder: Path) -> None:
    for name in ("documents.jsonl", "examples.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "bare.yaml").write_text(CHOICE.format(name="bare") + "num_fewshot: 0\n")
    found = score("bare", tmp_path, num_fewshot=3)
    assert found.warnings == ("task bare is made to be asked without examples, --num-fewshot is not for it",)
    assert [each.documents for each in found.scores] == [each.documents for each in score("choice", folder).scores]


def test_a_prompt_that_is_cut_is_warned_of_once(tmp_path: Path) -> None:
    (tmp_path / "choice.yaml").write_text(CHOICE.format(name="choice"))
    rows = [{"question": "word " * n, "choices": ["a", "b", "c"], "answer": 0} for n in (10, 2000, 3000)]
    write_rows(tmp_path / "documents.jsonl", rows)
    write_rows(tmp_path / "examples.jsonl", rows)
    (warning,) = score("choice", tmp_path).warnings
    assert "exceeds model's maximum length (1024)" in warning
    assert warning.endswith("(2 times)")


GROUP = "group: all\ntask: [one, two]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"


def test_groups_and_tags(tmp_path: Path) -> None:
    for name, rows in (("one", QUESTIONS[:7]), ("two", QUESTIONS[7:])):
        text = CHOICE.format(name=name).replace("documents", name).replace("examples", name)
        (tmp_path / f"{name}.yaml").write_text(text + "tag: those\n")
        write_rows(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "all.yaml").write_text(GROUP)
    group, tag = score("all", tmp_path), score("those", tmp_path)
    assert {each.task for each in tag.scores} == {"one", "two"}
    assert {each.task for each in group.scores} == {"one", "two", "all"}
    one, two, both = (find(group, "acc", task) for task in ("one", "two", "all"))
    assert one == find(tag, "acc", "one")
    assert one.documents is not None
    assert two.documents is not None
    assert both.documents == one.documents + two.documents
    assert both.value == pytest.approx(sum(both.documents) / len(both.documents))
    assert both.stderr is not None


def test_one_file_names_its_task(folder: Path, tmp_path: Path) -> None:
    """Paths in it are relative to it; who calls may be anywhere."""
    before = os.getcwd()
    assert score("choice", folder / "choice.yaml") == score("choice", folder)
    assert os.getcwd() == before


def test_several_tasks_at_once(folder: Path, small: Path) -> None:
    both = score(["choice", "reading", "choice"], folder, small)
    assert [each.metric for each in both.scores[:2]] == ["acc", "acc_norm"]
    assert len(both.scores) == 5
    assert both.prompts.keys() == {"choice", "reading"}


def test_nothing_is_printed_and_nobody_is_called(
    folder: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a cache of the data, and without being told to stay offline."""
    import datasets

    def call(*arguments: Any, **options: Any) -> Any:
        raise AssertionError(f"a connection was opened: {arguments}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, call)
    calls: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: calls.append(arguments) or [])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert not datasets.config.HF_HUB_OFFLINE
    score(["choice", "reading"], folder, small)
    assert calls == []
    assert capfd.readouterr().out == ""
