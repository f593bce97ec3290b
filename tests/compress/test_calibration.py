import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmpare.compress import calibration, chat
from llmpare.compress.calibration import Windows, load, overlap
from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.request import TextSpec
from llmpare.compress.tokenizer import load_tokenizer

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "tiny-llama"
VOCABULARY = 4096
PROSE = "The lamp was lit before the boats came in, and nobody asked who had carried the oil up the stairs.\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TINY_LLAMA)


def windows(dataset: Path, tokenizer: Any, *, part: str = "calibration", max_length: int = 1024, **spec: Any):
    return load(TextSpec(str(dataset), **spec), tokenizer, vocab_size=VOCABULARY, part=part, max_length=max_length)


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ids_of(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class TestText:
    def test_a_txt_file_is_one_text_with_one_bos(self, tmp_path, tokenizer):
        text = " \n = Title = \n\n" + PROSE * 20 + "\n\n\n" + PROSE
        (tmp_path / "a.txt").write_text(text)
        stream = [tokenizer.bos_token_id, *ids_of(text, tokenizer)]
        result = windows(tmp_path / "a.txt", tokenizer, seqlen=32, nsamples=len(stream) // 32)
        assert result.ids.dtype == np.int64
        assert result.ids.ravel().tolist() == stream[: len(stream) // 32 * 32]
        assert result.source == {
            "dataset": str(tmp_path / "a.txt"),
            "part": "calibration",
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "rows": 1,
            "tokens_available": len(stream),
            "windows": len(stream) // 32,
            "seqlen": 32,
            "bos": 0,
            "first_line": " = Title = ",
            "short": False,
            "whole": True,
        }

    def test_rows_are_joined_with_blank_lines(self, tmp_path, tokenizer):
        file = write_rows(tmp_path / "a.jsonl", {"text": PROSE}, {"text": ""}, {"text": "Second text."})
        result = windows(file, tokenizer, seqlen=8)
        stream = [0, *ids_of(PROSE, tokenizer), *ids_of("\n\nSecond text.", tokenizer)]
        assert result.source["tokens_available"] == len(stream)
        assert result.source["rows"] == 2
        assert result.source["sha256"] == hashlib.sha256(f"{PROSE}\n\nSecond text.".encode()).hexdigest()
        assert result.ids.ravel().tolist() == stream[: len(stream) // 8 * 8]

    def test_batching_does_not_show(self, tmp_path, tokenizer, monkeypatch):
        file = write_rows(tmp_path / "a.jsonl", *({"text": f"{number} {PROSE}"} for number in range(40)))
        together = windows(file, tokenizer, seqlen=16)
        monkeypatch.setattr(calibration, "BATCH_TEXT", 150)
        monkeypatch.setattr(calibration, "BATCH_ROWS", 3)
        apart = windows(file, tokenizer, seqlen=16)
        assert apart.source == together.source
        assert (apart.ids == together.ids).all()

    def test_windows_are_spread_evenly(self, tmp_path, tokenizer):
        (tmp_path / "a.txt").write_text("".join(f"{number} of many. " for number in range(100)))
        every = windows(tmp_path / "a.txt", tokenizer, seqlen=20, nsamples=10).ids
        available = windows(tmp_path / "a.txt", tokenizer, seqlen=20).ids
        assert len(available) < 128
        assert len(every) == 10
        assert (every == available[np.arange(10) * len(available) // 10]).all()

    def test_a_tokenizer_without_bos_puts_none(self, tmp_path):
        shutil.copy(TINY_LLAMA / "tokenizer.json", tmp_path)
        (tmp_path / "a.txt").write_text(PROSE)
        plain = load_tokenizer(tmp_path)
        result = windows(tmp_path / "a.txt", plain, seqlen=8)
        assert result.source["bos"] is None
        assert result.ids[0].tolist() == ids_of(PROSE, plain)[:8]

    @pytest.mark.parametrize(("max_length", "seqlen"), [(128, 128), (4096, 2048)])
    def test_the_default_length_is_2048_or_what_the_model_allows(self, tmp_path, tokenizer, max_length, seqlen):
        (tmp_path / "a.txt").write_text(PROSE * 200)
        assert windows(tmp_path / "a.txt", tokenizer, max_length=max_length).ids.shape[1] == seqlen

    @pytest.mark.parametrize(("part", "default"), [("calibration", 128), ("evaluation", 32)])
    def test_the_default_number_depends_on_the_part(self, tmp_path, tokenizer, part, default):
        (tmp_path / "a.txt").write_text(PROSE * 100)
        full = windows(tmp_path / "a.txt", tokenizer, part=part, seqlen=10)
        assert (len(full.ids), full.source["short"]) == (default, False)
        short = windows(tmp_path / "a.txt", tokenizer, part=part, seqlen=1000)
        assert 1 <= len(short.ids) < default
        assert short.source["short"] is True

    def test_an_explicit_number_is_kept_or_refused(self, tmp_path, tokenizer):
        (tmp_path / "a.txt").write_text(PROSE)
        tokens = 1 + len(ids_of(PROSE, tokenizer))
        with pytest.raises(InputError, match=f"{tokens} tokens, and 10 windows of 16 need 160"):
            windows(tmp_path / "a.txt", tokenizer, seqlen=16, nsamples=10)

    def test_less_than_one_window_is_refused(self, tmp_path, tokenizer):
        (tmp_path / "a.txt").write_text("Two words.")
        with pytest.raises(InputError, match=r"\d tokens, and 1 windows of 1024 need 1024"):
            windows(tmp_path / "a.txt", tokenizer)

    @pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.txt", " \n\n"), ("a.jsonl", "\n\n")])
    def test_no_text_is_refused(self, tmp_path, tokenizer, name, content):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match="no text, 0 tokens, and 160 are needed"):
            windows(tmp_path / name, tokenizer, seqlen=16, nsamples=10)

    @pytest.mark.parametrize("spec", [{"nsamples": 0}, {"seqlen": 1}, {"seqlen": 1025}])
    def test_impossible_shapes_are_usage_errors(self, tmp_path, tokenizer, spec):
        (tmp_path / "a.txt").write_text(PROSE)
        with pytest.raises(UsageError, match=r"--(nsamples|seqlen)"):
            windows(tmp_path / "a.txt", tokenizer, **spec)

    def test_a_token_outside_the_vocabulary_is_refused(self, tmp_path, tokenizer):
        (tmp_path / "a.txt").write_text(PROSE)
        largest = max(ids_of(PROSE, tokenizer))
        with pytest.raises(InputError, match=f"token id {largest} is outside .* vocabulary of {largest}"):
            load(
                TextSpec(str(tmp_path / "a.txt"), seqlen=8),
                tokenizer,
                vocab_size=largest,
                part="calibration",
                max_length=64,
            )

    def test_reading_stops_when_there_is_plenty(self, tmp_path, tokenizer, monkeypatch):
        monkeypatch.setattr(calibration, "ENOUGH_TEXT", 1000)
        monkeypatch.setattr(calibration, "BATCH_TEXT", 100)
        file = write_rows(tmp_path / "a.jsonl", *[{"text": PROSE}] * 100)
        few = windows(file, tokenizer, seqlen=16, nsamples=2)
        assert few.source["whole"] is False
        assert few.source["rows"] == 10
        many = windows(file, tokenizer, seqlen=16, nsamples=100)
        assert len(many.ids) == 100

    def test_a_long_text_prints_no_warning(self, tmp_path, tokenizer, capfd):
        (tmp_path / "a.txt").write_text(PROSE * 200)
        windows(tmp_path / "a.txt", load_tokenizer(TINY_LLAMA), seqlen=64)
        assert capfd.readouterr() == ("", "")


class TestGivenIds:
    def test_rows_are_taken_as_they_are(self, tmp_path, tokenizer):
        rows = [[7, 8, 9, 10], [1, 2, 3, 4], [5, 5, 5, 5]]
        result = windows(write_rows(tmp_path / "a.jsonl", *({"input_ids": row} for row in rows)), tokenizer)
        assert result.ids.tolist() == rows
        assert result.source["sha256"] == hashlib.sha256(np.array(rows, "<i8").tobytes()).hexdigest()
        assert (result.source["tokens_available"], result.source["bos"]) == (12, None)
        assert result.source["first_line"] == tokenizer.decode(rows[0])

    def test_the_first_rows_are_taken_and_cut(self, tmp_path, tokenizer):
        rows = ({"input_ids": [row] * (4 + row)} for row in range(5))
        result = windows(write_rows(tmp_path / "a.jsonl", *rows), tokenizer, seqlen=3, nsamples=2)
        assert result.ids.tolist() == [[0, 0, 0], [1, 1, 1]]
        assert result.source["rows"] == 5

    def test_rows_of_one_length_may_be_shorter_than_seqlen(self, tmp_path, tokenizer):
        file = write_rows(tmp_path / "a.jsonl", *[{"input_ids": [1, 2, 3]}] * 2)
        assert windows(file, tokenizer, seqlen=64).ids.shape == (2, 3)

    @pytest.mark.parametrize("seqlen", [None, 4])
    def test_rows_of_different_lengths_are_refused(self, tmp_path, tokenizer, seqlen):
        file = write_rows(tmp_path / "a.jsonl", {"input_ids": [1, 2, 3, 4]}, {"input_ids": [1, 2]})
        with pytest.raises(InputError, match=r"line 2: 2 tokens, where .*line 1 has 4") as caught:
            windows(file, tokenizer, seqlen=seqlen)
        assert "--seqlen 2" in caught.value.hint

    def test_rows_longer_than_the_model_allows_are_refused(self, tmp_path, tokenizer):
        file = write_rows(tmp_path / "a.jsonl", {"input_ids": [1] * 30})
        with pytest.raises(InputError, match="30 tokens, and this model takes 2 to 16"):
            windows(file, tokenizer, max_length=16)

    def test_too_few_rows_are_refused(self, tmp_path, tokenizer):
        file = write_rows(tmp_path / "a.jsonl", {"input_ids": [1, 2]})
        with pytest.raises(InputError, match="2 tokens, and 3 windows of 2 need 6"):
            windows(file, tokenizer, nsamples=3)

    def test_an_id_outside_the_vocabulary_is_refused(self, tmp_path, tokenizer):
        file = write_rows(tmp_path / "a.jsonl", {"input_ids": [1, 2]}, {"input_ids": [1, 10**30]})
        with pytest.raises(InputError, match=f"line 2: token id {10**30} is outside .* {VOCABULARY}"):
            windows(file, tokenizer)

    def test_what_is_to_be_skipped_counts_where_something_is_learned(self, tmp_path, tokenizer):
        labelled = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}
        file = write_rows(tmp_path / "a.jsonl", labelled, {"input_ids": [5, 6, 7, 8]})
        spec, limits = TextSpec(str(file), seqlen=3), {"vocab_size": VOCABULARY, "max_length": 1024}
        learned = load(spec, tokenizer, part="calibration", learning=True, **limits)
        assert learned.skipped.tolist() == [[True, True, False], [False, False, False]]
        plain = windows(file, tokenizer, seqlen=3)
        assert plain.skipped is None
        assert plain.ids.tolist() == learned.ids.tolist()
        assert plain.source["sha256"] != learned.source["sha256"]

    def test_padding_is_no_text(self, tmp_path, tokenizer):
        padded = {"input_ids": [1, 2, 3, 0], "attention_mask": [1, 1, 1, 0]}
        file = write_rows(tmp_path / "a.jsonl", {"input_ids": [5, 6, 7, 8]}, padded)
        with pytest.raises(InputError, match="line 2: 1 of its ids are padding"):
            windows(file, tokenizer)

    def test_a_row_with_nothing_to_learn_is_refused(self, tmp_path, tokenizer):
        """The first id is predicted by nothing."""
        file = write_rows(tmp_path / "a.jsonl", {"input_ids": [1, 2, 3], "labels": [1, -100, -100]})
        spec = TextSpec(str(file))
        with pytest.raises(InputError, match="line 1: none of its first 3 ids is to be learned"):
            load(spec, tokenizer, vocab_size=VOCABULARY, part="calibration", max_length=9, learning=True)

    @pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
    def test_ids_and_text_do_not_mix(self, tmp_path, tokenizer, order):
        file = write_rows(tmp_path / "a.jsonl", *[{"input_ids": [1, 2]}, {"text": "words"}][order])
        with pytest.raises(InputError, match="line 2: .* after rows of"):
            windows(file, tokenizer)


DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why <is> the sky blue?\n"},
    {"role": "assistant", "content": "Short waves scatter more."},
]
CHAT_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% continue %}{% endif %}
    {{- '[' + message['role'] + ']' }}{% generation %}{{ message | tojson(indent=1) }}{% endgeneration %}
{%- endfor %}
{% if tools is not none %}{{ raise_exception('tools!') }}{% endif %}"""


class TestDialogues:
    def load_with(self, template: str | None, folder: Path, *rows: object, **spec: Any) -> Windows:
        tokenizer = load_tokenizer(TINY_LLAMA)
        tokenizer.chat_template = template
        file = write_rows(folder / "chat.jsonl", *(rows or [{"messages": DIALOGUE}]))
        return windows(file, tokenizer, **{"seqlen": 8, "chat_template": True, **spec})

    def test_roles_are_plain_paragraphs(self, tmp_path):
        plain = self.load_with(CHAT_TEMPLATE, tmp_path, chat_template=False)
        text = "system: Be brief.\n\nuser: Why <is> the sky blue?\n\n\nassistant: Short waves scatter more."
        assert plain.source["sha256"] == hashlib.sha256(text.encode()).hexdigest()

    def test_the_template_renders_as_in_transformers(self, tmp_path):
        result = self.load_with(CHAT_TEMPLATE, tmp_path)
        tokenizer = load_tokenizer(TINY_LLAMA)
        expected = tokenizer.apply_chat_template(DIALOGUE, chat_template=CHAT_TEMPLATE, tokenize=False)
        assert expected.startswith('<s>[user]{\n "role": "user",\n "content": "Why <is>')
        assert result.source["sha256"] == hashlib.sha256(expected.encode()).hexdigest()
        # The template writes the bos itself, and one is enough.
        stream = ids_of(expected, tokenizer)
        assert result.ids.ravel().tolist() == stream[: len(stream) // 8 * 8]

    def test_rows_without_roles_keep_their_place(self, tmp_path):
        rows = [{"text": "Before."}, {"messages": DIALOGUE}, {"text": "After."}]
        result = self.load_with("{{ messages[1].role }} asks", tmp_path, *rows, seqlen=4)
        expected = "Before.\n\nuser asks\n\nAfter."
        assert result.source["sha256"] == hashlib.sha256(expected.encode()).hexdigest()

    def test_the_date_stands_still(self, tmp_path):
        result = self.load_with("{{ strftime_now('%d %B %Y') }} and some more words", tmp_path)
        assert result.source["first_line"].startswith("01 January 2025")

    def test_a_model_without_a_template_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="no chat template"):
            self.load_with(None, tmp_path)

    def test_asking_for_a_template_without_any_roles_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="no row has roles"):
            self.load_with(CHAT_TEMPLATE, tmp_path, {"text": PROSE})

    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            ("{{ ''.__class__.__mro__ }}", "SecurityError.*__class__"),
            ("{{ messages.append(1) }}", "SecurityError"),
            ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "__init__ is not a name to set"),
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{% for %}", "TemplateSyntaxError"),
            ("{{ 1 / 0 }}", "ZeroDivisionError"),
            ("{{ 'x' * 2000000000 }}", "MemoryError"),
            ("{{ 'x' * 100000000 }}", "more than 64 Mi characters"),
            ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ],
    )
    def test_a_hostile_template_is_rejected(self, tmp_path, template, reason):
        with pytest.raises(InputError, match=f"template rejected: .*{reason}.*line 1"):
            self.load_with(template, tmp_path)

    def test_an_endless_template_is_stopped(self, tmp_path, monkeypatch):
        monkeypatch.setattr(chat, "SECONDS", 1)
        endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
        with pytest.raises(InputError, match="template rejected: not done after 1 s of the processor's time"):
            self.load_with(endless, tmp_path)

    def test_a_busy_machine_is_no_fault_of_the_template(self, tmp_path, monkeypatch):
        slow = tmp_path / "python"
        slow.write_text(f'#!/bin/sh\nsleep 2\nexec "{sys.executable}" "$@"\n')
        slow.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(slow))
        monkeypatch.setattr(chat, "SECONDS", 1)
        assert self.load_with(CHAT_TEMPLATE, tmp_path)

    def test_the_row_that_a_template_rejects_is_named(self, tmp_path):
        picky = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}ok"
        rows = [{"messages": DIALOGUE[1:]}, {"messages": DIALOGUE[1:]}, {"messages": DIALOGUE}]
        with pytest.raises(InputError, match=r"user first \(at .*line 3\)"):
            self.load_with(picky, tmp_path, *rows)


class TestOverlap:
    @staticmethod
    def of(ids: np.ndarray) -> Windows:
        return Windows(ids.astype(np.int64), {})

    def test_against_a_search_for_every_run(self):
        draw = np.random.default_rng(0)
        known = draw.integers(0, 50, (6, 90))
        asked = draw.integers(0, 50, (5, 70))
        asked[1, 3:35] = known[2, 40:72]  # exactly 32 tokens
        asked[3, 20:70] = known[5, 0:50]
        asked[4, 10:41] = known[0, 10:41]  # 31, one too few
        asked[4, 41] = (known[0, 41] + 1) % 50
        asked[4, 9] = (known[0, 9] + 1) % 50
        runs = {tuple(row[i : i + 32]) for row in known.tolist() for i in range(len(row) - 31)}
        inside = np.zeros(asked.shape, dtype=bool)
        for row, line in enumerate(asked.tolist()):
            for i in range(len(line) - 31):
                inside[row, i : i + 32] |= tuple(line[i : i + 32]) in runs
        assert inside.sum() == 32 + 50
        assert overlap(self.of(known), self.of(asked)) == inside.mean()

    def test_the_same_text_overlaps_entirely(self):
        ids = np.random.default_rng(0).integers(0, 4096, (4, 64))
        assert overlap(self.of(ids), self.of(ids)) == 1.0

    def test_windows_shorter_than_a_run_share_nothing(self):
        ids = np.arange(62).reshape(2, 31)
        assert overlap(self.of(ids), self.of(ids)) == 0.0


class TestLoadTokenizer:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(TINY_LLAMA / name, tmp_path / name)
        return tmp_path

    def test_missing(self, folder):
        (folder / "tokenizer.json").unlink()
        with pytest.raises(InputError, match=re.escape(str(folder)) + ": no tokenizer .* tokenizer.json"):
            load_tokenizer(folder)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    @pytest.mark.parametrize("content", [b"", b'{"version": ', b"[]", bytes(range(256)), b"[" * 100_000])
    def test_not_a_json_object(self, folder, name, content):
        (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=re.escape(str(folder / name)) + " is corrupt"):
            load_tokenizer(folder)

    @pytest.mark.parametrize(
        "damage", [{"model": {"type": "none"}}, {"model": None}, {"added_tokens": 7}, {"version": 3}]
    )
    def test_damaged_inside(self, folder, damage):
        content = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(content | damage))
        with pytest.raises(InputError, match="tokenizer.json cannot be loaded as a tokenizer"):
            load_tokenizer(folder)

    def test_custom_code_is_not_run(self, folder):
        (folder / "evil.py").write_text("raise SystemExit('it ran')")
        custom = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(custom))
        with pytest.raises(InputError, match="custom code"):
            load_tokenizer(folder)
