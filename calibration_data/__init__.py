"""Rows of text from wherever they are: the texts bundled here, a local file, or a data set of the hub.

Bundled: calibration.jsonl and evaluation.jsonl, written for this project, which share no text; manifest.json
says what they hold. A row has one of the shapes of ACCEPTED; whatever else it carries is ignored. Beside input_ids may
stand labels and attention_mask, as trainers of transformers take them.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from llmpare.calibration_data import presets
from llmpare.compress.errors import InputError, UsageError

PARTS = ("calibration", "evaluation")
MAX_LINE = 16 * 2**20  # bytes of one row of a .jsonl file
MAX_TEXT = 64 * 2**20  # bytes of a .txt file, which is tokenized in one piece
ACCEPTED = '{"text"}, {"messages": [{"role", "content"}]}, {"conversations"}, {"prompt", "completion"} or {"input_ids"}'
IGNORED = -100  # the label of a token that is not to be learned, as trainers of transformers have it

_TEXTS = frozenset({"text", "messages", "conversations", "prompt", "completion", "input_ids"})
_BOM = b"\xef\xbb\xbf"
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One document: exactly one of text, messages, input_ids is set.

    place: where it stands, for errors. kind: what sort of text it is, for those who ask by kind. skipped: of every id,
    whether it is not to be learned, such as those of a prompt; None: all are. padding: how many ids at the end are no
    text.
    """

    place: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    input_ids: tuple[int, ...] | None = None
    skipped: tuple[bool, ...] | None = None
    padding: int = 0
    kind: str | None = None


def bundled(part: str) -> Path:
    """The file with the texts of a part ('calibration' or 'evaluation') that come with llmpare."""
    return Path(__file__).with_name(f"{part}.jsonl")


def rows(dataset: str, part: str) -> Iterator[Row]:
    """The rows of a data set in their order, those without any text left out.

    dataset: a local .txt (one row: the whole file), .jsonl or .parquet file; 'bundled'; a preset; or a hub
    name. A local file wins over a name. Raises UsageError for what is none of these and InputError, naming
    the line, for rows that cannot be used.
    """
    if dataset.lower().endswith(_ARCHIVES):
        raise UsageError(f"{dataset}: archives are not unpacked", "unpack it and give the file inside")
    for row in _all_rows(dataset, part):
        if row.text is None or row.text.strip():
            yield row


def _all_rows(dataset: str, part: str) -> Iterator[Row]:
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    path = Path(dataset)
    if os.path.isfile(dataset):
        if path.suffix.lower() not in readers:
            raise UsageError(f"{dataset}: a text file ends in {', '.join(readers)}", "convert it, or rename it")
        return _read_local(readers[path.suffix.lower()](path), path)
    if path.suffix.lower() in readers or dataset.startswith(("/", "./", "../", "~")):
        problem = "is a folder" if path.is_dir() else "no such file"
        raise UsageError(f"{dataset}: {problem}", f"--dataset takes a file that ends in {', '.join(readers)}")
    if dataset == "bundled":
        return _read_local(_read_jsonl(bundled(part)), bundled(part))
    return (parse_row(row, place) for place, row in presets.rows(dataset, part))


def parse_row(row: object, place: str) -> Row:
    """The document in one row of a data set. Raises InputError for a shape that is not one of ACCEPTED."""
    if not isinstance(row, dict):
        raise InputError(f"{place}: a row must be an object, this one is {_kind(row)}", f"accepted: {ACCEPTED}")
    kind = row.get("kind")
    return replace(_document(row, place), kind=kind if isinstance(kind, str) else None)


def _document(row: dict[str, Any], place: str) -> Row:
    given = {key for key, value in row.items() if value is not None}
    if "input_ids" in given:
        ids = _token_ids(row["input_ids"], place)
        padding = _padding(row.get("attention_mask"), len(ids), place)
        return Row(place, input_ids=ids, skipped=_skipped(row.get("labels"), ids, padding, place), padding=padding)
    for key in ("messages", "conversations"):
        if key in given:
            return Row(place, messages=_messages(row[key], f"{place}: {key}"))
    if {"prompt", "completion"} <= given:
        turns = (("user", row["prompt"]), ("assistant", row["completion"]))
        return Row(place, messages=tuple(Message(role, _string(text, place)) for role, text in turns))
    if "text" in given:
        return Row(place, text=_string(row["text"], f"{place}: text"))
    if row.keys() & _TEXTS and given.isdisjoint(_TEXTS):
        return Row(place, text="")  # null is how a table says that there is none
    found = ", ".join(repr(key) for key in list(row)[:10]) or "none"
    raise InputError(f"{place}: no text in this row, its keys are: {found}", f"accepted: {ACCEPTED}")


