"""Checkpoint formats: how codes, scales and zero points become named tensors that servers load.

A format is one file and one line below. It knows shapes and bits, and nothing of methods. This page and everything a
plan asks for import no torch.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llmpare.compress.checkpoint.write import TensorSpec
from llmpare.compress.errors import UsageError
from llmpare.compress.formats.compressed_tensors import CompressedTensors
from llmpare.compress.formats.dense import Dense
from llmpare.compress.formats.gptq import Gptq
from llmpare.compress.model.layout import Linear
from llmpare.compress.request import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from llmpare.compress.grid import Solved


class Format(Protocol):
    """What the engine and the plan ask of a format. Schemes map linears by name; None is a linear that stays dense."""

    beside_vision: bool  # whether loaders know it for the decoder of a model that also sees

    def scale_dtype(self, linear: Linear) -> str:
        """The precision scales are stored in, as safetensors spells it."""
        ...

    def check(self, schemes: Mapping[Linear, Scheme | None]) -> None:
        """Raises InputError when these schemes cannot be stored so that a loader reads them."""
        ...

    def specs(self, linear: Linear, scheme: Scheme) -> list[TensorSpec]:
        """Names, types and shapes of the tensors that replace the linear's weight."""
        ...

    def weight(self, linear: Linear, solved: "Solved") -> "Tensor":
        """The weight [rows, columns] in float32 that `decode` gives for what `encode` makes of it."""
        ...

    def encode(self, linear: Linear, scheme: Scheme, solved: "Solved") -> "dict[str, Tensor]":
        """Those tensors, on the device of the codes."""
        ...

    def decode(self, linear: Linear, scheme: Scheme, tensors: "Mapping[str, Tensor]") -> "Tensor":
        """The weight [rows, columns] in float32 as a loader computes it."""
        ...

    def solved(self, linear: Linear, scheme: Scheme, tensors: "Mapping[str, Tensor]") -> "Solved":
        """The codes, scales and zero points that `encode` was given. Raises UsageError where they are not kept."""
        ...

    def config(
        self, schemes: Mapping[Linear, Scheme | None], base: Scheme, outside: Sequence[str], *, eager: bool = False
    ) -> dict[str, Any] | None:
        """The quantization_config for config.json; None when an ordinary config describes the output.

        outside: names of the linear modules that belong to no block, such as the head; they are dense. eager: the
        model's own code looks at weights while it is loaded, and fails where they are still packed.
        """
        ...

    def caveats(self, schemes: Mapping[Linear, Scheme | None]) -> Sequence[str]:
        """What to know about loading a model of that kind (eager)."""
        ...

    def aliases(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of config.json to repeat under older names, for loaders of this format that know only those."""
        ...

    def files(self, schemes: Mapping[Linear, Scheme | None], base: Scheme) -> dict[str, bytes]:
        """Further files by name."""
        ...

    def notes(self, schemes: Mapping[Linear, Scheme | None]) -> Sequence[str]:
        """What the user should know about who can load the result."""
        ...


FORMATS: dict[str, Format] = {
    "compressed-tensors": CompressedTensors(),
    "gptq": Gptq(),
    "dense": Dense(),
}


def find(name: str) -> Format:
    """The format of that name. Raises UsageError with the nearest name and all there are."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, 1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"unknown format {name!r}", f"{guess}--format takes one of {', '.join(FORMATS)}")
    return FORMATS[name]
