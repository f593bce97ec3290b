"""How far the student is from its teacher on text that nobody learned from, before the training and after it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmpare.compress import devices
from llmpare.compress.checkpoint.tensors import DTYPES
from llmpare.compress.clock import Clock
from llmpare.compress.errors import MemoryLimitError
from llmpare.compress.estimate import batch_tokens
from llmpare.compress.evaluate import compare, fidelity
from llmpare.compress.evaluate.models import Subject
from llmpare.compress.evaluate.run import NAMES
from llmpare.compress.evaluate.stream import Reader, Setup, read
from llmpare.compress.formats.decoded import DenseSource, open_dense
from llmpare.compress.progress import Progress
from llmpare.compress.texts import Texts


@dataclass(frozen=True)
class Measured:
    """`fidelity` sections of the report: the student as it came, and as it is now, both against the teacher."""

    before: dict[str, Any]
    after: dict[str, Any]
    fallbacks: list[dict[str, str]]


def measure(
    teacher: DenseSource, student: DenseSource, made: Path, texts: Texts, dtype: str, device: torch.device,
    trust: bool, clock: Clock, progress: Progress,
) -> Measured:  # fmt: skip
    """Both fidelities. student: as it came. made: the folder of what it has become. dtype: as --dtype has it."""
    named = NAMES[dtype] if dtype != "auto" else Subject("", "", teacher, None).dtype
    ids = torch.from_numpy(texts.evaluation.ids)
    setup = Setup(DTYPES[named], device, max(1, batch_tokens(device.type) // ids.shape[1]), trust, clock, progress)
    fallbacks: list[dict[str, str]] = []

    def reader(source: DenseSource, name: str) -> Reader:
        progress.phase(f"reading with {name}")
        found, fallback = devices.fitting(
            lambda batch: read(source, ids, replace(setup, batch=batch)),
            setup.batch,
            progress,
            lambda batch, error: MemoryLimitError(
                f"the device ran out of memory measuring {name} with {batch} windows at a time: {error}",
                "the same command goes on there, with fewer --eval-nsamples or --device cpu",
            ),
        )
        fallbacks.extend([fallback] if fallback else [])
        return found

    dense = reader(teacher, "the teacher")

    def section(source: DenseSource, name: str) -> dict[str, Any]:
        other = reader(source, name)
        with clock.phase("score"):
            scores = compare.scores(dense, other, ids, device)
        return fidelity.summarise([scores], str(DTYPES[named]).removeprefix("torch."))

    before = section(student, "the student before")
    with open_dense(made) as source:
        return Measured(before, section(source, "the student now"), fallbacks)
