"""A whole model in two steps: tokens to last hidden states, and those to logits, a chunk at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmpare.compress.model.replay import float32_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Forward:
    """The two steps of a model, by its own code; see losses.Head for the second."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        self._kind: Any = None

    def hidden(self, ids: Tensor, *, layers: bool = False) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Last hidden states [windows, tokens, width] for ids [windows, tokens], after the final norm.

        layers: also returns what entered every block and what left the last, in the same shape.
        """
        out = self.model.base_model(input_ids=ids, use_cache=False, output_hidden_states=layers)
        self._kind = type(out)
        return out.last_hidden_state, tuple(out.hidden_states) if layers else None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What is trained of the head."""
        head = self.model.get_output_embeddings()
        return () if head is None else tuple(each for each in head.parameters() if each.requires_grad)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Float32 logits [tokens, vocabulary] of last hidden states [tokens, width], with soft caps and all."""
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with self._read(hidden[None]):
            if torch.is_grad_enabled():
                logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
            else:
                with float32_head(self.model.get_output_embeddings()):
                    logits = self.model(input_ids=ids, use_cache=False).logits
        return logits[0].float()

    @contextmanager
    def _read(self, hidden: Tensor) -> Iterator[None]:
        """Within the context, the model has read its text already and ended with these hidden states."""
        inner: nn.Module = self.model.base_model
        kind = self._kind

        def read_already(*args: Any, **kwargs: Any) -> Any:
            return kind(last_hidden_state=hidden)

        inner.forward = read_already
        try:
            yield
        finally:
            del inner.forward
