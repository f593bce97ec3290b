"""The scores of two models compared: what is recovered, which answers flip, and what cannot be compared."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from questions import find, score
from torch import Tensor

from llmpare.compress.errors import InputError
from llmpare.compress.evaluate import tasks
from llmpare.compress.evaluate.significance import sign_test
from llmpare.compress.evaluate.tasks import Score, TaskScores


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with noise in its weights."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny.EXAMPLE, tmp_path_factory.mktemp("damaged") / "model"))
    generator = torch.Generator().manual_seed(0)

    def noisy(weight: Tensor) -> Tensor:
        noise = torch.randn(weight.shape, generator=generator)
        return weight if weight.ndim == 1 else (weight + 1.5 * weight.float().std() * noise).to(weight.dtype)

    weights = load_file(folder / "model.safetensors")
    save_file({n: noisy(w) for n, w in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_candidate_against_its_baseline(folder: Path, damaged: Path) -> None:
    names = ["choice", "reading"]
    candidate, baseline = score(names, folder, damaged), score(names, folder)
    rows = {row["metric"]: row for row in tasks.compare(candidate, baseline)["rows"]}
    for metric, row in rows.items():
        new, old = find(candidate, metric), find(baseline, metric)
        assert (row["task"], row["value"], row["stderr"]) == (new.task, new.value, new.stderr)
        assert row["baseline"] == old.value
        assert new.documents is not None
        assert old.documents is not None
        pairs = [*zip(new.documents, old.documents, strict=True)]
        if new.task == "choice":
            lost, gained = pairs.count((0, 1)), pairs.count((1, 0))
            assert row["recovery"] == pytest.approx(new.value / old.value)
        else:
            lost, gained = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
            assert row["recovery"] == pytest.approx(old.value / new.value)
            assert row["recovery"] < 1
        assert row["flips"] == {"lost": lost, "gained": gained, "p_value": sign_test(lost, gained)}
    assert rows["acc"]["flips"]["lost"] + rows["acc"]["flips"]["gained"] > 0, "the damage shows nowhere"
    assert rows["bits_per_byte"]["flips"] == {"lost": 2, "gained": 0, "p_value": 0.5}


def test_a_model_against_itself(folder: Path) -> None:
    scores = score("choice", folder)
    for row in tasks.compare(scores, score("choice", folder, batch_size=1))["rows"]:
        assert row["recovery"] == 1
        assert row["flips"] == {"lost": 0, "gained": 0, "p_value": 1}
    for row in tasks.compare(scores, None)["rows"]:
        assert (row["baseline"], row["recovery"], row["flips"]) == (None, None, None)
        assert row["value"] > 0


RIGHT_3_OF_4 = TaskScores((Score("t", "acc", 0.75, 0.25, True, (1, 1, 1, 0)),), {"t": ("a", "b", "c", "d")})


def with_score(**changes: Any) -> TaskScores:
    return replace(RIGHT_3_OF_4, scores=(replace(RIGHT_3_OF_4.scores[0], **changes),))


def test_equal_accuracy_hides_flips() -> None:
    (row,) = tasks.compare(with_score(documents=(1, 1, 0, 1)), RIGHT_3_OF_4)["rows"]
    assert row["recovery"] == 1
    assert row["flips"] == {"lost": 1, "gained": 1, "p_value": 1}


def test_what_cannot_be_compared_is_none() -> None:
    (row,) = tasks.compare(RIGHT_3_OF_4, with_score(value=0.0, documents=None))["rows"]
    assert (row["baseline"], row["recovery"], row["flips"]) == (0, None, None)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(RIGHT_3_OF_4, prompts={"t": ("a", "b", "x", "d")}), "asked different documents .document 2."),
        (replace(RIGHT_3_OF_4, prompts={"t": ("a", "b", "c")}), "asked different documents .4 and 3."),
    ],
)
def test_scores_on_different_documents_are_not_compared(other: TaskScores, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        tasks.compare(RIGHT_3_OF_4, other)
    assert "--limit" in caught.value.hint


def test_a_task_that_the_baseline_failed_has_no_recovery() -> None:
    (row,) = tasks.compare(RIGHT_3_OF_4, TaskScores((), {}, failures=("task 't' cannot be put to the model",)))["rows"]
    assert (row["value"], row["baseline"], row["recovery"], row["flips"]) == (0.75, None, None, None)
