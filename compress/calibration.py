"""Text → windows of exactly `seqlen` token ids, and what the report says about where they came from.

Texts are joined in their order with blank lines into one stream, tokenized without special tokens, the
tokenizer's bos in front, and cut into consecutive windows; the rest is dropped. Nothing is random. Rows that
already are token ids are taken as they are, one window a row, so that tools can share exact windows.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from llmpare import calibration_data
from llmpare.calibration_data import Row
from llmpare.compress import chat
from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.request import TextSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEFAULT_WINDOWS = {"calibration": 128, "evaluation": 32}
DEFAULT_SEQLEN = 2048
ENOUGH_TEXT = 8 * 2**20  # characters; reading goes on past the tokens asked for, so that windows can spread
BATCH_TEXT = 2**18  # characters tokenized at a time: bounds the memory, and keeps all cores busy
FIRST_LINE = 120  # characters shown of the first window
OVERLAP_RUN = 32  # tokens in a row that two texts share only when one was copied

BATCH_ROWS = 256


@dataclass(frozen=True, eq=False)
class Windows:
    """ids: int64 [windows, seqlen]. skipped: the same shape, ids that are not to be learned; None: all are.

    source: where they came from, plain JSON values for the report: dataset, part, sha256 (of the UTF-8 text that was
    tokenized; of the little-endian int64 ids, and of what is skipped, when the rows were ids), rows, tokens_available,
    windows, seqlen, bos (the id put in front, or None), first_line (of the first window, decoded), short (fewer windows
    than the default number), whole (the data set was read to its end).
    """

    ids: "NDArray[np.int64]"
    source: dict[str, Any]
    skipped: "NDArray[np.bool_] | None" = None


def load(
    spec: TextSpec,
    tokenizer: Any,
    *,
    vocab_size: int,
    part: str,
    max_length: int,
    most: int | None = None,
    learning: bool = False,
) -> Windows:
    """The windows that `spec` asks for.

    tokenizer: as from tokenizer.load_tokenizer. vocab_size: rows of the model's embedding; every id is below it. part:
    'calibration' or 'evaluation', which of a data set's two halves. max_length: tokens the model allows at most. most:
    windows to take if spec does not say; None: the part's default. learning: ids to skip, and padding, are of use.
    Raises UsageError for a data set or a length there cannot be, InputError for text that is unusable or too short.
    """
    if spec.nsamples is not None and spec.nsamples < 1:
        raise UsageError(f"--nsamples {spec.nsamples}: at least one window is needed")
    given, rows = opened(calibration_data.rows(spec.dataset, part), spec, max_length)
    skipped = None
    if given:
        ids, skipped, source = given_windows(
            rows, spec, most or DEFAULT_WINDOWS[part], vocab_size, max_length, learning=learning
        )
    else:
        ids, source = _text_windows(rows, spec, most or DEFAULT_WINDOWS[part], tokenizer, vocab_size, max_length)
    return Windows(ids, {**described(spec.dataset, part, ids, tokenizer), **source}, skipped)


def ids_sha256(ids: "NDArray[np.int64]") -> str:
    """The sha256 of ids as little-endian int64: of the same text, another tokenizer makes others."""
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()


def opened(rows: Iterator[Row], spec: TextSpec, max_length: int) -> tuple[bool, Iterator[Row]]:
    """Whether the first row is one of ids, and all rows. Raises UsageError for a length there cannot be, InputError for
    a data set without any text.
    """
    if spec.seqlen is not None and not 2 <= spec.seqlen <= max_length:
        raise UsageError(f"--seqlen {spec.seqlen}: this model takes 2 to {max_length} tokens")
    first = next(rows, None)
    if first is None:
        wanted = (spec.nsamples or 1) * (spec.seqlen or min(DEFAULT_SEQLEN, max_length))
        raise InputError(f"{spec.dataset}: no text, 0 tokens, and {wanted} are needed", "give it some text")
    return first.input_ids is not None, chain([first], rows)


def described(dataset: str, part: str, ids: "NDArray[np.int64]", tokenizer: Any) -> dict[str, Any]:
    """What the report's source says of windows wherever they are from."""
    text = tokenizer.decode(ids[0].tolist(), skip_special_tokens=True)
    first_line = next((line for line in text.splitlines() if line.strip()), "")[:FIRST_LINE]
    shape = {"windows": ids.shape[0], "seqlen": ids.shape[1]}
    return {"dataset": dataset, "part": part, **shape, "first_line": first_line}


