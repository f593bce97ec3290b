"""Dequantized weights in the model's own layout and dtype: nothing is smaller, everything loads; for checking."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmpare.compress.checkpoint.write import TensorSpec
from llmpare.compress.errors import UsageError
from llmpare.compress.model.layout import Linear
from llmpare.compress.request import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from llmpare.compress.grid import Solved


class Dense:
    """See the protocol in llmpare.compress.formats."""

    beside_vision = True

    def scale_dtype(self, linear: Linear) -> str:
        """As a packed checkpoint of this model would hold them."""
        return linear.dtype

    def check(self, schemes: Mapping[Linear, Scheme | None]) -> None:
        """Everything can be stored."""

    def specs(self, linear: Linear, scheme: Scheme) -> list[TensorSpec]:
        """The weight as the source has it."""
        shape = (linear.columns, linear.rows) if linear.transposed else (linear.rows, linear.columns)
        return [TensorSpec(linear.weight, linear.dtype, shape)]

    def weight(self, linear: Linear, solved: "Solved") -> "Tensor":
        """The dequantized weight, rounded to the model's dtype, whatever the forward passes run in."""
        from llmpare.compress.checkpoint.tensors import DTYPES

        return solved.weight().to(DTYPES[linear.dtype]).float()

    def encode(self, linear: Linear, scheme: Scheme, solved: "Solved") -> "dict[str, Tensor]":
        """The dequantized weight, rounded to the model's dtype."""
        from llmpare.compress.checkpoint.tensors import DTYPES

        weight = solved.weight().to(DTYPES[linear.dtype])
        return {linear.weight: weight.t().contiguous() if linear.transposed else weight}

    def decode(self, linear: Linear, scheme: Scheme, tensors: "Mapping[str, Tensor]") -> "Tensor":
        """The weight itself."""
        weight = tensors[linear.weight].float()
        return weight.t().contiguous() if linear.transposed else weight

    def solved(self, linear: Linear, scheme: Scheme, tensors: "Mapping[str, Tensor]") -> "Solved":
        """There are no codes in a dense weight."""
        raise UsageError("the dense format keeps no codes", "use --format compressed-tensors or gptq")

    def config(
        self, schemes: Mapping[Linear, Scheme | None], base: Scheme, outside: Sequence[str], *, eager: bool = False
    ) -> None:
        """The model's own config describes it."""
        return

    def caveats(self, schemes: Mapping[Linear, Scheme | None]) -> Sequence[str]:
        """Nothing is packed."""
        return ()

    def aliases(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """None: whoever loads this format knows the config as it is."""
        return {}

    def files(self, schemes: Mapping[Linear, Scheme | None], base: Scheme) -> dict[str, bytes]:
        """None."""
        return {}

    def notes(self, schemes: Mapping[Linear, Scheme | None]) -> Sequence[str]:
        """What it is for."""
        return ("the dense format stores dequantized weights: it shows the loss, and saves no space",)
