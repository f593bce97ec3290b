"""From a request to what a training is made of: models, loss, extensions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmpare.compress.distill import lora, losses, output
from llmpare.compress.distill.hidden import HiddenLoss
from llmpare.compress.distill.losses import Divergence, Objective
from llmpare.compress.distill.plan import DistillPlan
from llmpare.compress.distill.pupil import Pupil
from llmpare.compress.distill.request import TEXT_ALONE, DistillRequest
from llmpare.compress.distill.targets import Extension, Teacher
from llmpare.compress.distill.teachers import LiveTeacher, TextAlone
from llmpare.compress.distill.train import Training
from llmpare.compress.errors import InputError
from llmpare.compress.evaluate.vocabulary import require_same
from llmpare.compress.formats.decoded import DenseSource
from llmpare.compress.model import whole
from llmpare.compress.tokenizer import load_tokenizer, tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def objective(request: DistillRequest) -> Objective:
    """What is minimised for a token."""
    named: dict[str, Divergence] = {
        "forward-kl": losses.forward_kl,
        "reverse-kl": losses.reverse_kl,
        "jsd": losses.jsd(request.beta),
        "total-variation": losses.total_variation,
        TEXT_ALONE: losses.forward_kl,  # has no share
    }
    share = 1.0 if request.loss == TEXT_ALONE else request.text_share
    return Objective(named[request.loss], request.temperature, share)


def training(plan: DistillPlan, device: torch.device) -> Training:
    """How to train on a kind of device."""
    request = plan.request
    return Training(
        steps=plan.pace.steps,
        windows=plan.pace.windows,
        micro=plan.pace.micro,
        rate=plan.rate,
        warmup=plan.warmup,
        seed=request.seed,
        save_steps=request.save_steps,
        half=device.type == "cuda" and request.dtype != "float32",
        recompute=request.recompute,
        cpu=device.type == "cpu",
    )


def pupil(plan: DistillPlan, teacher: DenseSource, student: DenseSource, device: torch.device) -> Pupil:
    """The student with its teacher, ready to learn; `finish` makes it a plain model again."""
    request = plan.request
    trust = request.trust_remote_code
    model = whole.load(student, torch.float32, device, trust=trust)
    output.check(model, student)
    guide: Teacher = TextAlone()
    extensions: list[Extension] = []
    if request.loss != TEXT_ALONE:
        dtype: torch.dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[
            plan.teacher_dtype(device.type)
        ]
        guide = live = LiveTeacher(whole.load(teacher, dtype, device, trust=trust))
        if request.hidden_loss is not None:
            extensions.append(HiddenLoss(request.hidden_loss, request.hidden_weight, live))
    if request.lora_rank is not None:
        extensions.append(lora.Lora(request.lora_rank))
    torch.manual_seed(request.seed)
    for extension in extensions:
        extension.prepare(model)
    return Pupil(model, guide, objective(request), extensions)


def finish(trained: Pupil) -> "PreTrainedModel":
    """The student, without anything that was added for the training."""
    for extension in reversed(trained.extensions):
        extension.finish(trained.student)
    return trained.student


def same_tokens(teacher: str, student: str, folders: Sequence[Path], trust: bool) -> None:
    """Raises InputError unless the tokenizers in both folders, if both have one, mean the same."""
    if all(tokenizer_files(folder) for folder in folders):
        first, second = (load_tokenizer(folder, trust_remote_code=trust) for folder in folders)
        try:
            require_same(first, second, teacher, student)
        except InputError as error:
            raise InputError(
                error.message,
                "a student learns token by token and needs its teacher's vocabulary: carve it from the teacher with "
                "--student-layers or --student-ffn, or take a teacher of its own family",
            ) from error
