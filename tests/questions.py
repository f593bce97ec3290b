"""Small tasks for lm-eval with their documents, and the scores of a model in them."""

import json
from pathlib import Path
from typing import Any

import tiny
import torch

from llmpare.compress.evaluate import tasks
from llmpare.compress.evaluate.request import TasksRequest
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


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def score(names: list[str] | str, include: Path | None, model: Path = tiny.EXAMPLE, **more: Any) -> TaskScores:
    """The scores of a model in float32 on the CPU."""
    options: dict[str, Any] = {"include": include, "batch_size": 4, **more}
    asked = TasksRequest((names,) if isinstance(names, str) else tuple(names), **options)
    prepared = tasks.prepare(asked)
    with open_dense(model) as source:
        return tasks.run(source, prepared, asked, dtype=torch.float32, device=torch.device("cpu"), trust=False)


def find(scores: TaskScores, metric: str, task: str | None = None) -> Score:
    (found,) = [each for each in scores.scores if each.metric == metric and task in (None, each.task)]
    return found
