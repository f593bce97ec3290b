"""What goes on around the steps of a training: progress, checkpoints, signals, and stopping when numbers break."""

import math
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmpare.compress.distill import defaults
from llmpare.compress.distill.pupil import Diverged, Pupil
from llmpare.compress.progress import Progress

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stops:
    """Within the context, a signal that would end the process is kept until the context ends; a second one is not.

    asked: its number, 0 if there was none. Other threads than the main one get no signals, and keep none.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            wanted = [each for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
            self._before = {each: signal.signal(each, self._keep) for each in wanted}
        return self

    def _keep(self, signum: int, frame: FrameType | None) -> None:
        self.asked = signum
        self._restore()

    def _restore(self) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self.asked and kind is None:
            signal.raise_signal(self.asked)


class Watch(TrainerCallback):
    """See the module. saved(name): called in the first process when the checkpoint of that name is complete.

    tokens: of a step. save_steps: between checkpoints; None: by the clock.
    """

    def __init__(
        self,
        pupil: Pupil,
        stops: Stops,
        progress: Progress,
        tokens: int,
        save_steps: int | None,
        saved: Callable[[str], None],
    ) -> None:
        self.step = 0
        self._pupil, self._stops, self._progress = pupil, stops, progress
        self._tokens, self._save_steps, self._saved = tokens, save_steps, saved
        self._first, self._begun, self._last_save = 0, 0.0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._first = state.global_step
        self._begun = self._last_save = time.monotonic()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step = state.global_step + 1
        self._pupil.done = state.global_step / state.max_steps

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not _finite(kwargs["model"], of_gradients=True):
            raise Diverged("the gradient is not finite")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        asked, due = _agreed(args, self._stops.asked, self._due(state.global_step))
        self._stops.asked = asked
        if asked or (due and state.global_step < state.max_steps):
            if not _finite(kwargs["model"], of_gradients=False):
                raise Diverged("a weight is not finite")
            control.should_save = True
        if asked:
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()  # every process has written its part
        if state.is_world_process_zero:
            self._saved(f"checkpoint-{state.global_step}")
        self._last_save = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        each = (time.monotonic() - self._begun) / max(1, state.global_step - self._first)
        facts = {"loss": logs["loss"], "tokens_per_second": self._tokens / each if each else math.inf}
        self._progress.step(state.global_step, state.max_steps, each * (state.max_steps - state.global_step), facts)

    def _due(self, step: int) -> bool:
        if self._save_steps is not None:
            return step % self._save_steps == 0
        return time.monotonic() - self._last_save >= defaults.SAVE_SECONDS


def _finite(model: nn.Module, *, of_gradients: bool) -> bool:
    """Whether all that is trained is made of numbers, or its gradients are."""
    trained = (each for each in model.parameters() if each.requires_grad)
    tensors = [each.grad if of_gradients else each for each in trained]
    parts = (each.to_local() if isinstance(each, DTensor) else each for each in tensors if each is not None)
    found = [each.detach().isfinite().all() for each in parts]
    return bool(torch.stack(found).all())


def _agreed(args: TrainingArguments, asked: int, due: bool) -> tuple[int, bool]:
    """What all processes do together if one of them was asked to stop, or finds that a checkpoint is due."""
    if args.world_size == 1:
        return asked, due
    flags = torch.tensor([asked, int(due)], device=args.device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return int(flags[0]), bool(flags[1])