def overlap(calibration: Windows, evaluation: Windows) -> float:
    """Share (0…1) of the evaluation's tokens that lie in a run of OVERLAP_RUN tokens calibration has too."""
    import numpy as np

    if min(calibration.ids.shape[1], evaluation.ids.shape[1]) < OVERLAP_RUN:
        return 0.0
    copied = np.isin(_run_hashes(evaluation.ids), _run_hashes(calibration.ids))  # [windows, runs]
    inside = np.zeros(evaluation.ids.shape, dtype=bool)
    for position in range(OVERLAP_RUN):
        inside[:, position : position + copied.shape[1]] |= copied
    return float(inside.mean())


def _run_hashes(ids: "NDArray[np.int64]") -> "NDArray[np.uint64]":
    """Polynomial hash modulo 2^64 of every run of OVERLAP_RUN tokens: [windows, seqlen] → [windows, runs]."""
    import numpy as np

    runs = ids.shape[1] - OVERLAP_RUN + 1
    hashes = np.zeros((ids.shape[0], runs), dtype=np.uint64)
    for position in range(OVERLAP_RUN):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += ids[:, position : position + runs].astype(np.uint64)
    return hashes


def given_windows(
    rows: Iterable[Row], spec: TextSpec, default: int, vocab_size: int, max_length: int, *, learning: bool = False
) -> tuple["NDArray[np.int64]", "NDArray[np.bool_] | None", dict[str, Any]]:
    """The first rows of ids, cut to one length; which ids to skip; and what the report's source says about them."""
    import numpy as np

    wanted = spec.nsamples or default
    kept: list[Row] = []
    lengths: dict[int, str] = {}  # length → place of the first row of that length
    count = tokens = 0
    for row in rows:
        if row.input_ids is None:
            raise InputError(f"{row.place}: text after rows of input_ids", "put them into files of their own")
        if row.padding and not learning:
            raise InputError(
                f"{row.place}: {row.padding} of its ids are padding", "leave it out: it would count as text"
            )
        check_vocabulary(max(row.input_ids), vocab_size, row.place)
        if len(kept) < wanted:
            kept.append(row)
        lengths.setdefault(len(row.input_ids), row.place)
        count += 1
        tokens += len(row.input_ids)
    seqlen = _common_length(lengths, spec.seqlen, max_length)
    if count < (spec.nsamples or 1):
        raise too_short(spec.dataset, tokens, wanted, seqlen)
    ids = np.array([(row.input_ids or ())[:seqlen] for row in kept], dtype=np.int64)
    digest = hashlib.sha256(ids.astype("<i8").tobytes())
    skipped = _skipped(kept, seqlen) if learning else None
    if skipped is not None:
        digest.update(skipped.tobytes())
    source = {"sha256": digest.hexdigest(), "rows": count, "bos": None, "tokens_available": tokens}
    return ids, skipped, {**source, "short": count < wanted, "whole": True}


def _skipped(rows: Sequence[Row], seqlen: int) -> "NDArray[np.bool_] | None":
    """Which ids of which row are not to be learned, [rows, seqlen]; None if all are."""
    import numpy as np

    if all(row.skipped is None for row in rows):
        return None
    skipped = np.array([(row.skipped or (False,) * seqlen)[:seqlen] for row in rows], dtype=bool)
    idle = np.flatnonzero(skipped[:, 1:].all(axis=1))  # nothing comes before the first id that could predict it
    if len(idle):
        place = rows[int(idle[0])].place
        raise InputError(f"{place}: none of its first {seqlen} ids is to be learned", "leave out such rows")
    return skipped


def _common_length(lengths: dict[int, str], seqlen: int | None, max_length: int) -> int:
    """The length all rows are cut to; rows that are all equally long need not be as long as seqlen."""
    shortest, longest = min(lengths), max(lengths)
    if shortest < longest and (seqlen is None or shortest < seqlen):
        raise InputError(
            f"{lengths[shortest]}: {shortest} tokens, where {lengths[longest]} has {longest}",
            f"--seqlen {shortest} cuts all rows to that length",
        )
    common = shortest if seqlen is None else min(shortest, seqlen)
    if not 2 <= common <= max_length:
        raise InputError(
            f"{lengths[shortest]}: a row of {common} tokens, and this model takes 2 to {max_length}",
            "--seqlen cuts longer rows",
        )
    return common


