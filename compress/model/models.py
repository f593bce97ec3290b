"""The two models of a run: the one it starts from and the one it makes."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpare.compress.checkpoint.read import TensorInfo
from llmpare.compress.checkpoint.write import TensorSpec
from llmpare.compress.model.replay import Replay
from llmpare.compress.model.skeleton import Skeleton


@dataclass(frozen=True)
class Model:
    """A model that runs block by block."""

    skeleton: Skeleton
    replay: Replay


@dataclass(frozen=True)
class Models:
    """dense: the original. output: what becomes of it; the same object as long as all shapes stay as they are, and
    then a block is the original's until it is treated, and the output's from then on.
    """

    dense: Model
    output: Model

    @property
    def same(self) -> bool:
        """Whether both streams run through the same modules."""
        return self.dense is self.output


@dataclass
class Sketch:
    """A checkpoint that is still to be written, as far as layout and skeleton look at one: see layout.Source."""

    folder: Path  # where its config.json is
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def of(cls, folder: Path, config: dict[str, Any], specs: Iterable[TensorSpec]) -> "Sketch":
        """The sketch of an output that is to hold these tensors."""
        return cls(folder, config, {s.name: TensorInfo(s.name, s.dtype, s.shape, "", 0, s.nbytes) for s in specs})
