"""How sure an early exit has to be to go on drafting: what transformers finds in generation_config.json.

A draft of transformers ends after num_assistant_tokens, or with the first token that the exit itself gives less than
assistant_confidence_threshold. Drafting on costs a forward of the exit for every token, stopping a forward of all
blocks for the next one, so what is best follows from how often the exit is right when it is how sure. Both can be read
off texts that the whole model has written: up to its first wrong token a draft is that text. After it the draft is
taken to be as sure as the exit is of the text itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmpare.compress.distill.early_exit import stopping_after
from llmpare.compress.distill.forward import Forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST = 20  # tokens of a draft, transformers' own default: the threshold ends most drafts before
THRESHOLDS = tuple(step / 10 for step in range(10))


@dataclass(frozen=True)
class Guesses:
    """What an exit would have said where the model wrote n tokens. right: whether that token. sure: of its own, 0…1."""

    right: Sequence[bool]
    sure: Sequence[float]


def settings(model: "PreTrainedModel", texts: Iterable[Tensor], prompt: int, exits: Sequence[int]) -> dict[str, Any]:
    """The entries of generation_config.json with which the best of the exits costs least.

    texts: [1, tokens] each, of which the model itself wrote all but the first `prompt`, greedily.
    """
    written = list(texts)
    guesses = {exit_: [guess(model, text, prompt, exit_) for text in written] for exit_ in exits}
    depth = model.config.num_hidden_layers

    def least(threshold: float) -> float:
        return min(
            sum(spent(each, threshold, exit_ / depth) for each in guesses[exit_]) for exit_ in exits
        )  # fmt: skip

    return {
        "num_assistant_tokens": LONGEST,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": min(THRESHOLDS, key=least),
    }


@torch.no_grad()
def guess(model: "PreTrainedModel", text: Tensor, prompt: int, exit_: int) -> Guesses:
    """What the exit says of the tokens of text [1, tokens] from number `prompt` on."""
    forward = Forward(model)
    with stopping_after(model, exit_):
        hidden, _ = forward.hidden(text)
        sure, said = forward(hidden[0, prompt - 1 : -1]).softmax(-1).max(-1)
    return Guesses((said == text[0, prompt:]).tolist(), sure.tolist())


def spent(guesses: Guesses, threshold: float, share: float) -> float:
    """What writing the tokens costs, in forwards of the whole model. share: of it, that a forward of the exit costs."""
    total = 0.0
    place, count = 0, len(guesses.right)
    while place < count:
        end = min(place + LONGEST, count - 1)  # the last token needs no draft
        drafted = next((at + 1 for at in range(place, end) if guesses.sure[at] < threshold), end)
        right = next((at for at in range(place, drafted) if not guesses.right[at]), drafted)
        total += (drafted - place) * share + 1
        place = right + 1
    return total
