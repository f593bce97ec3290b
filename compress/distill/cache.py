"""A teacher's predictions on disk: made once, streamed block by block, learned from without the teacher.

A folder: predictions-00000.safetensors … with a run of windows each (see topk), and manifest.json, whose `spec` says
what they belong to: the teacher, by its weights, and the text, by its token ids. It is made like every other output:
in DIR.partial, with a journal line per file, so that a run that is cut short goes on where it was; each file is one
pass of its windows through the teacher, of which one block is in memory at a time.
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from safetensors.torch import save
from torch import Tensor

from llmpare.compress import devices
from llmpare.compress.batches import logit_tokens
from llmpare.compress.checkpoint import publish
from llmpare.compress.checkpoint.files import clipped, sha256_file, shown, write_file
from llmpare.compress.checkpoint.journal import Journal, canonical
from llmpare.compress.checkpoint.manifest import read_manifest
from llmpare.compress.distill import topk
from llmpare.compress.errors import InputError, MemoryLimitError
from llmpare.compress.evaluate.models import digest
from llmpare.compress.evaluate.stream import Setup, chunks, read
from llmpare.compress.formats.decoded import DenseSource, open_dense
from llmpare.compress.model.layout import find
from llmpare.compress.version import VERSION

TOP_K = 64
FILE_TOKENS = 2**18  # of one file, at most: 72 MB at 64 per token
HIDDEN_BYTES = 2**31  # of the hidden states that are on their way through the teacher together, at most


@dataclass(frozen=True)
class Identity:
    """What cached predictions belong to. ids_sha256: of the ids as little-endian int32, window by window.

    vocabulary: the ids that the probabilities are over: 0 … vocabulary − 1. dtype: the teacher's, as it ran.
    windows_per_file: windows in every file but the last.
    """

    weights_sha256: str
    ids_sha256: str
    windows: int
    tokens: int
    top_k: int
    vocabulary: int
    dtype: str
    windows_per_file: int

    @property
    def files(self) -> int:
        """How many files there are."""
        return -(-self.windows // self.windows_per_file)

    @property
    def bytes_per_token(self) -> int:
        """On disk."""
        return topk.token_bytes(self.top_k, self.vocabulary)


def build(
    teacher: Path,
    ids: Tensor,
    out: Path,
    setup: Setup,
    *,
    top_k: int = TOP_K,
    vocabulary: int | None = None,
    file_tokens: int = FILE_TOKENS,
    force: bool = False,
    restart: bool = False,
) -> Identity:
    """Makes the cache of a teacher for windows of text `ids` [windows, tokens] in the folder `out`.

    vocabulary: the ids that student and teacher share, all of the teacher's if not given. A finished cache of the same
    teacher and text is left as it is; an unfinished one is taken up. Raises InputError for predictions that are no
    numbers and, naming the difference, for an unfinished cache of something else; OutputError for a folder that holds
    something else.
    """
    with open_dense(teacher) as source:
        identity = _identity(source, ids, setup, top_k, vocabulary, file_tokens)
        spec = {"cache": asdict(identity)}
        if publish.finished(out, spec):
            publish.settle(out)
            return identity
        _refuse_other(out, identity, force=force)
        with publish.Workspace(out, force=force, restart=restart) as workspace:
            for message in workspace.messages:
                setup.progress.warn(message)
            manifest = workspace.pending(spec)
            if manifest is None:
                with Journal(workspace.journal, spec) as journal:
                    _fill(source, ids, workspace.partial, identity, journal, setup)
                manifest = publish.build_manifest(
                    workspace.partial,
                    spec=spec,
                    source={"teacher": clipped(teacher)},
                    versions={
                        "llmpare": VERSION,
                        "torch": torch.__version__,
                        "transformers": transformers.__version__,
                    },
                    tensors={},
                )
            workspace.publish(manifest)
    return identity


def ids_digest(ids: Tensor) -> str:
    """sha256 of token ids [windows, tokens] as little-endian int32."""
    found = hashlib.sha256()
    for part in ids.split(4096):
        found.update(part.cpu().numpy().astype("<i4").tobytes())
    return found.hexdigest()


def _identity(
    source: DenseSource, ids: Tensor, setup: Setup, top_k: int, vocabulary: int | None, file_tokens: int
) -> Identity:
    config = {**source.config, **(source.config.get("text_config") or {})}
    rows, width = find(config, "vocab_size"), find(config, "hidden_size", "n_embd")
    windows, tokens = ids.shape
    at_once = min(file_tokens, HIDDEN_BYTES // (width * setup.dtype.itemsize))
    return Identity(
        weights_sha256=digest(source),
        ids_sha256=ids_digest(ids),
        windows=windows,
        tokens=tokens,
        top_k=top_k,
        vocabulary=min(rows, vocabulary or rows),
        dtype=str(setup.dtype).removeprefix("torch."),
        windows_per_file=max(1, at_once // tokens),
    )


def _refuse_other(out: Path, wanted: Identity, *, force: bool) -> None:
    """A finished cache of something else is not overwritten unasked; the message says in what it differs."""
    if force or not (out / publish.MANIFEST).exists():
        return
    there = read_identity(out)
    require(out, there, wanted, hint="name another folder, or remove this one")


def _fill(source: DenseSource, ids: Tensor, folder: Path, identity: Identity, journal: Journal, setup: Setup) -> None:
    """Writes every file that is not there yet, or not as it was written."""
    for message in journal.dropped:
        setup.progress.warn(message)
    for number in range(identity.files):
        name = file_name(number)
        path = folder / name
        done = journal.done.get(name)
        if done is not None:
            if path.is_file() and sha256_file(path) == done["sha256"]:
                continue
            setup.progress.warn(f"{name} failed its checksum, redoing")
            journal.forget(name)
        first = number * identity.windows_per_file
        part = ids[first : first + identity.windows_per_file]
        setup.progress.phase(f"caching the teacher, windows {first}…{first + len(part) - 1} of {identity.windows}")
        data = save(_fitting(source, part, identity, setup))
        write_file(path, data)
        journal.append(name, {"sha256": hashlib.sha256(data).hexdigest()})


def file_name(number: int) -> str:
    """Of the file with that number."""
    return f"predictions-{number:05d}.safetensors"


def _fitting(source: DenseSource, ids: Tensor, identity: Identity, setup: Setup) -> dict[str, Tensor]:
    """The tensors of a file; with half the batch if the device runs out of memory."""
    return devices.fitting(
        lambda batch: _predictions(source, ids, identity, replace(setup, batch=batch)),
        setup.batch,
        setup.progress,
        lambda batch, error: MemoryLimitError(
            f"{source.folder}: the device ran out of memory with {batch} windows at a time: {error}",
            "--seqlen makes it less, --device cpu does without the device",
        ),
    )


def _predictions(source: DenseSource, ids: Tensor, identity: Identity, setup: Setup) -> dict[str, Tensor]:
    """One pass of windows through the teacher: [windows, tokens − 1, …] of every tensor that topk.encode makes."""
    reader, fallback = read(source, ids, setup)
    if fallback is not None:
        setup.progress.warn(f"the teacher is {fallback['action']}: {fallback['cause']}")
    if reader.broken is not None:
        raise InputError(
            f"{source.folder}: {reader.broken} are NaN or infinite in {identity.dtype}",
            "run the teacher in bfloat16 or float32",
        )
    rows = []
    with setup.clock.phase("score"):
        for windows, ranges in chunks(len(ids), identity.tokens - 1, logit_tokens(setup.device.type)):
            parts = []
            for start, end in ranges:
                logits = reader.logits(windows, start, end)[..., : identity.vocabulary].contiguous()
                parts.append(topk.encode(topk.keep(logits, identity.top_k), identity.vocabulary))
            rows.append(_joined(parts, 1))
    return _joined(rows, 0)


def _joined(parts: list[dict[str, Tensor]], dim: int) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts], dim) for name in parts[0]}


def read_identity(folder: Path) -> Identity:
    """Raises InputError for a folder that is no finished cache."""
    if not (folder / publish.MANIFEST).exists():
        hint = "make it with --teacher and --cache-teacher"
        if folder.with_name(f"{folder.name}.partial").exists():
            hint = "it is unfinished: the command that began it goes on with it"
        raise InputError(f"{shown(folder)} is no cache of a teacher: it has no {publish.MANIFEST}", hint)
    spec = read_manifest(folder)["spec"].get("cache")
    fields = Identity.__dataclass_fields__
    if not isinstance(spec, dict) or spec.keys() != fields.keys():
        raise InputError(f"{shown(folder)} is no cache of a teacher of this version", "name another folder")
    return Identity(**spec)


def require(folder: Path, there: Identity, wanted: Identity, hint: str) -> None:
    """Raises InputError naming the first thing in which a cache is not the one that is wanted."""
    words = {
        "weights_sha256": "of another teacher: its weights have sha256 {}, those of the teacher given {}",
        "ids_sha256": "for another text: its token ids have sha256 {}, those of this run {}",
    }
    for name, value in canonical(asdict(there)).items():
        now = asdict(wanted)[name]
        if value != now:
            text = words.get(name, f"made with {name} {{}}, this run has {{}}").format(value, now)
            raise InputError(f"the cache in {shown(folder)} is {text}", hint)
