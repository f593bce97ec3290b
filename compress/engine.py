"""The loop everything is built on: block by block, two streams side by side.

For each block: load → advance the dense stream → treat (collect, solve, continue, pack) → write → journal → advance
the compressed stream. One block is in memory at a time while the next is being read. The dense stream walks through the
original weights and the compressed one through the new, so the pass that compresses also measures what it cost.

Blocks are numbered as in the source; the plan says which place each has in the output, if any.
"""

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from llmpare.compress.batches import logit_tokens
from llmpare.compress.checkpoint.journal import Journal
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.checkpoint.tensors import to_bytes, to_tensor
from llmpare.compress.checkpoint.write import CheckpointWriter
from llmpare.compress.clock import Clock
from llmpare.compress.errors import InputError, OutputError
from llmpare.compress.evaluate.fidelity import Scores, score
from llmpare.compress.model.models import Models
from llmpare.compress.planning import Plan
from llmpare.compress.progress import Progress
from llmpare.compress.streams import Stream, relative_error
from llmpare.compress.walk import Walk

OUTSIDE = "outside"  # the journal's name for everything that is no block


class Treatment(Protocol):
    """What a command does to a model. wants_dense: whether it looks at the original model's stream of calibration."""

    wants_dense: bool

    def outside(self, source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What becomes of the tensors that belong to no block: what is not returned stays as it is."""
        ...

    def treat(
        self, index: int, source: dict[str, Tensor], calibration: Stream | None, dense: Stream | None
    ) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """Compresses a loaded block, leaves the output's model with it, and takes calibration and dense past it.

        source: the block's tensors; what will not be copied may be taken out as soon as it has been used.
        Returns the block's new tensors by output name, and facts for the report. What is not returned is copied.
        """
        ...

    def restore(self, index: int, stored: Mapping[str, Tensor]) -> None:
        """Puts what an earlier run stored for this block in a form that is no plain weight into the output's model."""
        ...

    def follow(self, index: int, facts: Mapping[str, Any], stored: Mapping[str, Tensor], calibration: Stream) -> None:
        """Takes calibration past a block that an earlier run has treated and that is restored, to where `treat` did.

        facts, stored: what `treat` returned, and the block's tensors by output name.
        """
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
    """One pass over a model. digests: sha256 of every output tensor. records: facts of every block, in order.

    foreseen: seconds that the run takes from beginning to end, if every block to come takes as long as the first one
    that was treated; None before that.
    """

    def __init__(
        self,
        plan: Plan,
        source: Checkpoint,
        writer: CheckpointWriter,
        journal: Journal,
        models: Models,
        treatment: Treatment,
        clock: Clock,
        progress: Progress,
    ) -> None:
        self._plan, self._source, self._writer, self._journal = plan, source, writer, journal
        self._models, self._treatment, self._clock, self._progress = models, treatment, clock, progress
        self.digests: dict[str, str] = {}
        self.records: list[dict[str, Any]] = []
        self.foreseen: float | None = None
        self._check_journal()

    def outside(self, source: Mapping[str, Tensor]) -> None:
        """Writes embeddings, final norm and head, byte for byte unless the treatment changes them.

        source: those tensors, which the dense model has; the output's model gets them here, if it is another.
        """
        with self._clock.phase("write"):
            stored = {**source, **self._treatment.outside(source)}
            if not self._models.same:
                self._models.output.skeleton.place_outside(stored)
            if self._journalled(OUTSIDE, source) is None:
                self._write(OUTSIDE, stored, source, {})

    def blocks(self, walk: Walk, streams: Streams) -> None:
        """Takes every block in turn, and the streams past it."""
        total = len(self._plan.layout.blocks)
        places = [self._plan.place_of(index) for index in range(total)]
        last = max((index for index, place in enumerate(places) if place is not None), default=-1)
        with closing(walk.blocks()) as blocks:
            begun = self._clock.total()
            for index, tensors in blocks:
                record, resumed = self._block(index, tensors, streams)
                tensors.clear()  # what is still in use, the model has
                with self._clock.phase("measure"):
                    self._advance(streams.compressed, index)
                    self._require_finite(streams.compressed, index)
                    error = relative_error(streams.dense, streams.compressed, self._plan.channels)
                if index == last:
                    with self._clock.phase("verify"):
                        self._read_back(index)
                place = places[index]
                if not self._models.same and place is not None:
                    self._models.output.skeleton.unload(place)
                seconds = self._clock.total() - begun
                if self.foreseen is None and not resumed:
                    self.foreseen = self._clock.total() + seconds * (total - index - 1)
                facts = {"index": index, "relative_error": error, "seconds": seconds, "resumed": resumed}
                self.records.append({**facts, **record["facts"]})
                self._progress.block(index, total, {"relative_error": error, "seconds": seconds})
                begun = self._clock.total()

    def scores(self, streams: Streams) -> list[Scores]:
        """What both models predict at the end of their streams, one entry per window."""
        dense, output = self._models.dense.replay, self._models.output.replay
        step = min(logit_tokens(dense.device.type), self._plan.needs.way.positions)
        found = []
        for ids, original, compressed in zip(
            streams.dense.ids, streams.dense.hidden, streams.compressed.hidden, strict=True
        ):
            last = ids.shape[1] - 1  # the last token of a window is followed by nothing
            for window in range(len(ids)):
                one = slice(window, window + 1)
                parts = []
                for start in range(0, last, step):
                    end = min(start + step, last)
                    before = dense.logits(ids[one], original[one], start, end)
                    after = output.logits(ids[one], compressed[one], start, end)
                    parts.append(score(before, after, ids[one, start + 1 : end + 1]))
                found.append(Scores.join(parts))
        return found

    def _block(self, index: int, tensors: dict[str, Tensor], streams: Streams) -> tuple[dict[str, Any], bool]:
        """Leaves the loaded block compressed and the dense streams past it. Returns its record and whether resumed."""
        dense = self._models.dense.replay
        with self._clock.phase("measure"):
            streams.dense.advance(dense, index)
            self._require_finite(streams.dense, index)
        names = tuple(tensors)
        done = self._journalled(_unit(index), names)
        if done is not None:
            if streams.calibration_dense is not None:
                with self._clock.phase("advance"):
                    streams.calibration_dense.advance(dense, index)
            tensors.clear()  # neither they nor what was made of them is needed beside what comes now
            if self._models.same:
                self._models.output.skeleton.unload(index)
            with self._clock.phase("read"):
                stored = self._restore(index)
            if streams.calibration is not None and index < self._last():
                with self._clock.phase("advance"):
                    self._treatment.follow(index, done["facts"], stored, streams.calibration)
            return done, True
        made, facts = self._treatment.treat(index, tensors, streams.calibration, streams.calibration_dense)
        with self._clock.phase("write"):
            stored = {name: made[name] if name in made else tensors[name] for name in self._plan.specs_of(index)}
            return self._write(_unit(index), stored, names, facts), False

    def _advance(self, stream: Stream, index: int) -> None:
        """Takes a stream of the output's model past what became of block `index`."""
        place = self._plan.place_of(index)
        if place is not None:
            stream.advance(self._models.output.replay, place)

    def _last(self) -> int:
        """The last block that is still to be done, -1 if there is none: past it, nobody looks at calibration text."""
        blocks = range(len(self._plan.layout.blocks))
        return max((index for index in blocks if _unit(index) not in self._journal.done), default=-1)

    def _restore(self, index: int) -> dict[str, Tensor]:
        """Loads what became of a block from the output instead of the source, and returns its tensors."""
        specs = self._plan.specs_of(index)
        stored = {name: to_tensor(self._writer.read(name), spec.dtype, spec.shape) for name, spec in specs.items()}
        self._models.output.skeleton.place(stored)
        self._treatment.restore(index, stored)
        return stored

    def _read_back(self, index: int) -> None:
        """Raises OutputError unless the block, read from the output, is what ran in memory, to the last bit."""
        place = self._plan.place_of(index)
        if place is None:
            raise ValueError(f"block {index} is not in the output")
        block = self._models.output.skeleton.blocks[place]
        ran = _digests(block)  # two blocks would take more memory than the run was planned with
        self._models.output.skeleton.unload(place)
        self._restore(index)
        read = _digests(block)
        different = [name for name, digest in ran.items() if read[name] != digest]
        if different:
            raise OutputError(
                f"block {index}: {different[0]} in the output is not the weight that was computed",
                "the disk or a bug of ours: verify the disk, then please report it",
            )

    def _write(
        self, unit: str, stored: Mapping[str, Tensor], source: Iterable[str], facts: dict[str, Any]
    ) -> dict[str, Any]:
        """Writes the tensors of a unit durably and only then notes that it is done."""
        digests = {name: self._writer.write(name, to_bytes(tensor)) for name, tensor in stored.items()}
        self._writer.sync()
        record = {"sha256": digests, "source": self._source_digest(source), "facts": facts}
        self._journal.append(unit, record)
        self.digests.update(digests)
        return record

    def _journalled(self, unit: str, tensors: Iterable[str]) -> dict[str, Any] | None:
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
        text = "".join(f"{name} {self._source.digest(name)}\n" for name in names)
        return hashlib.sha256(text.encode()).hexdigest()

    def _check_journal(self) -> None:
        """Takes back every unit whose tensors in the output are not what the journal says."""
        for message in self._journal.dropped:
            self._progress.warn(message)
        for unit, record in list(self._journal.done.items()):
            for name, digest in record["sha256"].items():
                if self._writer.digest(name) != digest:
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


def _digests(block: nn.Module) -> dict[str, str]:
    """The sha256 of every parameter as float32, which holds those of less precision exactly, with one kind of zero."""
    found = {}
    for name, parameter in block.named_parameters():
        found[name] = hashlib.sha256(to_bytes(parameter.float() + 0.0)).hexdigest()
    return found


def _unit(index: int) -> str:
    return f"block {index}"
