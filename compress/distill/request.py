"""What `llmpare distill` is asked to do, as plain numbers and names: no torch."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpare.compress.distill import defaults
from llmpare.compress.errors import LlmpareError, UsageError
from llmpare.compress.prune.cut import Cut
from llmpare.compress.request import RunRequest, Scheme

LOSSES = ("forward-kl", "reverse-kl", "jsd", "total-variation", "cross-entropy")
HIDDEN_LOSSES = ("mse", "cosine")
TEXT_ALONE = "cross-entropy"


@dataclass(frozen=True)
class DistillRequest(RunRequest):
    """Everything `llmpare distill` needs to know. model: the teacher. calibration: the text to learn from.

    teacher_absent: there is nothing of the teacher but what cache_teacher holds; model is then the student.

    student, cut, student_config: one of the three: a checkpoint, what remains of the teacher, or the config.json of a
    new model. tokens: to learn from, repeating the text if it has fewer. batch_tokens, rate, warmup: of a step, the
    highest learning rate, steps in which it rises; None: see defaults. loss: one of LOSSES, with beta for jsd and a
    temperature. text_share: of the cross-entropy with the text, 0…1. hidden_loss: also compare the states between
    blocks, with this weight. lora_rank: train adapters of this rank and nothing else. recompute: less memory for
    more time. teacher_dtype: precision of the teacher. cache_teacher: where its predictions are kept and learned from,
    so that it is not in memory while the student learns. on_policy: share of the batches that the student ends itself.
    early_exit: numbers of blocks after which it can stop. student_scheme: how its linears are stored, and rounded while
    it learns; None: dense. save_steps: between checkpoints; None: by the clock.
    """

    student: str | None = None
    cut: Cut | None = None
    student_config: Path | None = None
    tokens: int = defaults.TOKENS
    batch_tokens: int | None = None
    rate: float | None = None
    warmup: int | None = None
    loss: str = LOSSES[0]
    beta: float = 0.5
    temperature: float = 1.0
    text_share: float = 0.0
    hidden_loss: str | None = None
    hidden_weight: float = 1.0
    lora_rank: int | None = None
    recompute: bool = False
    teacher_dtype: str = "auto"
    cache_teacher: Path | None = None
    teacher_absent: bool = False
    on_policy: float = 0.0
    early_exit: tuple[int, ...] = ()
    student_scheme: Scheme | None = None
    format: str = "compressed-tensors"  # of student_scheme
    save_steps: int | None = None

    def __post_init__(self) -> None:
        given = [self.student, self.cut, self.student_config]
        if sum(each is not None for each in given) != 1:
            several = "several say" if any(each is not None for each in given) else "nothing says"
            raise UsageError(
                f"{several} what the student is",
                "give a checkpoint with --student, or --student-layers, --student-ffn, … to carve one from the "
                "teacher, or --student-config for a new one",
            )
        if self.loss not in LOSSES:
            raise UsageError(f"unknown loss {self.loss!r}", f"--loss takes {', '.join(LOSSES)}")
        if self.hidden_loss not in (None, *HIDDEN_LOSSES):
            raise UsageError(f"unknown loss {self.hidden_loss!r}", f"--hidden-loss takes {', '.join(HIDDEN_LOSSES)}")
        if self.hidden_loss is not None and self.loss == TEXT_ALONE:
            raise UsageError("--hidden-loss compares with a teacher, --loss cross-entropy does without", "drop one")
        if self.teacher_absent and (self.cache_teacher is None or self.student != self.model):
            raise UsageError(
                "without --teacher there has to be a --student, and a cache to learn from",
                "give --cache-teacher with the folder that a run with --teacher has made",
            )
        if self.student_scheme is not None and self.format == "dense":
            raise UsageError(
                "--format dense keeps no codes, and --student-scheme trains for them",
                "use --format compressed-tensors or gptq",
            )
        if self.student_scheme is not None and self.lora_rank is not None:
            raise UsageError("--lora-rank and --student-scheme both replace the student's linears", "drop one")
        if self.cache_teacher is not None:
            self._refuse_with_cache()
        if not 0 <= self.on_policy <= 1:
            raise UsageError(f"--on-policy {self.on_policy:g} is not between 0 and 1", "0.25 is a quarter of the text")
        if not 0 < self.beta < 1:
            raise UsageError(f"--beta {self.beta:g} is not between 0 and 1", "0.5 treats both models alike")
        if not 0 <= self.text_share <= 1:
            raise UsageError(f"--text-share {self.text_share:g} is not between 0 and 1", "0 learns from the teacher")
        for flag, value in (("--lr", self.rate), ("--temperature", self.temperature)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{flag} must be more than 0, not {value:g}")

    def _refuse_with_cache(self) -> None:
        others = {
            "--on-policy": self.on_policy > 0,
            "--hidden-loss": self.hidden_loss is not None,
            "--temperature": self.temperature != 1,
            "--loss cross-entropy": self.loss == TEXT_ALONE,
        }
        for flag, given in others.items():
            if given:
                raise UsageError(
                    f"{flag} cannot be had with --cache-teacher, which keeps what the teacher says of given text at "
                    "temperature 1",
                    "drop one of the two",
                )

    @property
    def healing(self) -> bool:
        """Whether the student begins with weights that are worth something."""
        return self.student_config is None

    def spec(self) -> dict[str, Any]:
        """See RunRequest. When checkpoints are written decides nothing; files are known by their digests."""
        fields = super().spec()
        for name in ("student", "student_config", "save_steps", "cache_teacher", "teacher_absent"):
            del fields[name]
        return {**fields, "cached_teacher": self.cache_teacher is not None}


@contextmanager
def carving_flags() -> Iterator[None]:
    """Within the context, errors of prune name the flags that distill has for it."""
    try:
        yield
    except LlmpareError as error:
        error.message, error.hint = (_renamed(text) for text in (error.message, error.hint))
        error.args = (error.message,)
        raise


def _renamed(text: str) -> str:
    text = re.sub(r"--(?=(ffn|heads|hidden|layers)(?![\w-]))", "--student-", text)
    return text.replace("--drop-layers", "llmpare prune --drop-layers")
