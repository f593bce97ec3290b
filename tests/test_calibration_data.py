import http.server
import json
import socket
import sys
import threading
import time
import tracemalloc
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

from llmpare import calibration_data
from llmpare.calibration_data import PARTS, Message, Row, bundled, manifest, parse_row, presets, rows
from llmpare.compress.calibration import load, overlap
from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.request import TextSpec
from llmpare.compress.tokenizer import load_tokenizer

TINY_LLAMA = Path(__file__).parents[1] / "examples" / "tiny-llama"


def read(dataset: object, part: str = "calibration") -> list[Row]:
    return list(rows(str(dataset), part))


@pytest.fixture(scope="module")
def texts() -> dict[str, list[dict[str, Any]]]:
    return {part: [json.loads(line) for line in bundled(part).open("rb")] for part in PARTS}


class TestBundled:
    def test_the_manifest_describes_the_files(self):
        folder = bundled("calibration").parent
        assert json.loads((folder / "manifest.json").read_text("utf-8")) == manifest.build(folder)

    def test_there_is_enough_of_every_kind(self, texts):
        parts = manifest.build(bundled("calibration").parent)["parts"]
        assert sum(part["bytes"] for part in parts.values()) >= 200_000
        assert parts["calibration"]["kinds"].keys() == parts["evaluation"]["kinds"].keys()
        assert len(parts["calibration"]["kinds"]) >= 8
        languages = {
            kind: {row["language"] for row in texts["calibration"] if row["kind"] == kind}
            for kind in ("code", "languages")
        }
        assert len(languages["code"]) >= 5
        assert len(languages["languages"]) >= 3

    def test_every_row_has_its_own_name_and_a_shape_that_is_read(self, texts):
        names = [row["id"] for part in PARTS for row in texts[part]]
        assert len(set(names)) == len(names)
        for part in PARTS:
            assert len(read("bundled", part)) == len(texts[part])

    def test_half_of_a_part_is_a_mix_of_all_kinds(self, texts):
        for part in PARTS:
            kinds = [row["kind"] for row in texts[part]]
            assert set(kinds[: (len(kinds) + 1) // 2]) == set(kinds), part

    def test_the_parts_share_no_text(self):
        tokenizer = load_tokenizer(TINY_LLAMA)
        windows = [
            load(TextSpec(seqlen=2048), tokenizer, vocab_size=4096, part=part, max_length=2048) for part in PARTS
        ]
        for part in windows:
            assert part.ids.size > part.source["tokens_available"] - 2048, "not all of the text is compared"
        assert overlap(*windows) == 0.0


class TestRows:
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"text": "a", "id": 3}, Row("here", text="a")),
            ({"messages": [{"role": "user", "content": "a"}]}, Row("here", messages=(Message("user", "a"),))),
            (
                {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
                Row("here", messages=(Message("user", "a"), Message("assistant", "b"))),
            ),
            (
                {"prompt": "a", "completion": "b"},
                Row("here", messages=(Message("user", "a"), Message("assistant", "b"))),
            ),
            ({"input_ids": [3, 0], "text": "a"}, Row("here", input_ids=(3, 0))),
            ({"input_ids": [3, 0], "attention_mask": [1, 1]}, Row("here", input_ids=(3, 0))),
            ({"input_ids": [3, 0], "labels": [-100, 0]}, Row("here", input_ids=(3, 0), skipped=(True, False))),
            (
                {"input_ids": [3, 4, 0], "attention_mask": [1, 1, 0]},
                Row("here", input_ids=(3, 4, 0), skipped=(False, False, True), padding=1),
            ),
            ({"messages": None, "text": "a"}, Row("here", text="a")),
            (
                {"messages": [{"role": "assistant", "content": None}, {"role": "tool", "content": "a"}]},
                Row("here", messages=(Message("assistant", ""), Message("tool", "a"))),
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("a ", "b")]}]},
                Row("here", messages=(Message("user", "a b"),)),
            ),
            ({"conversations": [{"from": "gpt", "value": None}]}, Row("here", messages=(Message("assistant", ""),))),
        ],
    )
    def test_shapes(self, row, expected):
        assert parse_row(row, "here") == expected

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"body": "a", "title": "b"}, "its keys are: 'body', 'title'"),
            ({"body": None}, "its keys are: 'body'"),
            ({"prompt": "a"}, "its keys are: 'prompt'"),
            ({}, "its keys are: none"),
            ([1], "must be an object, this one is a list"),
            ({"text": 3}, "text must be text, it is a number"),
            ({"text": "\ud800"}, "surrogate"),
            ({"messages": []}, "must be a list of messages, it is an empty list"),
            ({"messages": "a"}, "must be a list of messages, it is text"),
            ({"messages": [{"role": "user"}]}, r'messages\[0\]: a message needs "role" and "content"'),
            ({"messages": [{"role": "user", "content": ["a"]}]}, "part of its content is text, only"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
                r"messages\[0\]: a part of its content is 'image', only text is read",
            ),
            ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "must be text, it is null"),
            ({"input_ids": []}, "whole numbers"),
            ({"input_ids": [1, True]}, "whole numbers"),
            ({"input_ids": [1, -1]}, "whole numbers"),
            ({"input_ids": [1.0]}, "whole numbers"),
            ({"input_ids": [1, 2], "labels": [1]}, "labels must be a list of 2 numbers"),
            ({"input_ids": [1, 2], "labels": [2, 3]}, r"labels\[0\] must be 1, as input_ids has it, or -100"),
            ({"input_ids": [1, 2], "labels": [1, None]}, r"labels\[1\] must be 2"),
            ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask must be a list of 2 numbers"),
            ({"input_ids": [1, 2], "attention_mask": [0, 1]}, "must be ones and then zeros"),
            ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "must be ones and then zeros"),
        ],
    )
    def test_other_shapes_are_refused_with_line_and_keys(self, tmp_path, row, reason):
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + json.dumps(row) + "\n")
        with pytest.raises(InputError, match=f"a.jsonl, line 3:? ?.*{reason}") as caught:
            read(tmp_path / "a.jsonl")
        if "keys" in reason:
            assert '{"messages": [{"role", "content"}]}' in caught.value.hint