def _messages(value: object, place: str) -> tuple[Message, ...]:
    """[{"role", "content"}] or [{"from", "value"}], as messages."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{place} must be a list of messages, it is {_kind(value)}", f"accepted: {ACCEPTED}")
    messages = []
    for number, turn in enumerate(value):
        where = f"{place}[{number}]"
        if isinstance(turn, dict) and {"role", "content"} <= turn.keys():
            messages.append(Message(_string(turn["role"], where), _content(turn["content"], where)))
        elif isinstance(turn, dict) and {"from", "value"} <= turn.keys():
            sender = _string(turn["from"], where)
            messages.append(Message(_SHAREGPT_ROLES.get(sender, sender), _content(turn["value"], where)))
        else:
            raise InputError(f'{where}: a message needs "role" and "content"', f"accepted: {ACCEPTED}")
    return tuple(messages)


def _content(value: object, place: str) -> str:
    """What is said in one turn: text, parts of text, or null where a model calls a tool instead."""
    if value is None:
        return ""
    return "".join(_part(part, place) for part in value) if isinstance(value, list) else _string(value, place)


def _part(part: object, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind != "text":
        raise InputError(
            f"{place}: a part of its content is {_kind(part) if kind is None else repr(kind)[:100]}, only text is read",
            'write the content as text, or as parts {"type": "text", "text": …}',
        )
    return _string(part.get("text"), place)


def _token_ids(value: object, place: str) -> tuple[int, ...]:
    # bool is a kind of int to Python, and no token.
    if not isinstance(value, list) or not value or any(type(token) is not int or token < 0 for token in value):
        raise InputError(f"{place}: input_ids must be a list of token ids, whole numbers from 0")
    return tuple(value)


def _padding(mask: object, count: int, place: str) -> int:
    """How many of `count` ids an attention_mask leaves out, all at the end: there no token looks back at them."""
    if mask is None:
        return 0
    if not isinstance(mask, list) or len(mask) != count or any(type(each) is not int for each in mask):
        raise InputError(f"{place}: attention_mask must be a list of {count} numbers, one for each of input_ids")
    kept = sum(mask)
    if not kept or mask != [1] * kept + [0] * (count - kept):
        raise InputError(f"{place}: attention_mask must be ones and then zeros", "pad at the end")
    return count - kept


def _skipped(labels: object, ids: tuple[int, ...], padding: int, place: str) -> tuple[bool, ...] | None:
    """Which ids are not to be learned: those whose label is IGNORED, and padding."""
    if labels is None and not padding:
        return None
    labels = list(ids) if labels is None else labels
    if not isinstance(labels, list) or len(labels) != len(ids):
        raise InputError(f"{place}: labels must be a list of {len(ids)} numbers, one for each of input_ids")
    for number, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if type(label) is not int or label not in (token, IGNORED):
            raise InputError(f"{place}: labels[{number}] must be {token}, as input_ids has it, or {IGNORED}")
    last = len(ids) - padding
    return tuple(label == IGNORED or number >= last for number, label in enumerate(labels))


def _string(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{place} must be text, it is {_kind(value)}", f"accepted: {ACCEPTED}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: half of a surrogate pair at character {error.start}") from error
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return "an empty list" if value == [] else names.get(type(value), "a number")


def _read_local(reader: Iterator[Row], path: Path) -> Iterator[Row]:
    """The rows, with an error of the file system as an InputError."""
    try:
        yield from reader
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _read_txt(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise InputError(
            f"{path}: larger than {MAX_TEXT >> 20} MiB, and a .txt file is tokenized in one piece",
            'split it into rows of a .jsonl file: {"text": …}',
        )
    yield Row(str(path), text=_decode(data, path, line=1, offset=0))


def _read_jsonl(path: Path) -> Iterator[Row]:
    offset = 0
    with path.open("rb") as file:
        for line in count(1):
            data = file.readline(MAX_LINE + 1)
            if not data:
                return
            place = f"{path}, line {line}"
            if len(data) > MAX_LINE:
                raise InputError(f"{place}: longer than {MAX_LINE >> 20} MiB", "split it into several rows")
            text = _decode(data, path, line, offset)
            offset += len(data)
            if text.strip():
                yield parse_row(_json(text, place), place)


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets 10,000 deep
        raise InputError(f"{place}: not usable JSON: {error}") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"{path}: reading .parquet needs the package 'pyarrow', which is not installed",
            "pip install 'llmpare[data]'",
        ) from error
    columns = ("text", "messages", "conversations", "prompt", "completion", "input_ids", "labels", "attention_mask")
    number = count(1)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            known = [name for name in names if name in columns]
            for batch in file.iter_batches(batch_size=64, columns=known or names):
                for row in batch.to_pylist():
                    yield parse_row(row, f"{path}, row {next(number)}")
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from error


def _decode(data: bytes, path: Path, line: int, offset: int) -> str:
    """data as UTF-8; line and offset: where in the file it begins, for the message."""
    try:
        # Editors put the byte order mark at the start of a file; it is no part of the text.
        return (data.removeprefix(_BOM) if offset == 0 else data).decode()
    except UnicodeDecodeError as error:
        bad = error.start + (len(data) - len(error.object))
        line += data.count(b"\n", 0, bad)
        raise InputError(
            f"{path}: not UTF-8: byte 0x{data[bad]:02x} at offset {offset + bad}, line {line}",
            "convert it to UTF-8, for example with: iconv -f LATIN1 -t UTF-8",
        ) from error
