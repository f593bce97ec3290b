"""Prompts of an exact number of tokens, the same ones every time."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SEED = 0


def ordinary(folder: Path, config: dict[str, Any], size: int) -> list[int]:
    """Ids below `size` that are no special tokens, by tokenizer.json and the ids that config.json names."""
    special = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(name)
        special |= set(value) if isinstance(value, list) else {value}
    try:
        added = json.loads((folder / "tokenizer.json").read_bytes()).get("added_tokens", [])
    except FileNotFoundError:
        added = []
    special |= {token["id"] for token in added if token.get("special")}
    return [token for token in range(size) if token not in special]


def equal(vocabulary: Sequence[int], batch: int, length: int) -> list[list[int]]:
    """`batch` random sequences of `length` ids. A larger batch begins with the sequences of a smaller one."""
    source = random.Random(SEED)
    return [source.choices(vocabulary, k=length) for _ in range(batch)]


def mixed(vocabulary: Sequence[int], requests: int, longest: int) -> list[list[int]]:
    """Random sequences of lengths spread evenly from a quarter of `longest` to all of it, in random order."""
    source = random.Random(SEED)
    shortest = max(1, longest // 4)
    steps = max(1, requests - 1)
    lengths = [longest - (longest - shortest) * index // steps for index in range(requests)]
    source.shuffle(lengths)
    return [source.choices(vocabulary, k=length) for length in lengths]
