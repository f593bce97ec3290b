"""Adapters of low rank in every linear, trained while all else stays, and merged into the weights afterwards."""

import importlib.util
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llmpare.compress.distill.targets import Batch, Outputs
from llmpare.compress.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require() -> None:
    """Raises UsageError unless peft is installed."""
    if importlib.util.find_spec("peft") is None:
        raise UsageError("--lora-rank needs the package peft", "pip install 'llmpare[distill]'")


class Lora:
    """See targets.Extension. Hu et al. 2021; scaled by 2 whatever the rank, so that it can change alone."""

    wants_layers = False

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._adapted: Any = None

    def prepare(self, student: "PreTrainedModel") -> None:
        """See targets.Extension."""
        import peft

        config = peft.LoraConfig(r=self._rank, lora_alpha=2 * self._rank, target_modules="all-linear")
        self._adapted = peft.get_peft_model(student, config)  # changes the student's own modules

    def extra_loss(self, outputs: Outputs, batch: Batch) -> Tensor | None:
        """See targets.Extension: the loss stays what it is."""
        return None

    def finish(self, student: "PreTrainedModel") -> None:
        """See targets.Extension."""
        self._adapted.merge_and_unload()
