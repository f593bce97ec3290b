"""The predictions of a baseline, kept on disk so that every later evaluation against it runs one model instead of two.

Per scored position: the k most likely tokens with their log-probabilities, the log of the probability of all others
together, and the log-probability of the token that really follows. From these the divergence is computed over k + 1
buckets, which by the data-processing inequality is a lower bound of the divergence over all tokens, and close to it
when little probability is left in the tail.

A folder: logits-00001-….safetensors … with a run of windows each, and baseline.json, written last, with the digests of
these files, of the model and of the text.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from llmpare.compress.checkpoint.files import (
    Closing,
    is_temporary,
    read_file,
    read_json,
    shown,
    write_file,
    writing,
)
from llmpare.compress.errors import InputError, OutputError
from llmpare.compress.evaluate.fidelity import Scores, agreement, log_softmax_, nll, top
from llmpare.compress.evaluate.request import TOP

INDEX = "baseline.json"
VERSION = 1
FILE_BYTES = 2**26  # of one file, about
MAX_FILE = 2**32  # of one file, to be read


@dataclass(frozen=True)
class TopK:
    """ids int32 and logprobs [windows, positions, k]; tail and target: log-probabilities [windows, positions]."""

    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    target: Tensor

    @classmethod
    def of(cls, log_probabilities: Tensor, targets: Tensor, k: int) -> "TopK":
        """What is kept of float32 log-probabilities [windows, positions, vocabulary], which are overwritten."""
        target = nll(log_probabilities, targets).neg()
        values, ids = log_probabilities.topk(min(k, log_probabilities.shape[-1]))
        return cls(ids.int(), values, log_probabilities.scatter_(-1, ids, -math.inf).logsumexp(-1), target)

    @classmethod
    def join(cls, parts: Sequence["TopK"], dim: int) -> "TopK":
        """Parts in their order; dim: 0 along the windows, 1 along the positions."""
        return cls(*(torch.cat(column, dim) for column in zip(*(vars(part).values() for part in parts), strict=True)))

    def part(self, windows: slice, start: int, end: int, device: torch.device) -> "TopK":
        """Some of the windows and positions."""
        return TopK(*(each[windows, start:end].to(device) for each in vars(self).values()))


def score(dense: TopK, compressed: Tensor, targets: Tensor) -> Scores:
    """As fidelity.score, from what was kept of the baseline. Overwrites the logits `compressed`."""
    ids = dense.ids.long()
    likely = top(compressed)
    q = log_softmax_(compressed)
    compressed_nll = nll(q, targets)
    near = q.gather(-1, ids)
    far = q.scatter_(-1, ids, -math.inf).logsumexp(-1)
    kl = torch.linalg.vecdot(dense.logprobs.exp(), _difference(dense.logprobs, near))
    kl += dense.tail.exp() * _difference(dense.tail, far)
    return Scores(dense.target.neg(), compressed_nll, kl, *agreement(ids[..., :TOP], likely))


def _difference(p: Tensor, q: Tensor) -> Tensor:
    """log p − log q, and 0 where p is 0: such a term has no weight."""
    return (p - q).masked_fill(p == -math.inf, 0.0)


@dataclass(frozen=True)
class Identity:
    """What saved predictions belong to: a model, by its weights, and the token ids of a text."""

    model: str
    architecture: str
    scheme: str
    weight_bytes: int
    parameters: int
    weights_sha256: str
    vocabulary: int
    ids_sha256: str
    dtype: str


class Saver(Closing):
    """Writes predictions window by window. Earlier ones in the folder count until `finish`, and are gone after it."""

    def __init__(self, folder: Path, k: int) -> None:
        """Raises OutputError for a folder that holds anything but saved predictions."""
        self.k = k
        self._folder = folder
        self._waiting: list[TopK] = []
        self._bytes = 0
        self._files: list[dict[str, Any]] = []
        with writing(folder):
            os.makedirs(folder, exist_ok=True)
            self._stays = _held(folder)

    def add(self, part: TopK) -> None:
        """The next windows, all their positions."""
        self._waiting.append(TopK(*(each.cpu() for each in vars(part).values())))
        self._bytes += sum(each.nbytes for each in vars(part).values())
        if self._bytes >= FILE_BYTES:
            self._write()

    def finish(self, identity: Identity) -> None:
        """Writes what is left, and then that everything is there."""
        self._write()
        index = {"version": VERSION, "top_k": self.k, **asdict(identity), "files": self._files}
        write_file(self._folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())
        self._stays = {INDEX, *(entry["name"] for entry in self._files)}

    def close(self) -> None:
        """Removes what is no part of finished predictions, and the folder if nothing is left."""
        with writing(self._folder):
            for name in _held(self._folder) - self._stays:
                os.unlink(self._folder / name)
        with suppress(OSError):  # which stays if predictions are in it
            os.rmdir(self._folder)

    def _write(self) -> None:
        if not self._waiting:
            return
        whole = TopK.join(self._waiting, 0)
        data = save({name: tensor.contiguous() for name, tensor in vars(whole).items()})
        digest = hashlib.sha256(data).hexdigest()
        name = f"logits-{len(self._files) + 1:05d}-{digest[:16]}.safetensors"  # never that of others that still count
        write_file(self._folder / name, data)
        entry = {"name": name, "windows": len(whole.tail), "sha256": digest}
        self._files.append(entry)
        self._waiting, self._bytes = [], 0


def _held(folder: Path) -> set[str]:
    """The names of saved predictions, finished or not. Raises OutputError if the folder holds anything else."""
    names = set(os.listdir(folder))
    for name in sorted(names):
        kept = name[1:].removesuffix(".tmp") if is_temporary(name) else name
        if kept != INDEX and not (kept.startswith("logits-") and kept.endswith(".safetensors")):
            raise OutputError(f"{shown(folder)} is no saved baseline: it holds {shown(name)}", "name another folder")
    return names


class Saved:
    """Saved predictions, checked and ready to be read in the order of their windows."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError for a folder that does not hold what its index says."""
        self.folder = folder
        index = read_json(folder / INDEX, limit=2**24)
        try:
            if index["version"] != VERSION:
                raise InputError(f"{shown(folder / INDEX)} has version {index['version']!r}, expected {VERSION}")
            self.identity = Identity(**{name: index[name] for name in Identity.__dataclass_fields__})
            self.top_k: int = index["top_k"]
            self._files = [(entry["name"], int(entry["windows"]), entry["sha256"]) for entry in index["files"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{shown(folder / INDEX)} is not a baseline's index: {error!r}", _AGAIN) from error
        self._held: tuple[int, int, TopK] | None = None

    @property
    def windows(self) -> int:
        """How many windows of text there are."""
        return sum(count for _, count, _ in self._files)

    def require(self, ids_sha256: str) -> None:
        """Raises InputError unless the predictions are for the text with these token ids."""
        if self.identity.ids_sha256 != ids_sha256:
            raise InputError(
                f"{shown(self.folder)} was saved for another text: its token ids have sha256 "
                f"{self.identity.ids_sha256}, those to be measured {ids_sha256}",
                "give the same --text, --nsamples and --seqlen as when it was saved, or save it again",
            )

    def require_model(self, name: str, weights_sha256: str) -> None:
        """Raises InputError unless the predictions are those of the model with these weights."""
        if self.identity.weights_sha256 != weights_sha256:
            raise InputError(
                f"{shown(self.folder)} was saved from other weights: sha256 {self.identity.weights_sha256}, "
                f"those of {shown(name)} now have {weights_sha256}",
                _AGAIN,
            )

    def part(self, windows: range, start: int, end: int, device: torch.device) -> TopK:
        """The predictions for windows in a row, positions start … end − 1."""
        pieces = []
        first = 0
        for number, (_, count, _) in enumerate(self._files):
            low, high = max(windows.start, first), min(windows.stop, first + count)
            if low < high:
                pieces.append(self._file(number, first).part(slice(low - first, high - first), start, end, device))
            first += count
        return TopK.join(pieces, 0)

    def _file(self, number: int, first: int) -> TopK:
        if self._held is None or self._held[:2] != (number, first):
            name, count, digest = self._files[number]
            path = self.folder / name
            data = bytes(read_file(path, limit=MAX_FILE))
            found = hashlib.sha256(data).hexdigest()
            if found != digest:
                raise InputError(f"{shown(path)} is damaged: sha256 {found}, expected {digest}", _AGAIN)
            tensors: Mapping[str, Tensor] = load(data)
            self._held = number, first, TopK(**tensors)
            if len(self._held[2].tail) != count:
                raise InputError(f"{shown(path)} does not hold {count} windows", _AGAIN)
        return self._held[2]


_AGAIN = "save the baseline again with --save-baseline"


def is_saved(folder: Path) -> bool:
    """Whether a folder holds saved predictions rather than a model."""
    return (folder / INDEX).is_file()
