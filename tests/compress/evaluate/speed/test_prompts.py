import json
from pathlib import Path

from llmpare.compress.evaluate.speed.prompts import equal, mixed, ordinary


def test_special_tokens_are_left_out(tmp_path: Path) -> None:
    added = [{"id": 3, "special": True}, {"id": 4, "special": False}, {"id": 99, "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    config = {"bos_token_id": 0, "eos_token_id": [1, 7], "pad_token_id": None}
    assert ordinary(tmp_path, config, 10) == [2, 4, 5, 6, 8, 9]


def test_a_folder_without_tokenizer_has_the_ids_of_its_configuration(tmp_path: Path) -> None:
    assert ordinary(tmp_path, {"eos_token_id": 2}, 4) == [0, 1, 3]


def test_prompts_are_of_exact_length_and_the_same_every_time() -> None:
    vocabulary = range(100, 200)
    found = equal(vocabulary, 3, 17)
    assert [len(prompt) for prompt in found] == [17] * 3
    assert {token for prompt in found for token in prompt} <= set(vocabulary)
    assert equal(vocabulary, 3, 17) == found
    assert equal(vocabulary, 5, 17)[:3] == found
    assert found[0] != found[1]


def test_mixed_prompts_reach_from_a_quarter_to_the_longest() -> None:
    found = [len(prompt) for prompt in mixed(range(10), 16, 64)]
    assert (min(found), max(found), len(set(found))) == (16, 64, 16)
    assert found != sorted(found)
    assert found != sorted(found, reverse=True)
    assert [len(prompt) for prompt in mixed(range(10), 1, 8)] == [8]
    assert all(mixed(range(10), 4, 1))
