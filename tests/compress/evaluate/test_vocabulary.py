import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmpare.compress.errors import InputError
from llmpare.compress.evaluate.vocabulary import require_same

TINY_LLAMA = Path(__file__).parents[3] / "examples" / "tiny-llama"


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Any:
    """The tokenizer of the example, after a change of its file."""
    folder.mkdir()
    shutil.copyfile(TINY_LLAMA / "tokenizer_config.json", folder / "tokenizer_config.json")
    content = json.loads((TINY_LLAMA / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def swap(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    a, b = list(vocab)[1000:1002]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def merge_less(content: dict[str, Any]) -> None:
    content["model"]["merges"] = content["model"]["merges"][:50]


def add(content: dict[str, Any]) -> None:
    token = {"content": "<|more|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"].append({"id": 4096, **token, "special": True})


def test_one_tokenizer_in_two_folders(tmp_path: Path) -> None:
    require_same(AutoTokenizer.from_pretrained(TINY_LLAMA), changed(tmp_path / "copy", lambda content: None), "a", "b")


def test_a_token_more_at_the_end(tmp_path: Path) -> None:
    original = AutoTokenizer.from_pretrained(TINY_LLAMA)
    longer = changed(tmp_path / "longer", add)
    assert len(longer) == len(original) + 1
    require_same(original, longer, "a", "b")
    require_same(longer, original, "b", "a")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            swap,
            "'dense' and 'other' have different vocabularies: id [0-9]+ is '.*' in one and '.*' in the other, 2 ids",
        ),
        (merge_less, "they cut the same text into different tokens"),
    ],
)
def test_what_differs_is_said(tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str) -> None:
    with pytest.raises(InputError, match=said):
        require_same(AutoTokenizer.from_pretrained(TINY_LLAMA), changed(tmp_path / "x", change), "dense", "other")
