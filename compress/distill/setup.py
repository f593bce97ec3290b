"""From a request to what a training is made of: models, loss, extensions."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llmpare.compress import hardware
from llmpare.compress.activations import windows_at_once
from llmpare.compress.checkpoint.tensors import DTYPES
from llmpare.compress.clock import Clock
from llmpare.compress.distill import cache, lora, losses, output, rounding
from llmpare.compress.distill.cached import CachedTeacher
from llmpare.compress.distill.early_exit import EarlyExit
from llmpare.compress.distill.hidden import HiddenLoss
from llmpare.compress.distill.losses import Divergence, Objective
from llmpare.compress.distill.on_policy import OnPolicy
from llmpare.compress.distill.plan import DistillPlan
from llmpare.compress.distill.pupil import Pupil
from llmpare.compress.distill.qat import Rounding
from llmpare.compress.distill.request import TEXT_ALONE, DistillRequest
from llmpare.compress.distill.targets import Extension, Teacher
from llmpare.compress.distill.teachers import LiveTeacher, TextAlone
from llmpare.compress.distill.train import Training
from llmpare.compress.errors import InputError
from llmpare.compress.evaluate.stream import Setup
from llmpare.compress.evaluate.vocabulary import require_same
from llmpare.compress.formats.decoded import DenseSource, open_dense
from llmpare.compress.model import whole
from llmpare.compress.progress import Progress
from llmpare.compress.tokenizer import load_tokenizer, tokenizer_files


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


def pupil(plan: DistillPlan, teacher: DenseSource, student: DenseSource, ids: Tensor, device: torch.device) -> Pupil:
    """The student with its teacher, ready to learn from windows `ids`; `finish` makes it a plain model again."""
    request = plan.request
    trust = request.trust_remote_code
    model = whole.load(student, torch.float32, device, trust=trust)
    output.check(model, student)
    guide: Teacher = TextAlone()
    extensions: list[Extension] = []
    if request.cache_teacher is not None:
        guide = CachedTeacher.open(request.cache_teacher, ids, vocabulary=plan.student.vocabulary, device=device)
    elif request.loss != TEXT_ALONE:
        guide = live = LiveTeacher(whole.load(teacher, DTYPES[_teacher_dtype(plan, device)], device, trust=trust))
        if request.hidden_loss is not None:
            extensions.append(HiddenLoss(request.hidden_loss, request.hidden_weight, live))
    if request.student_scheme is not None:
        extensions.append(rounding.begin(request, student))
    if request.lora_rank is not None:
        extensions.append(lora.Lora(request.lora_rank))
    loss = objective(request)
    if request.early_exit:
        extensions.append(EarlyExit(guide, loss, request.early_exit))
    rewrite = OnPolicy(request.on_policy) if request.on_policy else None
    torch.manual_seed(request.seed)
    for extension in extensions:
        extension.prepare(model)
    return Pupil(model, guide, loss, extensions, rewrite)


def cache_teacher(plan: DistillPlan, ids: Tensor, device: torch.device, clock: Clock, progress: Progress) -> None:
    """Makes the cache of the teacher's predictions for windows of text `ids`, if one is asked for and not there yet."""
    request, folder = plan.request, plan.teacher.folder
    if request.cache_teacher is None or request.teacher_absent:
        return
    assert folder is not None
    with open_dense(folder) as source:
        batch = windows_at_once(source, plan.seqlen, device.type)
    how = Setup(DTYPES[_teacher_dtype(plan, device)], device, batch, request.trust_remote_code, clock, progress)
    shared = min(plan.teacher.vocabulary, plan.student.vocabulary)
    cache.build(folder, ids, request.cache_teacher, how, vocabulary=shared, restart=request.restart)


def _teacher_dtype(plan: DistillPlan, device: torch.device) -> str:
    """The teacher's precision, as safetensors spells it."""
    return hardware.DTYPES[plan.teacher_dtype(device.type)]


def write(trained: Pupil, source: DenseSource, folder: Path, request: DistillRequest) -> dict[str, str]:
    """Writes the student without anything that was added for the training. Returns the sha256 of every tensor.

    source: the student as it came.
    """
    for extension in reversed(trained.extensions):
        extension.finish(trained.student)
    for extension in trained.extensions:
        if isinstance(extension, Rounding):
            return rounding.write(folder, trained.student, source, request, extension)
    return output.write(folder, trained.student, source)


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
