"""The record of what a run has finished, kept so that the next one can go on from there.

One JSON line per event, each with its own checksum: what a power cut or a bad disk leaves half written is dropped,
and the unit of work it spoke of is done again.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmpare.compress.checkpoint.files import Closing, clipped, opened, read_at, shown, write_at, write_file, writing
from llmpare.compress.errors import InputError

VERSION = 1
LISTED = 8  # differing fields that a message lists


class Journal(Closing):
    """The journal at `path`: taken up if there is one, else begun with a first line that holds `spec`.

    spec: what decides the result, as JSON values. done: the record of every finished unit, in the order of finishing.
    dropped: a message for each line that was damaged. Raises InputError when the journal was begun with another spec,
    OutputError when the file system does. For one thread.
    """

    def __init__(self, path: Path, spec: Mapping[str, Any]) -> None:
        self.done: dict[str, dict[str, Any]] = {}
        self.dropped: list[str] = []
        self._path = path
        kept = self._take_up(spec) if os.path.lexists(path) else []
        if not kept or self.dropped:
            # What is torn must go before anything is appended to it.
            kept = kept or [_line({"journal": VERSION, "spec": dict(spec)})]
            write_file(path, b"".join(kept))
        self._end = sum(map(len, kept))
        with writing(path):
            self._fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)

    def _take_up(self, spec: Mapping[str, Any]) -> list[bytes]:
        """Replays the lines of an existing journal. Returns the sound ones; none if the first is not."""
        with opened(self._path) as fd:
            lines = read_at(fd, 0, os.fstat(fd).st_size, self._path).splitlines(keepends=True)
        first = _body(lines[0]) if lines else None
        if first is None:
            self.dropped.append(f"{shown(self._path)}: its first line failed its checksum, starting over")
            return []
        require_same({"journal": first["journal"], **first["spec"]}, {"journal": VERSION, **spec}, self._path.parent)
        kept = [bytes(lines[0])]
        for number, line in enumerate(lines[1:], start=2):
            body = _body(line)
            if body is None:
                self.dropped.append(f"{shown(self._path)}:{number}: failed its checksum, redoing what it recorded")
                continue
            kept.append(bytes(line))
            if "forget" in body:
                self.done.pop(body["forget"], None)
            else:
                self.done[body["unit"]] = body["record"]
        return kept

    def append(self, unit: str, record: dict[str, Any]) -> None:
        """Records that `unit` is finished. Durable when it returns."""
        self._write({"unit": unit, "record": record})
        self.done[unit] = canonical(record)

    def forget(self, unit: str) -> None:
        """Takes back that `unit` is finished. Durable when it returns."""
        self._write({"forget": unit})
        del self.done[unit]

    def _write(self, body: dict[str, Any]) -> None:
        line = _line(body)
        with writing(self._path):
            # At the known end, not appended: a line that failed half way is overwritten.
            write_at(self._fd, self._end, line)
            os.fsync(self._fd)
        self._end += len(line)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)


def require_same(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    """Raises InputError naming the fields in which the spec of the partial result in `folder` is not the new one."""
    differing = differences(old, new)
    if differing:
        raise InputError(
            f"{shown(folder)} was begun with other settings: {differing}", "--restart discards it and begins afresh"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first fields in which a spec that was read and one that is asked for differ; empty if they are the same."""
    differing = _differences(old, canonical(dict(new)))
    more = [f"and {len(differing) - LISTED} more"] if len(differing) > LISTED else []
    return "; ".join([*differing[:LISTED], *more])


def _differences(old: Any, new: Any, field: str = "") -> list[str]:
    """The fields in which two JSON values differ, as 'scheme.bits: 4, now 3'."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{clipped(field)}: {_json(old)}, now {_json(new)}"]
    found = []
    for key in sorted({*old, *new}):
        found += _differences(old.get(key), new.get(key), f"{field}.{key}" if field else key)
    return found


def canonical(value: Any) -> Any:
    """A value as it comes back from JSON: tuples become lists, keys strings."""
    return json.loads(json.dumps(value))


def _json(value: Any) -> str:
    return clipped(json.dumps(value))


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _line(body: dict[str, Any]) -> bytes:
    body = canonical(body)
    return (json.dumps({"sha256": _digest(body), "body": body}) + "\n").encode()


def _body(line: bytes | bytearray) -> dict[str, Any] | None:
    """What a line says, or None if it is torn or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or event.get("sha256") != _digest(event.get("body")):
        return None
    body: dict[str, Any] = event["body"]
    return body
