"""What a distillation works from: its texts, and the digests that tell whether it is still the same."""

import hashlib
from dataclasses import asdict, replace
from typing import Any

from llmpare.compress import calibration
from llmpare.compress.checkpoint.files import read_file
from llmpare.compress.checkpoint.read import CONFIG, MAX_CONFIG
from llmpare.compress.distill.cache import read_identity
from llmpare.compress.distill.plan import DistillPlan
from llmpare.compress.evaluate.models import digest
from llmpare.compress.formats.decoded import DenseSource, open_dense
from llmpare.compress.texts import Texts
from llmpare.compress.tokenizer import load_tokenizer

REPEATS = 4  # times that a text teaches almost as well as a new one. Muennighoff et al. 2023


def read_texts(plan: DistillPlan) -> Texts:
    """The text to learn from, as many windows as the run has use for, and the one to be judged by.

    Raises InputError for a tokenizer or a text that cannot be used, and for one too short for a single window.
    """
    request, sides = plan.request, (plan.teacher, plan.student)
    assert plan.teacher.folder is not None
    tokenizer = load_tokenizer(plan.teacher.folder, trust_remote_code=request.trust_remote_code)
    limits: dict[str, Any] = {
        "vocab_size": min(side.vocabulary for side in sides),
        "max_length": min(side.longest for side in sides),
    }
    learned = calibration.load(
        replace(request.calibration, seqlen=plan.seqlen),
        tokenizer,
        part="calibration",
        most=plan.pace.steps * plan.pace.windows,
        learning=True,
        **limits,
    )
    watched = calibration.load(replace(request.evaluation, seqlen=plan.seqlen), tokenizer, part="evaluation", **limits)
    return Texts(learned, watched, calibration.overlap(learned, watched))


def warnings(plan: DistillPlan, texts: Texts) -> list[str]:
    """What makes a training with these texts less than it seems."""
    assert texts.calibration is not None
    tokens = texts.calibration.ids.size
    found = []
    if plan.request.teacher_absent:
        found.append("the teacher is not at hand: all figures compare with the student as it came")
    found += [*plan.warnings, *replace(texts, calibration=None).warnings()]
    if plan.tokens > REPEATS * tokens:
        times = f"{plan.tokens / tokens:.0f} times"
        found.append(f"the text has {tokens:,} tokens and is read {times}: more text would teach more")
    return found


def spec(plan: DistillPlan, teacher: DenseSource, texts: Texts) -> dict[str, Any]:
    """What decides the bytes of the output, as far as it is known before the weights are read."""
    request = plan.request
    student: dict[str, Any] | None = None
    if plan.student.folder is not None:
        with open_dense(plan.student.folder) as source:
            student = {**_identity(source), "weights_sha256": digest(source)}  # it is what the training begins with
    elif request.student_config is not None:
        data = bytes(read_file(request.student_config, limit=MAX_CONFIG))
        student = {"config_sha256": hashlib.sha256(data).hexdigest()}
    kept = None
    if request.teacher_absent:
        assert request.cache_teacher is not None
        kept = asdict(read_identity(request.cache_teacher))
    return {
        "request": request.spec(),
        "cache": kept,
        "teacher": _identity(teacher),
        "student": student,
        "training": {"steps": plan.pace.steps, "windows_per_step": plan.pace.windows},
        "text": texts.spec(),
    }


def _identity(source: DenseSource) -> dict[str, Any]:
    config = bytes(read_file(source.folder / CONFIG, limit=MAX_CONFIG))
    headers = repr(list(source.checkpoint.tensors.values())).encode()
    return {
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "headers_sha256": hashlib.sha256(headers).hexdigest(),
        "files_sha256": source.checkpoint.file_digests(),
    }
