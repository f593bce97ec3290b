"""Tasks through lm-eval: scores against the same computed by hand, and two models' scores compared."""

import json
import math
import os
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from llmpare.calibration_data import presets
from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.evaluate import fidelity, harness, tasks
from llmpare.compress.evaluate.significance import sign_test
from llmpare.compress.evaluate.tasks import Score, TaskScores
from llmpare.compress.formats.decoded import open_dense

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: documents.jsonl, train: examples.jsonl}}}}
test_split: test
training_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
GENERATE = """
task: continue
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{rest}}"
generation_kwargs: {until: ["\\n\\n\\n"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: reading
dataset_path: json
dataset_kwargs: {data_files: {test: pages.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
"""
WORDS = [
    "river",
    "stone",
    "garden",
    "window",
    "letter",
    "morning",
    "engine",
    "winter",
    "music",
    "bridge",
    "market",
    "captain",
]
QUESTIONS = [
    {
        "question": f"The {word} was",
        "choices": ["very old", f"a {WORDS[i - 1]}", f"not the {WORDS[i - 1]} they saw"],
        "answer": i % 3,
    }
    for i, word in enumerate(WORDS)
]
PAGES = [
    "The ship left the harbour in the morning and came back at night.\n\nNobody had seen it since." * 50,
    "A short page.",
]


@pytest.fixture(scope="module", autouse=True)
def _needs_lm_eval(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'llmpare[eval]'")
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


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


def score(names: list[str] | str, include: Path | None, model: Path = tiny.EXAMPLE, **more: Any) -> TaskScores:
    """The scores of a model in float32 on the CPU."""
    options: dict[str, Any] = {"limit": None, "num_fewshot": None, "batch_size": 4, "trust": False}
    names = [names] if isinstance(names, str) else names
    with open_dense(model) as source:
        return tasks.run(
            source, names, include=include, dtype=torch.float32, device=torch.device("cpu"), **{**options, **more}
        )


def find(scores: TaskScores, metric: str, task: str | None = None) -> Score:
    (found,) = [each for each in scores.scores if each.metric == metric and task in (None, each.task)]
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, for what does not depend on what a model knows."""
    return tiny.llama(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module")
def by_hand() -> tuple[Any, Any]:
    """The same model and its tokenizer, as transformers loads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny.EXAMPLE, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(tiny.EXAMPLE)


@torch.no_grad()
def log_likelihood(by_hand: tuple[Any, Any], start: str, rest: str) -> float:
    model, tokenizer = by_hand
    known, whole = tokenizer.encode(start), tokenizer.encode(start + rest)
    assert whole[: len(known)] == known
    likely = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(likely[i - 1, whole[i]]) for i in range(len(known), len(whole)))


# --- scores


def test_multiple_choice(folder: Path, by_hand: tuple[Any, Any]) -> None:
    found = score("choice", folder)
    best, best_per_letter = [], []
    for row in QUESTIONS:
        sums = [log_likelihood(by_hand, row["question"], " " + choice) for choice in row["choices"]]
        each = [total / len(choice) for total, choice in zip(sums, row["choices"], strict=True)]
        best.append(float(sums.index(max(sums)) == row["answer"]))
        best_per_letter.append(float(each.index(max(each)) == row["answer"]))
    assert 0 < sum(best) < len(best), "right and wrong answers are needed to show anything"
    assert best != best_per_letter
    assert find(found, "acc").documents == tuple(best)
    assert find(found, "acc_norm").documents == tuple(best_per_letter)
    share = sum(best) / len(best)
    assert find(found, "acc").value == pytest.approx(share)
    assert find(found, "acc").stderr == pytest.approx(math.sqrt(share * (1 - share) / (len(best) - 1)))
    assert found.warnings == ()


def test_generation(tmp_path: Path, by_hand: tuple[Any, Any]) -> None:
    model, tokenizer = by_hand
    rows = []
    for i, word in enumerate(WORDS[:6]):
        ids = tokenizer.encode(f"The {word} was")
        start = len(ids)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        generated = tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert generated
        rows.append({"start": f"The {word} was", "rest": generated if i % 2 else generated + "!"})
    (tmp_path / "continue.yaml").write_text(GENERATE)
    write_rows(tmp_path / "texts.jsonl", rows)
    found = find(score("continue", tmp_path), "exact_match")
    assert found.documents == (0, 1, 0, 1, 0, 1)
    assert found.value == 0.5


@torch.no_grad()
def windowed_nll(by_hand: tuple[Any, Any], page: str) -> float:
    """The text's negative log-likelihood in nats by our own scores, in lm-eval's windows: as many tokens as the model
    takes are scored at a time, the one before them in front; the last window looks back as far as it can.
    """
    model, tokenizer = by_hand
    ids = [tokenizer.bos_token_id, *tokenizer.encode(page)]
    length = model.config.max_position_embeddings
    total = 0.0
    for begin in range(0, len(ids) - 1, length):
        scored = min(length, len(ids) - 1 - begin)
        end = begin + scored + 1
        window = torch.tensor([ids[max(0, end - length - 1) : end]])
        logits = model(window[:, :-1]).logits[:, -scored:]
        total += float(fidelity.score(logits.clone(), logits, window[:, -scored:]).dense_nll.double().sum())
    return total


def test_perplexity_is_that_of_our_own_arithmetic(folder: Path, by_hand: tuple[Any, Any]) -> None:
    """On the same windows, of which the first page fills more than one."""
    assert len(by_hand[1].encode(PAGES[0])) > by_hand[0].config.max_position_embeddings
    nats = [windowed_nll(by_hand, page) for page in PAGES]
    words, size = sum(len(page.split()) for page in PAGES), [len(page.encode()) for page in PAGES]
    found = score("reading", folder)
    assert find(found, "word_perplexity").value == pytest.approx(math.exp(sum(nats) / words), rel=1e-4)
    assert find(found, "byte_perplexity").value == pytest.approx(math.exp(sum(nats) / sum(size)), rel=1e-4)
    bits = find(found, "bits_per_byte")
    assert bits.value == pytest.approx(sum(nats) / sum(size) / math.log(2), rel=1e-4)
    assert bits.documents == pytest.approx([n / b / math.log(2) for n, b in zip(nats, size, strict=True)], rel=1e-4)
    assert not bits.higher_is_better
    assert bits.stderr is None, "the value is no mean over pages"


# --- what is asked


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


# --- comparison


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
        (with_score(metric="f1"), "different tasks"),
        (with_score(task="u"), "different tasks"),
    ],
)
def test_scores_on_different_documents_are_not_compared(other: TaskScores, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        tasks.compare(RIGHT_3_OF_4, other)
    assert "--tasks" in caught.value.hint or "--limit" in caught.value.hint


# --- what is refused


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
    """Only the first one is looked at when a task is built."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_rows(tmp_path / "documents.jsonl", [*QUESTIONS, {**QUESTIONS[0], "choices": []}])
    with pytest.raises(InputError, match="task 'choice' cannot be put to the model"):
        score("choice", tmp_path)


def test_more_examples_than_there_are(folder: Path) -> None:
    with pytest.raises(InputError, match="task 'choice' cannot be put to the model: .*larger than population"):
        score("choice", folder, num_fewshot=99)


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
