"""What early exits are worth: stock transformers, drafting with the first blocks of a model and checking with all.

Every prompt is continued twice, greedily: by all blocks alone, and with drafts. Counting the blocks that run tells
drafts from checks: each check yields one token of its own besides the drafted ones it accepts.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Drafted:
    """Of one exit. drafted, accepted, checks: tokens that were proposed, those that stayed, and full forwards.

    equal: share of the prompts for which the drafts changed nothing. plain_seconds, drafted_seconds: for each prompt.
    """

    exit: int
    prompts: int
    tokens: int
    drafted: int
    accepted: int
    checks: int
    equal: float
    plain_seconds: tuple[float, ...]
    drafted_seconds: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """The report's entry on this exit. speedup: the median over the prompts, each of which was timed both ways."""
        pairs = zip(self.plain_seconds, self.drafted_seconds, strict=True)
        return {
            "exit": self.exit,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "acceptance": self.accepted / self.drafted if self.drafted else 0.0,
            "tokens_per_check": self.tokens / self.checks if self.checks else 0.0,
            "equal": self.equal,
            "plain_tokens_per_second": self.tokens / sum(self.plain_seconds),
            "drafted_tokens_per_second": self.tokens / sum(self.drafted_seconds),
            "speedup": statistics.median(plain / drafted for plain, drafted in pairs),
        }


def measure(model: "PreTrainedModel", prompts: Tensor, exits: Sequence[int], new_tokens: int) -> list[Drafted]:
    """Both ways of continuing prompts [n, tokens], one at a time, for every exit; by `new_tokens` each, or fewer where
    the text ends.

    The two take turns, so that whatever else the machine does meets both alike.
    """
    found = []
    generate(model, prompts[:1], new_tokens, None)  # what happens once only is not counted
    for exit_ in exits:
        generate(model, prompts[:1], new_tokens, exit_)
        counter = _Counter(model, exit_)
        plain_seconds, drafted_seconds = [], []
        equal = tokens = 0
        for prompt in prompts.split(1):
            start = time.perf_counter()
            plain = generate(model, prompt, new_tokens, None)
            middle = time.perf_counter()
            with counter:
                drafted = generate(model, prompt, new_tokens, exit_)
            plain_seconds.append(middle - start)
            drafted_seconds.append(time.perf_counter() - middle)
            equal += torch.equal(plain, drafted)
            tokens += drafted.shape[1] - prompt.shape[1]
        found.append(
            Drafted(
                exit=exit_,
                prompts=len(prompts),
                tokens=tokens,
                drafted=counter.drafts,
                accepted=tokens - counter.checks,
                checks=counter.checks,
                equal=equal / len(prompts),
                plain_seconds=tuple(plain_seconds),
                drafted_seconds=tuple(drafted_seconds),
            )
        )
    return found


@torch.no_grad()
def generate(model: "PreTrainedModel", prompt: Tensor, new_tokens: int, exit_: int | None) -> Tensor:
    """The prompt and `new_tokens` greedy tokens after it, fewer if the text ends.

    No token is named for padding: drafts would take it for padding wherever it stands in the text.
    """
    drafting = {} if exit_ is None else {"assistant_early_exit": exit_}
    out: Tensor = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        **drafting,
    )
    return out


class _Counter:
    """Within the context, counts forwards of `model`: drafts stop after `exit_` blocks, checks do not."""

    def __init__(self, model: "PreTrainedModel", exit_: int) -> None:
        self.drafts = self.checks = 0
        self._model, self._exit = model, exit_
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        def count(module: Any, args: Any) -> None:
            if self._model.config.num_hidden_layers == self._exit:
                self.drafts += 1
            else:
                self.checks += 1

        self._hooks.append(self._model.register_forward_pre_hook(count))

    def __exit__(self, *error: object) -> None:
        self._hooks.pop().remove()
