"""Early exits: a student whose first blocks can already speak, to draft what all of them then check.

LayerSkip (Elhoushi et al., 2024, arXiv:2404.16710): while it trains, blocks are left out for single windows, the more
often the deeper they lie,

    p(l) = p_max · (exp(l · ln 2 / (L − 1)) − 1),   l = 0 … L − 1

and what enters block k goes through the model's own final norm and head as well, with a loss of its own for every
exit k. The output is an ordinary model: transformers drafts with its first k blocks when it is asked for
`generate(assistant_early_exit=k)`, by running the model as if config.num_hidden_layers were k.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmpare.compress.distill.losses import Objective
from llmpare.compress.distill.targets import Batch, Outputs, Teacher
from llmpare.compress.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DROPOUT = 0.1  # of the last block: what LayerSkip takes for models that begin with trained weights
WEIGHT = 0.5  # of all exits together, beside the loss of the whole model: enough for exits, and it stays what it was


def rates(blocks: int, highest: float) -> list[float]:
    """How often each block is left out: 0 for the first, `highest` for the last."""
    return [highest * (math.exp(block * math.log(2) / max(blocks - 1, 1)) - 1) for block in range(blocks)]


class EarlyExit:
    """An Extension (see targets). exits: numbers of blocks after which the student can stop, 0 < k < its blocks.

    teacher, objective: what an exit learns from; the same as the whole model, so a cached teacher will do.
    """

    wants_layers = False  # it looks by itself: what transformers records of a block is from before it was left out

    def __init__(
        self,
        teacher: Teacher,
        objective: Objective,
        exits: Sequence[int],
        *,
        dropout: float = DROPOUT,
        weight: float = WEIGHT,
    ) -> None:
        self.exits = sorted(set(exits))
        self._teacher, self._objective, self._dropout = teacher, objective, dropout
        self._weight = weight / len(self.exits)
        self._hooks: list[Any] = []
        self._norms: list[nn.Module] = []
        self._entered: dict[int, Tensor] = {}

    def prepare(self, student: "PreTrainedModel") -> None:
        """See Extension. Raises UsageError for exits there cannot be, UnsupportedError for a model that has none."""
        blocks = require(student, self.exits)
        self._norms = _final_norms(student, blocks)
        for block, rate in zip(blocks, rates(len(blocks), self._dropout), strict=True):
            if rate > 0:
                self._hooks.append(block.register_forward_hook(_leaving_out(rate), with_kwargs=True))
        for exit_ in self.exits:
            self._hooks.append(blocks[exit_].register_forward_pre_hook(self._look(exit_), with_kwargs=True))

    def _look(self, exit_: int) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._entered[exit_] = _hidden(args, kwargs)

        return note

    def extra_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """See Extension: the objective at every exit."""
        total = outputs.hidden.new_zeros(())
        for exit_ in self.exits:
            hidden = self._entered.pop(exit_)
            for norm in self._norms:
                hidden = norm(hidden)
            total = total + self._teacher.loss(batch, batch.counting(hidden), outputs.head, self._objective)
        return self._weight * total

    def finish(self, student: "PreTrainedModel") -> None:
        """See Extension: no hook is left."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._entered.clear()


def require(student: "PreTrainedModel", exits: Sequence[int]) -> nn.ModuleList:
    """The student's blocks, if it can stop after each of `exits` of them. Raises UsageError, UnsupportedError."""
    count = student.config.num_hidden_layers
    wrong = [exit_ for exit_ in exits if not 0 < exit_ < count]
    if wrong:
        raise UsageError(
            f"--early-exit {wrong[0]}: the student has {count} blocks", f"--early-exit takes 1 to {count - 1}"
        )
    lists = [each for each in student.base_model.modules() if isinstance(each, nn.ModuleList) and len(each) == count]
    if not lists:
        raise _unsupported(student, f"it has no list of {count} blocks")
    blocks = max(lists, key=lambda each: sum(parameter.numel() for parameter in each.parameters()))
    if _blocks_run(student, blocks, exits[0]) != exits[0]:
        raise _unsupported(student, "it runs all its blocks, whatever config.num_hidden_layers says")
    return blocks


def _unsupported(student: nn.Module, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"transformers cannot stop a {type(student).__name__} early: {why}",
        "leave out --early-exit; Llama, Mistral, Qwen and models built like them can",
    )


@torch.no_grad()
def _blocks_run(student: "PreTrainedModel", blocks: nn.ModuleList, exit_: int) -> int:
    """How many blocks run when the config is changed as assistant_early_exit changes it."""
    ran: list[nn.Module] = []
    hooks = [block.register_forward_hook(lambda module, args, out: ran.append(module)) for block in blocks]
    try:
        with stopping_after(student, exit_):
            _glance(student)
    finally:
        for hook in hooks:
            hook.remove()
    return len(ran)


@contextmanager
def stopping_after(model: "PreTrainedModel", exit_: int) -> Iterator[None]:
    """Within the context the model runs its first `exit_` blocks, by what assistant_early_exit does to it."""
    before = model.config.num_hidden_layers
    model.config.num_hidden_layers = exit_
    try:
        yield
    finally:
        model.config.num_hidden_layers = before


def _final_norms(student: "PreTrainedModel", blocks: nn.ModuleList) -> list[nn.Module]:
    """What follows the last block within the model: each module that gets just what the one before it put out."""
    inside = {id(module) for module in blocks.modules()} - {id(blocks[-1])}
    found: list[nn.Module] = []
    last: list[Tensor] = []

    def follow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if module is blocks[-1]:
            last[:] = [_first(out)]
        elif last and args and args[0] is last[0] and isinstance(out, Tensor):
            found.append(module)
            last[:] = [out]

    modules = [module for module in student.base_model.modules() if id(module) not in inside]
    hooks = [module.register_forward_hook(follow, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            end = _glance(student).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    if not last or last[0] is not end:
        raise _unsupported(student, "what it does after its last block cannot be followed")
    return found


def _glance(student: "PreTrainedModel") -> Any:
    """A forward of two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=student.device)
    return student.base_model(input_ids=ids, use_cache=False)


def _leaving_out(rate: float) -> Any:
    """A hook that leaves a block out for each window with this probability: what entered comes out instead.

    Chosen by window and not for a batch: every parameter then has a gradient in every process of a parallel run.
    """

    def mix(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if not module.training:
            return None
        before, after = _hidden(args, kwargs), _first(out)
        stays = torch.rand(len(after), 1, 1, device=after.device) >= rate
        mixed = torch.where(stays, after, before)
        return mixed if isinstance(out, Tensor) else (mixed, *out[1:])

    return mix


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states [windows, tokens, width] that a block is called with."""
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def _first(out: Any) -> Tensor:
    """The hidden states that a block returns, alone or before other things."""
    found: Tensor = out if isinstance(out, Tensor) else out[0]
    return found
