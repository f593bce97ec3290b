import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmpare import calibration_data
from llmpare.compress import calibration
from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.evaluate import text
from llmpare.compress.evaluate.request import TextRequest
from llmpare.compress.request import TextSpec

TINY_LLAMA = Path(__file__).parents[3] / "examples" / "tiny-llama"
STORY = "Übung macht 日本 the master.\n\nA 🦊 ran  over\tthe hill, twice.\n" * 30


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_LLAMA)


def read(tokenizer: Any, request: TextRequest) -> text.Text:
    return text.read(request, tokenizer, vocab_size=4096, max_length=1024)


@pytest.fixture
def story(tmp_path: Path) -> str:
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    return str(tmp_path / "story.txt")


def test_windows_are_the_first_ones_of_the_text_tokenized_whole(tokenizer: Any, story: str) -> None:
    expected = [tokenizer.bos_token_id, *tokenizer(STORY, add_special_tokens=False)["input_ids"]]
    some, all_of_it = read(tokenizer, TextRequest((story,), 3, 16)), read(tokenizer, TextRequest((story,), None, 16))
    assert some.ids.flatten().tolist() == expected[:48]
    assert all_of_it.ids.flatten().tolist() == expected[: len(expected) // 16 * 16]
    assert some.source["tokens_available"] == len(expected)
    assert some.source["whole"] is True
    assert some.source["ids_sha256"] != all_of_it.source["ids_sha256"]


def test_files_are_read_to_the_end_of_the_last(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "ENOUGH_TEXT", 10)
    names = tuple(str(tmp_path / f"{name}.txt") for name in ("first", "second"))
    for name in names:
        Path(name).write_text(STORY, encoding="utf-8")
    whole = read(tokenizer, TextRequest(names, None, 16))
    assert (whole.source["rows"], whole.source["whole"]) == (2, True)
    some = read(tokenizer, TextRequest(names, 1, 16))
    assert (some.source["rows"], some.source["whole"]) == (1, False)


def test_it_is_the_stream_that_calibration_cuts(tokenizer: Any) -> None:
    """Of the bundled rows, joined with blank lines: quantize and evaluate measure on the same text."""
    mine = read(tokenizer, TextRequest(seqlen=512))
    spec = TextSpec(nsamples=len(mine.ids), seqlen=512)
    other = calibration.load(spec, tokenizer, vocab_size=4096, part="evaluation", max_length=1024)
    assert mine.ids.tolist() == other.ids.tolist()
    assert mine.source["sha256"] == other.source["sha256"]


@pytest.mark.parametrize("length", [2, 3, 16, 64])
def test_scored_bytes_are_those_between_the_first_tokens(tokenizer: Any, story: str, length: int) -> None:
    """Also where a window ends inside a character: each byte of the text counts at most once."""
    found = read(tokenizer, TextRequest((story,), None, length))
    ends = [0] + [STORY[:stop] for _, stop in tokenizer(STORY, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"]]  # fmt: skip
    places = [0] + [len(prefix.encode()) for prefix in ends[1:]]
    expected = sum(places[(w + 1) * length - 1] - places[w * length] for w in range(len(found.ids)))
    assert found.scored_bytes == expected


def test_every_token_knows_the_kind_of_its_row(tokenizer: Any) -> None:
    found = read(tokenizer, TextRequest(seqlen=64))
    rows = list(calibration_data.rows("bundled", "evaluation"))
    assert set(found.kinds) == {row.kind for row in rows}
    assert found.kinds[found.kind[0, 5]] == rows[0].kind
    changes = (found.kind.flatten()[1:] != found.kind.flatten()[:-1]).sum()
    assert len(set(found.kinds)) - 1 <= changes < len(rows)


def test_rows_of_ids_are_taken_as_they_are(tokenizer: Any, tmp_path: Path) -> None:
    ids = [[0, 100 + i, 200, 300] for i in range(5)]
    (tmp_path / "ids.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in ids))
    found = read(tokenizer, TextRequest((str(tmp_path / "ids.jsonl"),)))
    assert found.ids.tolist() == ids
    assert found.scored_bytes == sum(len(tokenizer.decode(row[1:]).encode()) for row in ids)
    assert read(tokenizer, TextRequest((str(tmp_path / "ids.jsonl"),), 2)).ids.tolist() == ids[:2]


def test_ids_after_text_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "mixed.jsonl").write_text('{"text": "a b c d"}\n{"input_ids": [1, 2, 3]}\n')
    with pytest.raises(InputError, match=r"mixed\.jsonl, line 2: input_ids after rows of text"):
        read(tokenizer, TextRequest((str(tmp_path / "mixed.jsonl"),), seqlen=2))


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_no_text(tokenizer: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(InputError, match="no text, 0 tokens, and 1024 are needed"):
        read(tokenizer, TextRequest((str(tmp_path / "empty.txt"),)))


def test_too_little_text(tokenizer: Any, story: str) -> None:
    with pytest.raises(InputError, match="tokens, and 1000 windows of 64 need 64000"):
        read(tokenizer, TextRequest((story,), 1000, 64))


@pytest.mark.parametrize("length", [1, 1025])
def test_lengths_there_cannot_be(tokenizer: Any, story: str, length: int) -> None:
    with pytest.raises(UsageError, match=f"--seqlen {length}: this model takes 2 to 1024 tokens"):
        read(tokenizer, TextRequest((story,), None, length))


def test_ids_beyond_the_vocabulary(tokenizer: Any, story: str) -> None:
    with pytest.raises(InputError, match="outside the model's vocabulary of 100"):
        text.read(TextRequest((story,)), tokenizer, vocab_size=100, max_length=64)
