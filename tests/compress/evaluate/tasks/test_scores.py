"""Scores in tasks of each kind against the same computed by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from questions import PAGES, QUESTIONS, WORDS, find, score, write_rows

from llmpare.compress.evaluate import fidelity

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
