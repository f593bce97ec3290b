"""The student with everything that makes its loss, as one module: data parallelism and sharding wrap modules."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmpare.calibration_data import IGNORED
from llmpare.compress.distill.forward import Forward
from llmpare.compress.distill.losses import Objective
from llmpare.compress.distill.targets import Batch, Extension, Outputs, Rewrite, Teacher
from llmpare.compress.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARDED = "_fsdp_wrapped_module."  # in names of parameters of a sharded module, and not in its state


class Diverged(InputError):
    """The loss or its gradient is not finite; the weights are still those of the step before."""


class Pupil(nn.Module):
    """forward: the loss of some windows, as transformers' Trainer wants it.

    done: share of the training that lies behind, 0…1, kept by whoever trains. Of its state only what is trained is
    saved, and that once: the rest is in the student's own checkpoint.
    """

    accepts_loss_kwargs = True  # the Trainer's word for: divides by the tokens of the whole step itself
    _keys_to_ignore_on_save = None  # the Trainer looks at it when tied weights are absent from a checkpoint

    def __init__(
        self,
        student: "PreTrainedModel",
        teacher: Teacher,
        objective: Objective,
        extensions: Sequence[Extension] = (),
        rewrite: Rewrite | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.done = 0.0
        self._no_split_modules = student._no_split_modules  # what sharding wraps: the blocks
        self._lesson = teacher, objective, rewrite  # a tuple: the teacher is no part of the module
        self._forward = Forward(student)
        self.extensions = tuple(extensions)
        self.partial = bool(extensions)  # whether some steps may leave parameters without a gradient
        self._layers = any(extension.wants_layers for extension in extensions)
        self.register_state_dict_post_hook(_only_what_is_trained)

    def forward(
        self, ids: Tensor, labels: Tensor, indices: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> dict[str, Tensor]:
        """ids: [windows, tokens]. labels: [windows, tokens − 1], the id after each position or IGNORED. indices:
        [windows]. num_items_in_batch: positions that count in all windows of the step, on all devices.

        Raises Diverged when the loss is not finite.
        """
        teacher, objective, rewrite = self._lesson
        batch = Batch(ids, labels != IGNORED, indices)
        scale = 1.0 / (batch.mask.sum() if num_items_in_batch is None else num_items_in_batch)
        if rewrite is not None:
            given = batch.mask.sum()
            batch = rewrite(batch, self.student, self.done)
            scale = scale * given / batch.mask.sum()  # windows weigh the same, whatever they are replaced by
        hidden, layers = self._forward.hidden(batch.ids, layers=self._layers)
        kept = batch.counting(hidden)
        loss = teacher.loss(batch, kept, self._forward, objective)
        for extension in self.extensions:
            extra = extension.extra_loss(Outputs(kept, layers, self._forward, self.done), batch)
            if extra is not None:
                loss = loss + extra
        if not torch.isfinite(loss):
            raise Diverged(f"the loss is {float(loss.detach())}")
        return {"loss": loss * scale}


def _only_what_is_trained(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    parameters = ((name.replace(_SHARDED, ""), parameter) for name, parameter in module.named_parameters())
    trained = {prefix + name for name, parameter in parameters if parameter.requires_grad}
    buffers = {prefix + name for name, _ in module.named_buffers()}
    for name in [name for name in state if name not in trained and name not in buffers]:
        del state[name]
