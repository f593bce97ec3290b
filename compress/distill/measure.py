"""How far the student is from its teacher on text that nobody learned from, before the training and after it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmpare.compress import devices, hardware
from llmpare.compress.activations import windows_at_once
from llmpare.compress.checkpoint.tensors import DTYPES
from llmpare.compress.clock import Clock
from llmpare.compress.distill import confidence, drafting
from llmpare.compress.distill.plan import DistillPlan
from llmpare.compress.errors import MemoryLimitError
from llmpare.compress.evaluate import compare, fidelity
from llmpare.compress.evaluate.models import Subject
from llmpare.compress.evaluate.stream import Reader, Setup, read
from llmpare.compress.formats.decoded import DenseSource, open_dense
from llmpare.compress.model import whole
from llmpare.compress.progress import Progress
from llmpare.compress.texts import Texts

PROMPTS = 8  # that early exits are timed on


@dataclass(frozen=True)
class Measured:
    """`fidelity` sections of the report, against the teacher: the student as it came, and as it is now.

    rounded: as post-training quantization makes it, if the training was for codes.
    """

    before: dict[str, Any]
    after: dict[str, Any]
    rounded: dict[str, Any] | None
    fallbacks: list[dict[str, str]]


def early_exits(
    plan: DistillPlan, made: Path, texts: Texts, device: torch.device, clock: Clock, progress: Progress
) -> list[dict[str, Any]]:
    """What each early exit is worth, in the order of the request, with the settings of generation that it is worth it
    with, the same for all. made: the folder of the trained student."""
    request = plan.request
    if not request.early_exit:
        return []
    progress.phase("drafting with early exits")
    half = plan.seqlen // 2
    ids = torch.from_numpy(texts.evaluation.ids[:PROMPTS, :half]).to(device)
    with clock.phase("draft"), open_dense(made) as source:
        dtype = DTYPES[hardware.DTYPES[plan.teacher_dtype(device.type)]]  # half precision is slow on processors
        model = whole.load(source, dtype, device, trust=request.trust_remote_code)
        written = [drafting.generate(model, prompt, half, None) for prompt in ids.split(1)]
        settings = confidence.settings(model, written, half, request.early_exit)
        model.generation_config.update(**settings)
        found = drafting.measure(model, ids, request.early_exit, half)
    return [{**each.to_json(), "generation_config": settings} for each in found]


def measure(
    teacher: DenseSource, student: DenseSource, made: Path, rounded: Path | None, texts: Texts, dtype: str,
    device: torch.device, trust: bool, clock: Clock, progress: Progress,
) -> Measured:  # fmt: skip
    """Both fidelities. student: as it came. made: the folder of what it has become; rounded: of
    what quantization alone made of it. dtype: as --dtype has it."""
    named = hardware.forward_dtype(dtype, Subject("", "", teacher, None).dtype, device.type)
    ids = torch.from_numpy(texts.evaluation.ids)
    batch = min(windows_at_once(source, ids.shape[1], device.type) for source in (teacher, student))
    setup = Setup(DTYPES[named], device, batch, trust, clock, progress)
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

    before, quantized = section(student, "the student before"), None
    if rounded is not None:
        with open_dense(rounded) as source:
            quantized = section(source, "the student quantized without training")
    with open_dense(made) as source:
        return Measured(before, section(source, "the student now"), quantized, fallbacks)
