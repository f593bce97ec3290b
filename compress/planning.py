"""What the plans of all commands have in common, from headers alone: no torch, no weights, under a second.

A command's own plan adds what it decides: which tensors change, what they become, how the output's config says so.
"""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmpare.compress import hardware, memory
from llmpare.compress.calibration import DEFAULT_SEQLEN
from llmpare.compress.checkpoint import locate
from llmpare.compress.checkpoint.files import destination
from llmpare.compress.checkpoint.header import TensorInfo
from llmpare.compress.checkpoint.read import DENSE, Checkpoint
from llmpare.compress.checkpoint.write import TensorSpec, weight_files
from llmpare.compress.formats.source import open_source
from llmpare.compress.model.layout import Layout, Linear, decoder_config, find, layout
from llmpare.compress.needs import Needs
from llmpare.compress.refusals import refuse_code, refuse_nested
from llmpare.compress.request import RunRequest


@dataclass(frozen=True)
class Subject:
    """The model of a run, as its headers show it."""

    model: Path
    layout: Layout
    tensors: Mapping[str, TensorInfo]  # of the source by name; if that is in low precision, of the dense model
    device: str  # the kind of device, cpu or cuda
    dtype: str  # the precision of the forward passes, as safetensors spells it
    seqlen: int
    longest: int  # tokens the model allows
    vocabulary: int
    parameters: int
    source_bytes: int
    source_scheme: str  # how the weights are stored


