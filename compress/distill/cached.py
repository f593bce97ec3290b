"""A teacher whose predictions lie on disk (see cache): nothing of it is in memory but what a batch needs."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import safetensors
import torch
from torch import Tensor

from llmpare.compress.checkpoint.files import sha256_file, shown
from llmpare.compress.checkpoint.manifest import read_manifest
from llmpare.compress.distill import topk
from llmpare.compress.distill.cache import Identity, file_name, ids_digest, read_identity, require
from llmpare.compress.distill.losses import Head, Objective, chunked
from llmpare.compress.distill.targets import Batch
from llmpare.compress.distill.topk import Kept
from llmpare.compress.errors import InputError, UsageError


class CachedTeacher:
    """A Teacher (see targets) that is read from disk, window by window; no model is in memory."""

    def __init__(self, folder: Path, identity: Identity, device: torch.device) -> None:
        self.folder, self.identity = folder, identity
        self._device = device
        self._files: dict[int, Any] = {}
        self._digests = {name: record["sha256"] for name, record in read_manifest(folder)["files"].items()}

    @classmethod
    def open(
        cls,
        folder: Path,
        ids: Tensor,
        *,
        vocabulary: int,
        device: torch.device,
        weights_sha256: str | None = None,
    ) -> Self:
        """The cache in `folder` for windows of text `ids` [windows, tokens].

        vocabulary: the student's. weights_sha256: the teacher's, where one is at hand. Raises InputError for a folder
        that is no finished cache and for one of another text, another teacher or another vocabulary, saying which.
        """
        identity = read_identity(folder)
        wanted = replace(identity, ids_sha256=ids_digest(ids), weights_sha256=weights_sha256 or identity.weights_sha256)
        if tuple(ids.shape) != (identity.windows, identity.tokens):
            raise InputError(
                f"the cache in {shown(folder)} is for {identity.windows} windows of {identity.tokens} tokens, "
                f"this run has {ids.shape[0]} of {ids.shape[1]}",
                "give the same --dataset, --tokens and --seqlen as when it was made",
            )
        require(folder, identity, wanted, "give the same --teacher, --dataset, --tokens and --seqlen, or make another")
        if vocabulary < identity.vocabulary:
            raise InputError(
                f"the cache in {shown(folder)} is over {identity.vocabulary} tokens, the student has {vocabulary}",
                "make it anew with this student: probabilities are then over the ids that both have",
            )
        return cls(folder, identity, device)

    def loss(self, batch: Batch, student_hidden: Tensor, head: Head, objective: Objective) -> Tensor:
        """See Teacher: the divergence over the k + 1 buckets of topk, which is at most the one over all tokens.

        Raises UsageError at a temperature that is not 1: what was kept is of temperature 1, and the tail has no shape
        that could be changed. Raises InputError for text that was not there when the cache was made.
        """
        if objective.temperature != 1:
            raise UsageError(
                f"a cached teacher has temperature 1, and {objective.temperature:g} is asked for",
                "leave out --temperature, or learn from the live teacher",
            )
        if batch.indices is None:
            raise InputError(
                "a cached teacher cannot score text that is made during training",
                "leave out --on-policy, or learn from the live teacher",
            )
        kept = self._counting(batch)
        targets = batch.targets

        def loss_of_rows(logits: Tensor, rows: slice) -> Tensor:
            def views() -> tuple[Tensor, Tensor]:
                tail = None if kept.tail is None else kept.tail[rows]
                part = Kept(kept.ids[rows], kept.near[rows], tail)
                return topk.buckets(logits[:, : self.identity.vocabulary], part.ids), part.log_probabilities()

            return objective(logits, targets[rows], views)

        return chunked(student_hidden, head, loss_of_rows)

    def _counting(self, batch: Batch) -> Kept:
        """What is kept of the positions that count, in their order."""
        assert batch.indices is not None
        rows = [self._window(int(index)) for index in batch.indices]
        stored = {name: torch.stack([row[name] for row in rows])[batch.mask.cpu()] for name in rows[0]}
        found = topk.decode(stored, self.identity.vocabulary)
        tail = None if found.tail is None else found.tail.to(self._device)
        return Kept(found.ids.to(self._device), found.near.to(self._device), tail)

    def _window(self, index: int) -> dict[str, Tensor]:
        number, row = divmod(index, self.identity.windows_per_file)
        if number not in self._files:
            path = self.folder / file_name(number)
            if sha256_file(path) != self._digests.get(path.name):
                raise InputError(
                    f"{shown(path)} is damaged: its sha256 is not that of the manifest",
                    "remove the folder, and it is made again",
                )
            self._files[number] = safetensors.safe_open(path, framework="pt")
        file = self._files[number]
        return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118
