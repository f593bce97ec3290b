"""Generation that drafts with an early exit against plain generation, by stock transformers, on a model trained for it.

    OMP_NUM_THREADS=1 python benchmarks/early_exit.py FOLDER [--tokens 300k] [--model DIR]

Writes records of an invented stock list, trains a new model of 24 narrow blocks on them with
`llmpare distill --early-exit 2,4`, and continues records that it has not seen, greedily. llmpare is not involved in
the timing. Plain and drafted runs of a prompt take turns; the ratio of their times is given as the median over prompts.
--model: times that model instead, on the same text, such as one that was trained on other text.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

EXITS = (2, 4)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 128, 128
TEACHER = Path(__file__).parents[1] / "examples" / "tiny-llama"  # gives the tokenizer; the text alone is learned
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}


def record(number: int, chance: random.Random) -> str:
    """A line of the stock list: much of it can be foreseen, some of it cannot."""
    return json.dumps(
        {
            "id": number,
            "name": chance.choice(["bolt", "washer", "bracket", "hinge", "valve", "gasket", "bearing", "spring"]),
            "material": chance.choice(["steel", "brass", "nylon"]),
            "size": f"M{chance.choice([4, 6, 8, 10])}",
            "stock": {"warehouse": chance.choice(["Lyon", "Turin", "Ghent", "Porto"]), "count": chance.randrange(100)},
            "available": chance.random() < 0.8,
            "supplier": {"name": "Northern Parts Ltd", "country": "Norway", "contact": "orders@example.com"},
            "notes": "Delivered in boxes of one hundred; see the general conditions of sale.",
        }
    )


def write_text(folder: Path) -> None:
    chance = random.Random(0)
    for name, lists in (("train.jsonl", 300), ("held_out.jsonl", PROMPTS)):
        with (folder / name).open("w", encoding="utf-8") as file:
            for _ in range(lists):
                first = chance.randrange(1, 900)
                text = "\n".join(record(first + index, chance) for index in range(25))
                file.write(json.dumps({"text": text}) + "\n")


def train(folder: Path, tokens: str) -> Path:
    (folder / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    command = [
        "distill", "--teacher", str(TEACHER), "--student-config", str(folder / "config.json"), "--loss",
        "cross-entropy", "--early-exit", ",".join(map(str, EXITS)), "--dataset", str(folder / "train.jsonl"),
        "--eval-dataset", str(folder / "held_out.jsonl"), "--eval-nsamples", "8", "--seqlen", "256", "--tokens",
        tokens, "--batch-tokens", "2048", "--device", "cpu", "-o", str(folder / "model"),
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "llmpare.cli", *command], check=True, stdout=subprocess.DEVNULL)
    return folder / "model"


def continued(model: Any, prompt: torch.Tensor, **drafting: Any) -> tuple[torch.Tensor, float]:
    """The continued prompt, and the seconds that it took."""
    start = time.perf_counter()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        **drafting,
    )
    return out, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", default="300k")
    parser.add_argument("--model", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    write_text(given.folder)
    place = given.model or train(given.folder, given.tokens)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    lines = (given.folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"] for line in lines]
    threshold = model.generation_config.assistant_confidence_threshold
    print(f"{model.config.num_hidden_layers} blocks, threshold {threshold}, {torch.get_num_threads()} threads")
    logging.set_verbosity_error()  # of transformers, which would say that it pads with the end of text
    for exit_ in EXITS:
        for warm in ({}, {"assistant_early_exit": exit_}):
            continued(model, prompts[0][:, :PROMPT_TOKENS], **warm)
        ratios, equal, tokens, seconds = [], 0, 0, [0.0, 0.0]
        for prompt in prompts:
            begin = prompt[:, :PROMPT_TOKENS]
            plain, alone = continued(model, begin)
            drafted, together = continued(model, begin, assistant_early_exit=exit_)
            ratios.append(alone / together)
            equal += torch.equal(plain, drafted)
            tokens += plain.shape[1] - PROMPT_TOKENS
            seconds = [seconds[0] + alone, seconds[1] + together]
        median = statistics.median(ratios)
        print(
            f"exit {exit_}: {tokens / seconds[0]:.0f} -> {tokens / seconds[1]:.0f} tokens/s, {median:.2f} times as "
            f"fast ({min(ratios):.2f} to {max(ratios):.2f}), {equal} of {len(prompts)} the same text"
        )


if __name__ == "__main__":
    main()
