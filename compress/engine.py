"""The loop everything is built on: block by block, two streams side by side.

For each block: load → advance the dense stream → treat (collect, solve, continue, pack) → write → journal → advance
the compressed stream. One block is in memory at a time while the next is being read. The dense stream walks through the
original weights and the compressed one through the new, so the pass that compresses also measures what it cost.
"""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmpare.compress import memory
from llmpare.compress.checkpoint.journal import Journal
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.checkpoint.tensors import from_info, to_bytes, to_tensor
from llmpare.compress.checkpoint.write import CheckpointWriter
from llmpare.compress.clock import Clock
from llmpare.compress.errors import InputError, OutputError
from llmpare.compress.estimate import logit_tokens
from llmpare.compress.evaluate.fidelity import Scores, score
from llmpare.compress.model.replay import Replay
from llmpare.compress.model.skeleton import Skeleton
from llmpare.compress.plan import Plan
from llmpare.compress.progress import Progress
from llmpare.compress.streams import Stream, relative_error

OUTSIDE = "outside"  # the journal's name for everything that is no block


class BrokenWeights(InputError):
    """The source holds NaN or infinities: nothing that was begun with it is worth resuming."""


class Treatment(Protocol):
    """What a command does to a block. wants_dense: whether it looks at the original model's stream."""

    wants_dense: bool

    def treat(
        self, index: int, source: Mapping[str, Tensor], calibration: Stream | None, dense: Stream | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Compresses a loaded block in place and takes calibration and dense past it.

        Returns the block's new tensors by output name, and facts for the report.
        """
        ...

    def restore(self, index: int, stored: Mapping[str, Tensor]) -> None:
        """Puts what an earlier run wrote for this block into the loaded block."""
        ...


@dataclass
class Streams:
    """Where the text is: each set of windows twice, once on its way through either model.

    calibration and its dense twin are None when nothing looks at them.
    """

    calibration: Stream | None
    calibration_dense: Stream | None
    dense: Stream
    compressed: Stream


class Pass:
    """One pass over a model. digests: sha256 of every output tensor. records: facts of every block, in order."""

    def __init__(
        self,
        plan: Plan,
        source: Checkpoint,
        writer: CheckpointWriter,
        journal: Journal,
        skeleton: Skeleton,
        clock: Clock,
        progress: Progress,
    ) -> None:
        self._plan, self._source, self._writer, self._journal = plan, source, writer, journal
        self._skeleton, self._clock, self._progress = skeleton, clock, progress
        self._quantized = {linear.weight for linear in plan.quantized}
        self.digests: dict[str, str] = {}
        self.records: list[dict[str, Any]] = []
        self._check_journal()

    def outside(self) -> None:
        """Places embeddings, final norm and head, and carries them over byte for byte."""
        with self._clock.phase("read"):
            tensors = self._read(self._plan.layout.outside)
            self._skeleton.place_outside(tensors)
        if self._journalled(OUTSIDE, tensors) is None:
            with self._clock.phase("write"):
                self._write(OUTSIDE, tensors, tensors, {})

    def first(self) -> dict[str, Tensor]:
        """Loads block 0, which shows how blocks of this model behave, and returns its tensors."""
        tensors = self._read(self._plan.layout.blocks[0])
        self._skeleton.place(tensors)
        return tensors

    def blocks(self, replay: Replay, streams: Streams, treatment: Treatment, first: dict[str, Tensor]) -> None:
        """Takes every block in turn, and the streams past it. first: what `first` returned."""
        names = self._plan.layout.blocks
        tensors = first
        with ThreadPoolExecutor(1, "prefetch") as reader:
            for index in range(len(names)):
                begun = self._clock.total()
                if index + 1 < len(names):
                    coming = reader.submit(self._read, names[index + 1])
                record, resumed = self._block(index, tensors, replay, streams, treatment)
                with self._clock.phase("measure"):
                    streams.compressed.advance(replay, index)
                    self._require_finite(streams.compressed, index)
                    error = relative_error(streams.dense, streams.compressed)
                if index + 1 == len(names):
                    with self._clock.phase("verify"):
                        self._read_back(index, treatment)
                self._skeleton.unload(index)
                memory.trim()
                seconds = self._clock.total() - begun
                facts = {"index": index, "relative_error": error, "seconds": seconds, "resumed": resumed}
                self.records.append({**facts, **record["facts"]})
                self._progress.block(index, len(names), {"relative_error": error, "seconds": seconds})
                if index + 1 < len(names):
                    with self._clock.phase("read"):
                        tensors = coming.result()
                        self._skeleton.place(tensors)

    def scores(self, replay: Replay, streams: Streams) -> list[Scores]:
        """What both models predict at the end of their streams, one entry per window."""
        step = logit_tokens(self._skeleton.device.type)
        found = []
        for batch, ids in enumerate(streams.dense.ids):
            last = ids.shape[1] - 1  # the last token of a window is followed by nothing
            for window in range(len(ids)):
                one = slice(window, window + 1)
                parts = []
                for start in range(0, last, step):
                    end = min(start + step, last)
                    before = replay.logits(ids[one], streams.dense.hidden[batch][one], start, end)
                    after = replay.logits(ids[one], streams.compressed.hidden[batch][one], start, end)
                    parts.append(score(before, after, ids[one, start + 1 : end + 1]))
                found.append(Scores.join(parts))
        return found

    def _block(
        self, index: int, tensors: dict[str, Tensor], replay: Replay, streams: Streams, treatment: Treatment
    ) -> tuple[dict[str, Any], bool]:
        """Leaves the loaded block compressed and the dense streams past it. Returns its record and whether resumed."""
        with self._clock.phase("measure"):
            streams.dense.advance(replay, index)
            self._require_finite(streams.dense, index)
        done = self._journalled(_unit(index), tensors)
        if done is not None:
            if streams.calibration_dense is not None:
                with self._clock.phase("advance"):
                    streams.calibration_dense.advance(replay, index)
            with self._clock.phase("read"):
                self._restore(index, treatment)
            if streams.calibration is not None and index < self._last():
                with self._clock.phase("advance"):
                    streams.calibration.advance(replay, index)
            return done, True
        made, facts = treatment.treat(index, tensors, streams.calibration, streams.calibration_dense)
        with self._clock.phase("write"):
            stored = {name: made[name] if name in made else tensors[name] for name in self._plan.specs_of(index)}
            return self._write(_unit(index), stored, tensors, facts), False

    def _last(self) -> int:
        """The last block that is still to be done, -1 if there is none: past it, nobody looks at calibration text."""
        blocks = range(len(self._plan.layout.blocks))
        return max((index for index in blocks if _unit(index) not in self._journal.done), default=-1)

    def _restore(self, index: int, treatment: Treatment) -> None:
        """Loads the block from the output instead of the source."""
        specs = self._plan.specs_of(index)
        stored = {name: to_tensor(self._writer.read(name), spec.dtype, spec.shape) for name, spec in specs.items()}
        self._skeleton.place(stored)
        treatment.restore(index, stored)

    def _read_back(self, index: int, treatment: Treatment) -> None:
        """Raises OutputError unless the block, read from the output, is what ran in memory, to the last bit."""
        block = self._skeleton.blocks[index]
        ran = dict(block.named_parameters())  # place and restore put new tensors, these stay as they are
        self._restore(index, treatment)
        for name, parameter in block.named_parameters():
            if not torch.equal(parameter, ran[name]):
                raise OutputError(
                    f"block {index}: {name} in the output is not the weight that was computed",
                    "the disk or a bug of ours: verify the disk, then please report it",
                )

    def _read(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Tensors of the source by name, on the CPU. Raises InputError for NaN and infinities.

        If they are allowed, those in linears to be quantized become 0, for the original model too.
        """
        tensors = {name: from_info(self._source.read(name), self._source.tensors[name]) for name in names}
        for name, tensor in tensors.items():
            # a finite sum has finite terms only; one that is not may have overflowed, so it is looked at closely
            if not tensor.is_floating_point() or tensor.sum().isfinite():
                continue
            broken = int((~tensor.isfinite()).sum())
            if broken and not self._plan.request.allow_nonfinite:
                raise BrokenWeights(
                    f"{name} holds {broken} values that are NaN or infinite",
                    "the checkpoint is damaged; --allow-nonfinite counts them as 0 in linears",
                )
            if name in self._quantized:
                tensor.nan_to_num_(0.0, 0.0, 0.0)
        return tensors

    def _write(
        self, unit: str, stored: Mapping[str, Tensor], source: Mapping[str, Tensor], facts: dict[str, Any]
    ) -> dict[str, Any]:
        """Writes the tensors of a unit durably and only then notes that it is done."""
        digests = {name: self._writer.write(name, to_bytes(tensor)) for name, tensor in stored.items()}
        self._writer.sync()
        record = {"sha256": digests, "source": self._source_digest(source), "facts": facts}
        self._journal.append(unit, record)
        self.digests.update(digests)
        return record

    def _journalled(self, unit: str, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The record of a unit that an earlier run finished. Raises InputError if it was made from other weights."""
        record = self._journal.done.get(unit)
        if record is not None and record["source"] != self._source_digest(tensors):
            raise InputError(
                f"{self._source.folder}: {unit} is not the one that the unfinished output was begun with",
                "--restart discards what there is and begins afresh",
            )
        return record

    def _source_digest(self, names: Iterable[str]) -> str:
        """One digest for the source bytes of several tensors."""
        text = "".join(f"{name} {self._source.digests[name]}\n" for name in names)
        return hashlib.sha256(text.encode()).hexdigest()

    def _check_journal(self) -> None:
        """Takes back every unit whose tensors in the output are not what the journal says."""
        for message in self._journal.dropped:
            self._progress.warn(message)
        for unit, record in list(self._journal.done.items()):
            for name, digest in record["sha256"].items():
                if hashlib.sha256(self._writer.read(name)).hexdigest() != digest:
                    self._progress.warn(f"{unit} failed its checksum, redoing")
                    self._journal.forget(unit)
                    break
            else:
                self.digests.update(record["sha256"])

    def _require_finite(self, stream: Stream, index: int) -> None:
        if not stream.finite():
            raise InputError(
                f"block {index} gives activations that are NaN or infinite in {self._plan.dtype}",
                "try --dtype bfloat16 or --dtype float32",
            )


def _unit(index: int) -> str:
    return f"block {index}"