def _text_windows(
    rows: Iterable[Row], spec: TextSpec, default: int, tokenizer: Any, vocab_size: int, max_length: int
) -> tuple["NDArray[np.int64]", dict[str, Any]]:
    """Windows spread evenly over the text, and what the report's source says about it."""
    import numpy as np

    seqlen = spec.seqlen or min(DEFAULT_SEQLEN, max_length)
    wanted = spec.nsamples or default
    texts = _texts(rows, tokenizer if spec.chat_template else None, spec.dataset)
    stream, source = _tokenize(texts, tokenizer, vocab_size, wanted * seqlen, spec.dataset)
    available = len(stream) // seqlen
    if available < (spec.nsamples or 1):
        raise too_short(spec.dataset, len(stream), spec.nsamples or 1, seqlen)
    count = min(wanted, available)
    chosen = np.arange(count) * available // count
    ids = stream[: available * seqlen].reshape(available, seqlen)[chosen].astype(np.int64)
    return ids, {**source, "tokens_available": len(stream), "short": count < wanted}


def _tokenize(
    texts: Iterator[str], tokenizer: Any, vocab_size: int, needed: int, dataset: str
) -> tuple["NDArray[np.int32]", dict[str, Any]]:
    """One stream of at least `needed` ids, if there are that many, with its sha256, rows, bos and whole."""
    import numpy as np

    digest = hashlib.sha256()
    bos = tokenizer.bos_token_id
    pieces = [np.array([] if bos is None else [bos], dtype=np.int32)]
    rows = characters = tokens = 0
    while batch := _take(texts, BATCH_TEXT):
        # The blank line goes before a text: how a word is split depends on what precedes it.
        batch = ["\n\n" + text if rows + index else text for index, text in enumerate(batch)]
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids = np.fromiter(chain.from_iterable(encoded["input_ids"]), dtype=np.int64)
        check_vocabulary(int(ids.max(initial=0)), vocab_size, f"{dataset}: the tokenizer")
        if rows == 0 and ids[:1].tolist() == [bos]:  # a chat template has put it there already
            pieces.clear()
        pieces.append(ids.astype(np.int32))
        digest.update("".join(batch).encode())
        rows += len(batch)
        characters += sum(map(len, batch))
        tokens += len(ids)
        if characters >= ENOUGH_TEXT and tokens >= needed:
            break
    whole = next(texts, None) is None
    return np.concatenate(pieces), {"sha256": digest.hexdigest(), "rows": rows, "bos": bos, "whole": whole}


def _take(texts: Iterator[str], characters: int) -> list[str]:
    """The next texts, until they have that many characters together."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        characters -= len(text)
        if characters <= 0:
            break
    return batch


def _texts(rows: Iterable[Row], template_of: Any, dataset: str) -> Iterator[str]:
    """The text of every row; dialogues as 'role: text' paragraphs, or through the template of a tokenizer."""
    rows = iter(rows)
    dialogues = False
    while batch := list(islice(rows, BATCH_ROWS)):
        spoken = [row for row in batch if row.messages is not None]
        dialogues = dialogues or bool(spoken)
        rendered = iter(chat.render(spoken, template_of) if template_of and spoken else map(paragraphs, spoken))
        for row in batch:
            require_text(row)
            yield next(rendered) if row.text is None else row.text
    if template_of and not dialogues:
        raise InputError(f"{dataset}: no row has roles for the chat template", "leave out --chat-template")


def require_text(row: Row) -> None:
    if row.input_ids is not None:
        raise InputError(f"{row.place}: input_ids after rows of text", "put them into separate files")


def paragraphs(row: Row) -> str:
    return "\n\n".join(f"{message.role}: {message.content}" for message in row.messages or ())


def check_vocabulary(largest: int, vocab_size: int, place: str) -> None:
    if largest >= vocab_size:
        raise InputError(
            f"{place}: token id {largest} is outside the model's vocabulary of {vocab_size}",
            "use the tokenizer that belongs to the model",
        )


def too_short(dataset: str, tokens: int, windows: int, seqlen: int) -> InputError:
    return InputError(
        f"{dataset}: {tokens} tokens, and {windows} windows of {seqlen} need {windows * seqlen}",
        "give more text, or lower --nsamples or --seqlen",
    )
