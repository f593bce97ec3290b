"""The text that models are measured on: windows by the field's protocol, and what every token of it is.

All texts are joined with blank lines, the tokenizer's bos goes in front, and the stream is cut into consecutive
windows, of which the first are taken; the rest of the stream is dropped. Files are read to their end unless a number of
windows is named; of what comes from the hub, which may have no end in sight, enough is read. In every window each token
but the first is scored. Rows of token ids are taken as they are, one window a row.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpare import calibration_data
from llmpare.calibration_data import Row
from llmpare.compress import calibration
from llmpare.compress.calibration import DEFAULT_SEQLEN, ENOUGH_TEXT
from llmpare.compress.evaluate.request import TextRequest
from llmpare.compress.request import TextSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ALL = 2**31  # more windows than any text has


@dataclass(frozen=True, eq=False)
class Text:
    """ids: int64 [windows, seqlen]. kind: for every token an index into `kinds`, the sorts of text there are.

    scored_bytes: UTF-8 bytes of the text that the scored tokens stand for. source: where all this came from, as in
    calibration.Windows, and ids_sha256, of the ids as little-endian int64.
    """

    ids: "NDArray[np.int64]"
    kind: "NDArray[np.int16]"
    kinds: tuple[str, ...]
    scored_bytes: int
    source: dict[str, Any]


def read(request: TextRequest, tokenizer: Any, *, vocab_size: int, max_length: int) -> Text:
    """The text that `request` asks for. vocab_size: ids are below it. max_length: tokens the model allows.

    Raises UsageError for a data set or a length there cannot be, InputError for text that is unusable or too short.
    """
    spec = TextSpec(", ".join(request.datasets), request.nsamples, request.seqlen)
    given, rows = calibration.opened(_rows(request.datasets), spec, max_length)
    if given:
        ids, _, source = calibration.given_windows(rows, spec, ALL, vocab_size, max_length)
        text = _from_ids(ids, source, tokenizer)
    else:
        text = _from_text(rows, request, spec.seqlen or min(DEFAULT_SEQLEN, max_length), tokenizer, vocab_size)
    text.source.update(
        calibration.described(spec.dataset, "evaluation", text.ids, tokenizer),
        short=len(text.ids) < (request.nsamples or 1),
        ids_sha256=calibration.ids_sha256(text.ids),
    )
    return text


def _rows(datasets: Sequence[str]) -> Iterator[Row]:
    """The rows of all data sets; of several, each is a kind of its own unless its rows name theirs."""
    for dataset in datasets:
        for row in calibration_data.rows(dataset, "evaluation"):
            named = row.kind or (Path(dataset).name if len(datasets) > 1 else None)
            yield replace(row, kind=named)


def _from_ids(ids: "NDArray[np.int64]", source: dict[str, Any], tokenizer: Any) -> Text:
    import numpy as np

    return Text(ids, np.zeros(ids.shape, dtype=np.int16), ("",), _decoded_bytes(ids, tokenizer), source)


def _from_text(rows: Iterator[Row], request: TextRequest, seqlen: int, tokenizer: Any, vocab_size: int) -> Text:
    import numpy as np

    name, nsamples = ", ".join(request.datasets), request.nsamples
    bounded = nsamples is not None or not all(map(os.path.isfile, request.datasets))
    bos = tokenizer.bos_token_id
    front = [] if bos is None else [bos]
    ids, ends, kinds = [np.array(front, np.int64)], [np.zeros(len(front), np.int64)], [np.zeros(len(front), np.int16)]
    names: list[str] = []
    digest = hashlib.sha256()
    size = characters = tokens = count = 0
    for row in rows:
        content = ("\n\n" if count else "") + _content(row)
        new, places = _encode(content, tokenizer)
        calibration.check_vocabulary(int(new.max(initial=0)), vocab_size, f"{name}: the tokenizer")
        if (row.kind or "") not in names:
            names.append(row.kind or "")
        ids.append(new)
        ends.append(size + places)
        kinds.append(np.full(len(new), names.index(row.kind or ""), np.int16))
        digest.update(content.encode())
        size += len(content.encode())
        characters += len(content)
        tokens += len(new)
        count += 1
        if bounded and characters >= ENOUGH_TEXT and tokens >= (nsamples or 0) * seqlen:
            break
    stream = np.concatenate(ids)
    available = len(stream) // seqlen
    if available < (nsamples or 1):
        raise calibration.too_short(name, len(stream), nsamples or 1, seqlen)
    shape = nsamples or available, seqlen
    used = shape[0] * seqlen
    windows, stops = (np.concatenate(each)[:used].reshape(shape) for each in (ids, ends))
    whole = next(rows, None) is None
    return Text(
        windows,
        np.concatenate(kinds)[:used].reshape(shape),
        tuple(names),
        int((stops[:, -1] - stops[:, 0]).sum()) if tokenizer.is_fast else _decoded_bytes(windows, tokenizer),
        {"sha256": digest.hexdigest(), "rows": count, "tokens_available": len(stream), "bos": bos, "whole": whole},
    )


def _content(row: Row) -> str:
    calibration.require_text(row)
    return calibration.paragraphs(row) if row.text is None else row.text


def _encode(content: str, tokenizer: Any) -> tuple["NDArray[np.int64]", "NDArray[np.int64]"]:
    """The ids of a text and the UTF-8 bytes before the end of each; these are 0 if the tokenizer does not tell."""
    import numpy as np

    encoded = tokenizer(
        content,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    if not tokenizer.is_fast:
        return ids, np.zeros_like(ids)
    points = np.frombuffer(content.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int8) + (points >= 0x800) + (points >= 0x10000)
    before = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])
    stops = np.fromiter((stop for _, stop in encoded["offset_mapping"]), dtype=np.int64, count=len(ids))
    return ids, before[np.maximum.accumulate(stops)] if len(ids) else ids


def _decoded_bytes(ids: "NDArray[np.int64]", tokenizer: Any) -> int:
    """Bytes of the scored tokens as the tokenizer writes them out, for those that cannot say where a token stands."""
    total = 0
    for window in ids.tolist():
        whole, unscored = (tokenizer.decode(part, skip_special_tokens=True) for part in (window, window[:1]))
        total += len(whole.encode()) - len(unscored.encode())
    return total