@dataclass(frozen=True)
class Plan(Subject, ABC):
    """The fate of every tensor."""

    request: RunRequest
    specs: tuple[TensorSpec, ...]  # of the output, in the order of the file
    needs: Needs
    warnings: tuple[str, ...]

    # --- what a command decides

    @property
    @abstractmethod
    def compressed(self) -> Sequence[Linear]:
        """The linears that the run changes."""

    @property
    @abstractmethod
    def linear_bytes(self) -> int:
        """Bytes of those linears in the output, all their tensors but biases counted."""

    @abstractmethod
    def specs_of(self, index: int) -> dict[str, TensorSpec]:
        """The output tensors of one block of the source, by name."""

    @abstractmethod
    def fate(self, name: str) -> str:
        """What becomes of a tensor of the source, in a few words."""

    @abstractmethod
    def outcome(self) -> str:
        """What the output is like, besides its size."""

    def place_of(self, index: int) -> int | None:
        """The number that a block of the source has in the output; None if it is left out."""
        return index

    @property
    def channels(self) -> Sequence[int] | None:
        """The residual channels of the source that the output has, in order; None: all of them."""
        return None

    @property
    def reshaped(self) -> tuple[Layout, dict[str, Any]] | None:
        """Layout and config.json of the output, if they are not those of the source."""
        return None

    def config(self, config: Mapping[str, Any], outside: Sequence[str], eager: bool) -> dict[str, Any] | None:
        """The output's config.json; None: byte for byte the source's.

        config: the source's. outside: names of the linear modules that belong to no block, such as the head. eager:
        whether the model's own code looks at weights of linears while it is loaded.
        """
        return None if self.reshaped is None else self.reshaped[1]

    def caveats(self, eager: bool) -> Sequence[str]:
        """What to know about loading the output that only shows once the model is built."""
        return ()

    def files(self) -> dict[str, bytes]:
        """Further files of the output by name."""
        return {}

    def sections(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the report of this command has besides the sections that all have. records: one per block."""
        return {}

    # --- what follows

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(spec.nbytes for spec in self.specs)

    @cached_property
    def file_bytes(self) -> int:
        """Bytes of the files that hold them, to the byte. Whatever else lies in the output comes on top."""
        return sum(weight_files(self.specs).values())

    @property
    def sequential(self) -> bool:
        """Whether linears of a block are solved one after the other within a single forward: see collect."""
        return self.needs.sequential

    @cached_property
    def changed(self) -> frozenset[str]:
        """Names of the weights that the run changes."""
        return frozenset(linear.tensor for linear in self.compressed)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values, one entry per tensor."""
        return {
            "command": "plan",
            "model": str(self.model),
            "architecture": self.layout.architecture,
            "blocks": len(self.layout.blocks),
            "tensors": [dict(zip(("name", "shape", "dtype", "fate"), fate, strict=True)) for fate in self._fates()],
            "source_bytes": self.source_bytes,
            "source_scheme": self.source_scheme,
            "output_bytes": self.output_bytes,
            "file_bytes": self.file_bytes,
            "memory_bytes": self.needs.memory,
            "least_memory_bytes": self.needs.least,
            "disk_bytes": self.file_bytes + self.needs.spilled,
            "warnings": list(self.warnings),
        }

    def lines(self) -> list[str]:
        """The plan for people: tensors that differ only in the number of their block share a line."""
        seen = Counter(
            (re.sub(r"\.\d+\.", ".*.", name), str(shape), dtype, fate) for name, shape, dtype, fate in self._fates()
        )
        width = max(len(key[0]) for key in seen)
        lines = [f"{self.layout.architecture}, {len(self.layout.blocks)} blocks, {self.parameters:,} parameters", ""]
        for (name, shape, dtype, fate), count in seen.items():
            lines.append(f"{count:5} × {name:{width}}  {shape:16} {dtype:5} → {fate}")
        if self.source_scheme != DENSE:
            lines += ["", f"source   {self.source_scheme}: decoded tensor by tensor when read, and compressed anew"]
        lines += [
            "",
            f"output   {memory.show(self.output_bytes)} from {memory.show(self.source_bytes)}"
            f" ({self.output_bytes / self.source_bytes:.0%}), {self.outcome()}",
            f"memory   about {memory.show(self.needs.memory)}: {self.needs.explain()}",
            f"         with --max-memory at least {memory.show(self.needs.least)}",
            *(f"         {line}" for line in self.needs.way.lines()),
            f"disk     {memory.show(self.file_bytes + self.needs.spilled)} in {destination(self.request.out).parent}: "
            f"{self.file_bytes:,} bytes of weight files"
            + (f", {self.needs.spilled:,} of hidden states for a time" if self.needs.spilled else ""),
            "time     not known from headers; the run says it once its first block is done",
        ]
        return lines + [f"note     {warning}" for warning in self.warnings]

    def _fates(self) -> Iterator[tuple[str, list[int], str, str]]:
        for name in (*self.layout.outside, *(name for block in self.layout.blocks for name in block)):
            info = self.tensors[name]
            yield name, list(info.shape), info.dtype, self.fate(name)


@contextmanager
def opened(request: RunRequest, device: str | None = None) -> Iterator[tuple[Checkpoint, Subject]]:
    """The model of a request, open, and what its headers say. Raises for a model that no command can take.

    device: the kind it will run on, if that is known; else the one that --device seems to mean.
    """
    device = hardware.device_kind(request.device) if device is None else device
    model = locate.resolve(request.model, revision=request.revision)
    refuse_nested(model, model, request.out)
    with open_source(model) as checkpoint:
        config = checkpoint.config
        refuse_code(model, config, trusted=request.trust_remote_code)
        found = layout(checkpoint)
        longest = find(decoder_config(config), "max_position_embeddings", "n_positions", default=DEFAULT_SEQLEN)
        yield (
            checkpoint,
            Subject(
                model=model,
                layout=found,
                tensors=checkpoint.tensors,
                device=device,
                dtype=hardware.forward_dtype(request.dtype, _stored(found), device),
                seqlen=request.calibration.seqlen or min(DEFAULT_SEQLEN, longest),
                longest=longest,
                vocabulary=find(decoder_config(config), "vocab_size", default=0),
                parameters=sum(info.numel for info in checkpoint.tensors.values()),
                source_bytes=checkpoint.weight_bytes,
                source_scheme=checkpoint.scheme,
            ),
        )


def idle_patterns(patterns: Sequence[str], found: Layout) -> list[str]:
    """A warning for every pattern that matches neither a linear nor anything outside the blocks."""
    idle = [each for each in patterns if not (matches_linear(each, found) or matches_outside(each, found))]
    return [f"pattern {pattern!r} matches no linear" for pattern in idle]


def matches_linear(pattern: str, found: Layout) -> bool:
    """Whether a linear has a name that the pattern matches."""
    return any(re.search(pattern, linear.name) for linear in found.linears)


def matches_outside(pattern: str, found: Layout) -> bool:
    """Whether a tensor or a module outside the blocks has such a name. A tied head has one, and no tensor."""
    modules = (name.rpartition(".")[0] for name in found.outside)
    return any(re.search(pattern, name) for name in (*found.outside, *modules, "lm_head"))


def _stored(found: Layout) -> str:
    """The precision that most weights of linears are stored in."""
    counts: Counter[str] = Counter()
    for linear in found.linears:
        counts[linear.dtype] += linear.rows * linear.columns
    return counts.most_common(1)[0][0]
