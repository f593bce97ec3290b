"""Teachers that predict while the student learns; see targets.Teacher. One that has predicted before is in cache."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmpare.compress.distill.forward import Forward
from llmpare.compress.distill.losses import Head, Objective, chunked
from llmpare.compress.distill.targets import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LiveTeacher:
    """A teacher that reads every batch anew; see targets.Teacher. Its vocabulary may be padded otherwise."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.forward = Forward(model.eval().requires_grad_(False))
        self._last: tuple[Tensor, Tensor, tuple[Tensor, ...] | None] | None = None

    @torch.no_grad()
    def read(self, batch: Batch, *, layers: bool = False) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """As Forward.hidden. What was read last is kept, for whoever asks for the same batch next."""
        last = self._last
        if last is None or last[0] is not batch.ids or (layers and last[2] is None):
            with torch.autocast(batch.ids.device.type, enabled=False):  # the student's precision is not its own
                self._last = last = (batch.ids, *self.forward.hidden(batch.ids, layers=layers))
        return last[1], last[2]

    def loss(self, batch: Batch, student_hidden: Tensor, head: Head, objective: Objective) -> Tensor:
        """See targets.Teacher."""
        own = batch.counting(self.read(batch)[0])
        targets = batch.targets

        def loss_of_rows(logits: Tensor, rows: slice) -> Tensor:
            def views() -> tuple[Tensor, Tensor]:
                with torch.no_grad():
                    predicted = self.forward(own[rows])
                shared = min(logits.shape[-1], predicted.shape[-1])
                return logits[:, :shared], predicted[:, :shared]

            return objective(logits, targets[rows], views)

        return chunked(student_hidden, head, loss_of_rows)


class TextAlone:
    """No teacher: the text itself says what follows. See targets.Teacher."""

    def loss(self, batch: Batch, student_hidden: Tensor, head: Head, objective: Objective) -> Tensor:
        """See targets.Teacher; the objective must be that of the text alone."""
        targets = batch.targets

        def refuse() -> tuple[Tensor, Tensor]:
            raise ValueError("an objective that compares with a teacher, and there is none")

        return chunked(student_hidden, head, lambda logits, rows: objective(logits, targets[rows], refuse))
