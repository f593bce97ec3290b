"""Scores on tasks (question answering, reasoning, …) through lm-eval, and what compression did to them.

Per task and metric: the value; its recovery, which is the share of the baseline's value that the candidate keeps; and
the documents on which the two differ, since equal accuracy can hide as many answers lost as gained.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from numbers import Real
from typing import TYPE_CHECKING, Any

from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.evaluate import harness
from llmpare.compress.evaluate.request import TasksRequest
from llmpare.compress.evaluate.significance import flips
from llmpare.compress.formats.decoded import DenseSource
from llmpare.compress.progress import Progress, Silent
from llmpare.compress.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch
    from lm_eval.api.task import Task
    from lm_eval.tasks.manager import TaskDict


@dataclass(frozen=True)
class Score:
    """One metric on one task or group. stderr: None where the value is no mean over documents.

    documents: the metric on each document by itself, in their order; None for a metric that has a meaning over many
    documents only (F1, BLEU).
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    documents: tuple[float, ...] | None


@dataclass(frozen=True)
class TaskScores:
    """What one model scored. prompts: for each task a hash per document of what was asked and what is right.

    warnings: of what makes the scores less than they seem. failures: why tasks that were asked for are not among them.
    """

    scores: tuple[Score, ...]
    prompts: Mapping[str, tuple[str, ...]]
    warnings: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()


def prepare(asked: TasksRequest) -> "dict[str, TaskDict]":
    """What is asked for with its documents: tasks, groups or tags of lm-eval or of `include`, by name.

    Raises UsageError when lm-eval is missing, for unknown tasks and for a limit that leaves nothing; InputError for a
    task that cannot be built.
    """
    harness.require()
    if not asked.names:
        raise UsageError("--tasks names no task", "for example --tasks arc_easy,hellaswag")
    if asked.limit is not None and asked.limit < 1:
        raise UsageError(f"--limit {asked.limit}: at least one document is needed")
    if asked.num_fewshot is not None and asked.num_fewshot < 0:
        raise UsageError(f"--num-fewshot {asked.num_fewshot}: it is a number of examples, from 0")
    found = harness.find(asked.names, asked.include)
    return {name: harness.build(name, entry) for name, entry in found.items()}


def run(
    source: DenseSource,
    tasks: "Mapping[str, TaskDict]",
    asked: TasksRequest,
    *,
    dtype: "torch.dtype",
    device: "torch.device",
    trust: bool,
    progress: Progress | None = None,
) -> TaskScores:
    """Puts tasks to a model, which is wholly in memory for it.

    tasks: as prepared; one that does not fit the model is left out, and in `failures`. trust: run code that comes with
    the model. Raises InputError for a model that cannot be used.
    """
    from llmpare.compress.model import whole

    watching = progress or Silent()
    tokenizer = load_tokenizer(source.folder, trust_remote_code=trust)
    model = whole.load(source, dtype, device, trust=trust)
    found, failures = [], []
    for name, built in tasks.items():
        watching.phase(f"task {name}")
        try:
            found.append(harness.answer(name, built, model, tokenizer, asked))
        except InputError as error:
            failures.append(error.message)
    scores = {(score.task, score.metric): score for answers in found for score in _scores(answers)}
    prompts = {task: _prompts(rows) for answers in found for task, rows in answers.results["samples"].items()}
    warnings = tuple(note for answers in found for note in answers.warnings)
    return TaskScores(tuple(scores.values()), prompts, warnings, tuple(failures))


def compare(candidate: TaskScores, baseline: TaskScores | None) -> dict[str, Any]:
    """The report's `tasks` section: a row per task and metric.

    recovery: value / baseline, or the inverse where less is better; None if the baseline has no score or it is 0.
    flips: {lost, gained, p_value}, see significance; None for a metric without a value per document. Raises InputError
    when the two were not asked the same.
    """
    if baseline is None:
        return {"rows": [_row(score, None) for score in candidate.scores]}
    asked = {(score.task, score.metric): score for score in baseline.scores}
    for task, prompts in candidate.prompts.items():
        before = baseline.prompts.get(task, prompts)
        differing = [i for i, (a, b) in enumerate(zip(prompts, before, strict=False)) if a != b]
        if differing or len(prompts) != len(before):
            where = f"document {differing[0]}" if differing else f"{len(prompts)} and {len(before)}"
            raise InputError(
                f"task {task!r}: candidate and baseline were asked different documents ({where})",
                "evaluate both with the same data, --limit and --num-fewshot",
            )
    return {"rows": [_row(score, asked.get((score.task, score.metric))) for score in candidate.scores]}


def _row(score: Score, baseline: Score | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "task": score.task,
        "metric": score.metric,
        "higher_is_better": score.higher_is_better,
        "value": score.value,
        "stderr": score.stderr,
    }
    if baseline is None:
        return {**row, "baseline": None, "recovery": None, "flips": None}
    kept, whole = (score, baseline) if score.higher_is_better else (baseline, score)
    changed = None
    if score.documents is not None and baseline.documents is not None:
        changed = asdict(flips(score.documents, baseline.documents, higher_is_better=score.higher_is_better))
    return {
        **row,
        "baseline": baseline.value,
        "recovery": kept.value / whole.value if whole.value else None,
        "flips": changed,
    }


def _scores(answers: harness.Answers) -> Iterator[Score]:
    """A score for every number in the results, whose keys are 'metric,filter'."""
    results = answers.results
    leaves = {name: _leaves(name, results["group_subtasks"]) for name in results["results"]}
    for task, figures in results["results"].items():
        for key, value in figures.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            parts = [_documents(answers.tasks[leaf], metric, kind, results["samples"][leaf]) for leaf in leaves[task]]
            known = [part for part in parts if part is not None]
            documents = tuple(each for part in known for each in part) if len(known) == len(parts) else None
            better = results["higher_is_better"].get(task, {}).get(metric)
            yield Score(
                task=task,
                metric=metric if kind == "none" else key,
                value=float(value),
                stderr=_stderr(float(value), documents),
                higher_is_better=better is not False,
                documents=documents,
            )


def _leaves(name: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, at any depth; a task itself."""
    if name not in children:
        return [name]
    return [leaf for child in children[name] for leaf in _leaves(child, children)]


def _documents(task: "Task", metric: str, kind: str, samples: Sequence[Mapping[str, Any]]) -> tuple[float, ...] | None:
    """The metric on each document by itself, by the task's own rule: the log-likelihood of a text gives the perplexity
    of that text.
    """
    values = [sample.get(metric) for sample in samples if sample["filter"] == kind]
    if task.OUTPUT_TYPE != "loglikelihood_rolling" and not all(isinstance(value, Real) for value in values):
        return None
    alone = task.aggregation().get(metric, statistics.fmean)
    return tuple(float(alone([value])) for value in values)


def _stderr(value: float, documents: Sequence[float] | None) -> float | None:
    """Standard error of a value that is the mean over its documents."""
    if documents is None or len(documents) < 2 or not math.isclose(value, statistics.fmean(documents), abs_tol=1e-12):
        return None
    return statistics.stdev(documents) / math.sqrt(len(documents))


def _prompts(samples: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """A hash per document, of what lm-eval's own three hashes say; each filter has all documents once more."""
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    parts = ("doc_hash", "prompt_hash", "target_hash")
    return tuple(sha256("".join(sample[part] for part in parts).encode()).hexdigest()[:16] for sample in first)
