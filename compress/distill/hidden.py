"""The states between blocks as a second lesson: the student's should be like the teacher's at the same depth."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmpare.compress.distill.targets import Batch, Outputs
from llmpare.compress.distill.teachers import LiveTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """‖s − t‖² / ‖t‖² per token, of [tokens, width]: normalised, so that depth and family do not matter."""
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cos(s, t) per token, of [tokens, width]: blind to the length of states, which norms take away anyway."""
    return 1 - torch.cosine_similarity(student, teacher, dim=-1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "cosine": cosine}


def mapped(student: int, teacher: int) -> list[int]:
    """For every block of the student the number of teacher's blocks after which its output should be the same."""
    return [round((index + 1) * teacher / student) for index in range(student)]


class HiddenLoss:
    """See targets.Extension: the mean over the student's blocks of a loss from LOSSES, times a weight.

    Where widths differ the student's states pass through a linear map that is learned with it and left behind.
    """

    wants_layers = True

    def __init__(self, loss: str, weight: float, teacher: LiveTeacher) -> None:
        self._loss, self._weight, self._teacher = LOSSES[loss], weight, teacher
        self._maps: nn.ModuleList | None = None

    def prepare(self, student: "PreTrainedModel") -> None:
        """See targets.Extension. The maps begin as the identity on the channels that both have."""
        (own, other) = (_embedding(model) for model in (student, self._teacher.forward.model))
        if own.shape[1] == other.shape[1]:
            return
        depth = student.config.get_text_config().num_hidden_layers
        maps = [nn.Linear(own.shape[1], other.shape[1], bias=False) for _ in range(depth)]
        for each in maps:
            nn.init.eye_(each.weight)
        self._maps = nn.ModuleList(maps).to(own.device, own.dtype)
        student.add_module(_NAME, self._maps)

    def extra_loss(self, outputs: Outputs, batch: Batch) -> Tensor | None:
        """See targets.Extension."""
        assert outputs.layers is not None
        _, theirs = self._teacher.read(batch, layers=True)
        assert theirs is not None
        own = outputs.layers[1:]
        found = []
        for index, place in enumerate(mapped(len(own), len(theirs) - 1)):
            state = batch.counting(own[index])
            if self._maps is not None:
                state = self._maps[index](state)
            found.append(self._loss(state.float(), batch.counting(theirs[place]).float()).sum())
        return self._weight * torch.stack(found).mean()

    def finish(self, student: "PreTrainedModel") -> None:
        """See targets.Extension."""
        if self._maps is not None:
            del student._modules[_NAME]


_NAME = "hidden_state_maps"


def _embedding(model: "PreTrainedModel") -> Tensor:
    """[vocabulary, width]."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight
