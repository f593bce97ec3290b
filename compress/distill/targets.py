"""What a student learns from: the contract between the training loop, its teachers and what is added to it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from llmpare.compress.distill.losses import Head, Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Batch:
    """Some windows of the training text. A scored position p < tokens − 1 predicts the token at p + 1.

    ids: [windows, tokens]. mask: [windows, tokens − 1], whether a position counts: not if what follows is padding or
    part of a prompt. indices: [windows], the windows' numbers in the text; None for text that was made on the way.
    """

    ids: Tensor
    mask: Tensor
    indices: Tensor | None

    @property
    def targets(self) -> Tensor:
        """The ids [n] that follow the n positions that count, window by window."""
        return self.ids[:, 1:][self.mask]

    def counting(self, values: Tensor) -> Tensor:
        """Of values [windows, tokens, …], those [n, …] at the positions that count, in the order of `targets`."""
        return values[:, :-1][self.mask]


@dataclass(frozen=True)
class Outputs:
    """What the student made of a batch.

    hidden: [n, width], its last hidden states after the final norm, at the positions that count. layers: what entered
    every block, then what left the last, after the norm: [windows, tokens, width] each; None unless an extension
    wants them. head: the student's. done: share of the training that lies behind, 0…1.
    """

    hidden: Tensor
    layers: tuple[Tensor, ...] | None
    head: Head
    done: float


class Teacher(Protocol):
    """Whatever says what a student should have predicted."""

    def loss(self, batch: Batch, student_hidden: Tensor, head: Head, objective: Objective) -> Tensor:
        """The SUM of the objective over the n positions that count, a scalar with gradients for the student.

        student_hidden: [n, width], as batch.counting gives it. head: takes them to logits. To be computed with
        losses.chunked, so that no more than a chunk of logits exists.
        """
        ...


class Extension(Protocol):
    """Something added to the training: its own loss, a change of the student for the time of the training."""

    wants_layers: bool

    def prepare(self, student: "PreTrainedModel") -> None:
        """Called once, before training, with the student in place; also when a run is resumed, with the weights of
        the beginning: those of the checkpoint are loaded afterwards. May add parameters and hooks."""
        ...

    def extra_loss(self, outputs: Outputs, batch: Batch) -> Tensor | None:
        """What is added to the loss of a batch: a SUM over its positions that count, as Teacher.loss gives it."""
        ...

    def finish(self, student: "PreTrainedModel") -> None:
        """Called once, after training: leaves a plain model, whose state dict is written."""
        ...


class Rewrite(Protocol):
    """Puts other text in the place of a batch's, such as what the student wrote itself."""

    def __call__(self, batch: Batch, student: "PreTrainedModel", done: float) -> Batch:
        """The batch to learn from: as many windows, on the same device. done: as in Outputs."""
        ...