class TestLocalFiles:
    def test_a_txt_file_is_one_text_as_it_stands(self, tmp_path):
        (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
        assert [row.text for row in read(tmp_path / "a.TXT")] == ["one\r\n\r\ntwo\n"]

    def test_blank_lines_and_blank_texts_are_no_rows(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(
            b'\xef\xbb\xbf{"text": "a"}\n\n{"text": " \\n"}\n{"text": null}\n{"text": "b"}'
        )
        assert [row.text for row in read(tmp_path / "a.jsonl")] == ["a", "b"]

    def test_parquet(self, tmp_path):
        turns = [{"role": "user", "content": "a"}]
        table = pyarrow.table({"messages": [turns, None], "text": [None, "b"], "other": [1, 2]})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        first, second = read(tmp_path / "a.parquet")
        assert first.messages == (Message("user", "a"),)
        assert (second.text, second.place) == ("b", f"{tmp_path / 'a.parquet'}, row 2")

    def test_a_table_with_nulls(self, tmp_path):
        table = pyarrow.table({"text": [None, "b"], "id": [1, 2]})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        assert [row.text for row in read(tmp_path / "a.parquet")] == ["b"]

    def test_parquet_without_a_known_column(self, tmp_path):
        pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
        with pytest.raises(InputError, match="row 1: no text in this row, its keys are: 'body'"):
            read(tmp_path / "a.parquet")

    def test_a_broken_parquet_file(self, tmp_path):
        (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
        with pytest.raises(InputError, match="a.parquet: not a readable Parquet file"):
            read(tmp_path / "a.parquet")

    def test_parquet_without_pyarrow(self, tmp_path, monkeypatch):
        (tmp_path / "a.parquet").touch()
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(InputError, match="needs the package 'pyarrow'") as caught:
            read(tmp_path / "a.parquet")
        assert "pip install" in caught.value.hint

    @pytest.mark.parametrize(
        ("name", "before"), [("a.txt", b"one\ntwo\n\xc3\xa9"), ("a.jsonl", b'{"text": "a"}\n\n{"text": "')]
    )
    @pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
    def test_what_is_not_utf8_is_named_by_offset_and_line(self, tmp_path, name, before, mark):
        (tmp_path / name).write_bytes(mark + before + b"\xff rest\n")
        offset = len(mark + before)
        with pytest.raises(InputError, match=f"not UTF-8: byte 0xff at offset {offset}, line 3"):
            read(tmp_path / name)

    @pytest.mark.parametrize("line", ['{"text": "a"', "text", "[" * 100_000, "1" * 5000, '{"text": "a"} {}'])
    def test_a_line_that_is_not_json_is_named(self, tmp_path, line):
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
        with pytest.raises(InputError, match="a.jsonl, line 2: not "):
            read(tmp_path / "a.jsonl")

    @pytest.mark.parametrize(("name", "reason"), [("a.jsonl", "line 2: longer than"), ("a.txt", "larger than")])
    def test_a_gigabyte_in_one_line_is_not_read(self, tmp_path, name, reason):
        with (tmp_path / name).open("wb") as file:
            file.write(b'{"text": "a"}\n')
            file.truncate(2**30)
        tracemalloc.start()
        try:
            with pytest.raises(InputError, match=reason):
                read(tmp_path / name)
            assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
        finally:
            tracemalloc.stop()

    def test_a_line_of_the_greatest_length_is_read(self, tmp_path, monkeypatch):
        line = '{"text": "abcdef"}\n'
        monkeypatch.setattr(calibration_data, "MAX_LINE", len(line))
        (tmp_path / "a.jsonl").write_text(line * 2)
        assert len(read(tmp_path / "a.jsonl")) == 2
        (tmp_path / "a.jsonl").write_text(line + " " + line)
        with pytest.raises(InputError, match="line 2: longer than"):
            read(tmp_path / "a.jsonl")

    def test_a_file_that_cannot_be_read(self, tmp_path, monkeypatch):
        (tmp_path / "a.txt").write_text("a")

        def denied(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", denied)
        with pytest.raises(InputError, match="cannot read .*a.txt: Permission denied"):
            read(tmp_path / "a.txt")


class TestNames:
    @pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "b/a.TGZ", "a.jsonl.zst", "a.tar"])
    @pytest.mark.parametrize("exists", [True, False])
    def test_archives_are_not_unpacked(self, tmp_path, name, exists):
        file = tmp_path / name
        if exists:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"PK")
        with pytest.raises(UsageError, match="archives are not unpacked"):
            read(file)

    def test_a_local_file_wins_over_a_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org").mkdir()
        (tmp_path / "org" / "name.txt").write_text("local")
        assert [row.text for row in read("org/name.txt")] == ["local"]
        (tmp_path / "c4").write_text("no known ending")
        with pytest.raises(UsageError, match="a text file ends in .txt, .jsonl, .parquet"):
            read("c4")

    @pytest.mark.parametrize("name", ["missing.jsonl", "some/missing.txt", "./missing", "/missing"])
    def test_a_missing_file(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError, match="no such file"):
            read(name)

    def test_a_folder(self, tmp_path):
        with pytest.raises(UsageError, match="is a folder"):
            read(tmp_path)

    @pytest.mark.parametrize(
        ("name", "meant"), [("wikitext", "wikitext2"), ("Ultra-Chat", "ultrachat"), ("bundeld", "bundled")]
    )
    def test_unknown_names(self, name, meant):
        with pytest.raises(UsageError, match=f"unknown data set '{name}'") as caught:
            read(name)
        assert caught.value.hint.startswith(f"did you mean '{meant}'? ")

    @pytest.mark.parametrize("name", ["", "qqqq", "a\0b", "x" * 5000])
    def test_names_like_nothing_else(self, name):
        with pytest.raises(UsageError, match="unknown data set") as caught:
            read(name)
        assert caught.value.hint.startswith("--dataset takes bundled, wikitext2, ")


class Hub(ModuleType):
    """Stands in for the package `datasets`: twenty rows in every split, and a record of what was asked for."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.__spec__ = ModuleSpec("datasets", None)
        self.exceptions = ModuleType("datasets.exceptions")
        self.exceptions.DatasetsError = type("DatasetsError", (Exception,), {})
        self.asked: list[tuple[str, str | None, str, bool]] = []
        self.splits = ["train", "test"]

    def get_dataset_split_names(self, path: str, config: str | None) -> list[str]:
        return self.splits

    def load_dataset(self, path: str, config: str | None, *, split: str, streaming: bool) -> Any:
        self.asked.append((path, config, split, streaming))
        for number in range(3000):
            turns = [{"role": "user", "content": f"{split} {number}"}]
            yield {"text": f"{split} {number}", "messages": turns, "id": number}


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.setattr(presets, "_reachable", lambda url: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return hub


class TestHub:
    @pytest.mark.parametrize("part", PARTS)
    @pytest.mark.parametrize("name", presets.PRESETS)
    def test_a_preset_reads_its_part(self, hub, name, part):
        source = presets.PRESETS[name]
        wanted = source.calibration if part == "calibration" else source.evaluation
        first = next(rows(name, part))
        assert hub.asked == [(source.path, source.config, wanted.split, source.streaming)]
        start = f"{wanted.split} {wanted.start}"
        if source.field == "messages":
            assert first.messages == (Message("user", start),)
        elif source.joined:
            assert first.text is not None
            assert first.text.startswith(f"{start}\n\n{wanted.split} {wanted.start + 1}\n\n")
            assert len(read(name, part)) == 1
        else:
            assert (first.text, first.place) == (start, f"{name}, row {wanted.start}")

    @pytest.mark.parametrize("name", presets.PRESETS)
    def test_the_parts_of_a_preset_share_no_rows(self, name):
        one, other = presets.PRESETS[name].calibration, presets.PRESETS[name].evaluation
        assert one.split != other.split or other.stop == one.start

    @pytest.mark.parametrize(
        ("name", "part", "asked"),
        [
            ("org/name", "calibration", ("org/name", None, "train", True)),
            ("org/name", "evaluation", ("org/name", None, "test", True)),
            ("org/name:en", "evaluation", ("org/name", "en", "test", True)),
            ("org/name:en:dev", "calibration", ("org/name", "en", "dev", True)),
            ("org/name::dev", "evaluation", ("org/name", None, "dev", True)),
        ],
    )
    def test_a_hub_name_with_config_and_split(self, hub, name, part, asked):
        # Of the two columns that hold text, the one with roles is taken.
        assert next(rows(name, part)).messages is not None
        assert hub.asked == [asked]

    def test_a_set_with_one_split_serves_both_parts(self, hub):
        hub.splits = ["all"]
        for part in PARTS:
            next(rows("org/name", part))
        assert [asked[2] for asked in hub.asked] == ["all", "all"]

    def test_offline_the_cache_is_used_and_nothing_is_probed(self, hub, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(presets, "_reachable", lambda url: pytest.fail("probed"))
        next(rows("c4", "calibration"))
        assert hub.asked == [("allenai/c4", "en", "train", False)]

    @pytest.mark.parametrize("error", [ValueError, ConnectionError, KeyError, RuntimeError])
    def test_what_the_hub_refuses_is_an_input_error(self, hub, error):
        def refuse(*_: object, **__: object) -> None:
            raise error("no such split\nand much more")

        hub.load_dataset = refuse
        with pytest.raises(InputError, match="cannot load the data set 'c4': .*no such split") as caught:
            read("c4")
        assert "--dataset bundled" in caught.value.hint

    def test_lines_of_a_joined_text_may_be_null(self, hub):
        hub.load_dataset = lambda *_, **__: iter([{"text": "a"}, {"text": None}, {"text": "b"}])
        assert [row.text for row in read("wikitext2")] == ["a\n\n\n\nb"]

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(InputError, match="needs the package 'datasets'") as caught:
            read("c4")
        assert "pip install 'llmpare[data]'" in caught.value.hint

    @pytest.mark.parametrize("name", ["c4", "org/name"])
    def test_without_a_network(self, monkeypatch, name):
        with socket.create_server(("127.0.0.1", 0)) as server:
            closed = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        start = time.monotonic()
        with pytest.raises(InputError, match=f"the hub at {closed} cannot be reached") as caught:
            read(name)
        assert time.monotonic() - start < 10
        assert "--dataset bundled" in caught.value.hint

    @pytest.mark.parametrize("status", [200, 404])
    def test_any_answer_is_a_network(self, status):
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
            threading.Thread(target=server.handle_request, daemon=True).start()
            assert presets._reachable(f"http://127.0.0.1:{server.server_port}")

    def test_silence_is_no_network(self, monkeypatch):
        monkeypatch.setattr(presets, "PROBE_SECONDS", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as server:
            assert not presets._reachable(f"http://127.0.0.1:{server.getsockname()[1]}")
