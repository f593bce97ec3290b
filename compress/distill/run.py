"""One distillation, from a request to a published output.

Whatever can be refused is refused before the first step: models, tokenizers, texts, memory. With several processes,
the first alone writes; the others train along and return nothing.
"""

import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from llmpare.compress import devices
from llmpare.compress.calibration import Windows
from llmpare.compress.checkpoint import publish
from llmpare.compress.checkpoint.journal import Journal
from llmpare.compress.clock import Clock
from llmpare.compress.distill import inputs, lora, measure, output, rounding, scratch, setup
from llmpare.compress.distill import report as reporting
from llmpare.compress.distill.launch import Processes
from llmpare.compress.distill.lessons import Lessons
from llmpare.compress.distill.plan import DistillPlan, carve_request, carved_folder, check_room, plan_distill
from llmpare.compress.distill.request import DistillRequest, carving_flags
from llmpare.compress.distill.train import train
from llmpare.compress.evaluate.models import digest
from llmpare.compress.formats.decoded import DenseSource, open_dense
from llmpare.compress.progress import Progress, Silent
from llmpare.compress.report import files
from llmpare.compress.run import run_prune, run_quantize, verified
from llmpare.compress.texts import Texts
from llmpare.compress.version import VERSION

CHECKPOINTS = "training"  # the folder of Trainer's checkpoints in the unfinished output
STUDENT, CHECKPOINT, TRAINED, MEASURED = "student", "checkpoint", "trained", "measured"  # units of the journal


@dataclass(frozen=True)
class Job:
    """What all steps of a run share. folder: where the output takes shape. progress: of the first process."""

    plan: DistillPlan
    teacher: DenseSource
    texts: Texts
    processes: Processes
    folder: Path
    clock: Clock
    progress: Progress


def run_distill(request: DistillRequest, progress: Progress) -> dict[str, Any] | None:
    """Trains a student and returns the report that lies beside it; None in every process but the first.

    A finished output of the same request is verified and its report returned. Raises LlmpareError, leaving either
    nothing or an unfinished output that the same command takes up again.
    """
    transformers.logging.set_verbosity_error()
    progress.phase("planning")
    if request.lora_rank is not None:
        lora.require()
    processes = Processes(request.device)
    if not processes.first:
        progress = Silent()
    device = processes.device
    plan = plan_distill(request, device=device.type, processes=processes.count)
    clock = devices.clock(device)
    with ExitStack() as stack:
        assert plan.teacher.folder is not None
        teacher = stack.enter_context(open_dense(plan.teacher.folder))
        if plan.student.folder is not None:
            folders = (plan.teacher.folder, plan.student.folder)
            setup.same_tokens(request.model, plan.student.name, folders, request.trust_remote_code)
        with clock.phase("text"):
            texts = inputs.read_texts(plan)
        for warning in inputs.warnings(plan, texts):
            progress.warn(warning)
        job = Job(plan, teacher, texts, processes, _partial(request.out), clock, progress)
        spec = inputs.spec(plan, teacher, texts)
        if not processes.first:
            _learn(job, None, **processes.told(None))
            return None
        if publish.finished(request.out, spec):
            processes.told({"folder": None, "resume": None})
            progress.phase("already complete, verifying")
            return verified(request, digest(teacher))
        check_room(plan, devices.room(device))
        with publish.Workspace(request.out, force=request.force, restart=request.restart, spec=spec) as workspace:
            for message in workspace.messages:
                progress.warn(message)
            manifest = workspace.pending(spec)
            if manifest is None:
                manifest = _produce(job, spec, workspace)
            else:
                processes.told({"folder": None, "resume": None})
            workspace.publish(manifest)
    return files.read(request.out)


def _produce(job: Job, spec: dict[str, Any], workspace: publish.Workspace) -> dict[str, Any]:
    """Fills the workspace and returns its manifest."""
    versions = {"llmpare": VERSION, "torch": torch.__version__, "transformers": transformers.__version__}
    with Journal(workspace.journal, {**spec, "versions": versions, "device": job.processes.device.type}) as journal:
        if MEASURED in journal.done:
            job.processes.told({"folder": None, "resume": None})
        else:
            report = _measure(job, _train(job, journal), journal.done[TRAINED])
            files.write(job.folder, report)
            journal.append(MEASURED, {"weights_sha256": report["source"]["weights_sha256"]})
        for made in (carved_folder(job.plan.request.out), rounding.folder(job.plan.request.out)):
            shutil.rmtree(made, ignore_errors=True)
        done = journal.done
    return publish.build_manifest(
        job.folder,
        spec=spec,
        source=done[MEASURED],
        versions=versions,
        tensors=done[TRAINED]["digests"],
        unhashed=files.REPORTS,
    )


def _train(job: Job, journal: Journal) -> Path:
    """Trains the student, or what is left of that. Returns the folder of the student as it was before."""
    place = _student(job, journal)
    if TRAINED in journal.done:
        job.processes.told({"folder": None, "resume": None})
    else:
        if job.plan.request.student_scheme is not None:
            job.progress.phase("quantizing the student")
            with job.clock.phase("quantize"):
                run_quantize(rounding.quantize_request(job.plan.request, place), job.progress)
        ids = torch.from_numpy(_learned(job).ids)
        setup.cache_teacher(job.plan, ids, job.processes.device, job.clock, job.progress)
        last = journal.done.get(CHECKPOINT)
        order = {"folder": str(place), "resume": last["name"] if last else None}
        _learn(job, journal, **job.processes.told(order))
    shutil.rmtree(job.folder / CHECKPOINTS, ignore_errors=True)
    return place


def _measure(job: Job, place: Path, trained: dict[str, Any]) -> dict[str, Any]:
    """The report on the trained student. place: of the student as it was before. trained: what the journal says."""
    request, processes = job.plan.request, job.processes
    with open_dense(place) as student:
        found = measure.measure(
            job.teacher, student, job.folder,
            None if request.student_scheme is None else rounding.folder(request.out),
            job.texts, request.dtype, processes.device,
            request.trust_remote_code, job.clock, job.progress,
        )  # fmt: skip
        exits = measure.early_exits(job.plan, job.folder, job.texts, processes.device, job.clock, job.progress)
        if exits:
            output.set_generation(job.folder, exits[0]["generation_config"])
        return reporting.describe(
            job.plan, job.teacher, student, job.folder, job.texts, trained, found, exits, processes, job.clock
        )


def _student(job: Job, journal: Journal) -> Path:
    """The folder of the student as it is before the training; made first, if it has to be."""
    plan, request = job.plan, job.plan.request
    if plan.student.folder is not None:
        return plan.student.folder
    place = carved_folder(request.out)
    if STUDENT not in journal.done:
        if plan.carve is not None:
            job.progress.phase("carving the student")
            with job.clock.phase("carve"), carving_flags():
                run_prune(carve_request(request), job.progress)
        else:
            assert request.student_config is not None
            shutil.rmtree(place, ignore_errors=True)
            scratch.create(request.student_config, place, job.teacher, request.seed, request.trust_remote_code)
        journal.append(STUDENT, {"folder": place.name})
    return place


def _learn(job: Job, journal: Journal | None, folder: str | None, resume: str | None) -> None:
    """The training, in this process; the first, which has the journal, writes the student when it is done.

    folder: of the student; None if there is nothing to be trained any more. resume: the checkpoint to go on from.
    """
    if folder is None:
        return
    plan, progress, clock = job.plan, job.progress, job.clock
    place = job.folder / CHECKPOINTS
    if journal is not None:
        _keep_only(place, resume)
    begun, before = time.monotonic(), 0.0

    def spent() -> float:
        return before + time.monotonic() - begun

    def saved(name: str) -> None:
        if journal is not None:
            journal.append(CHECKPOINT, {"name": name, "seconds": spent()})

    with open_dense(Path(folder)) as source:
        progress.phase("loading")
        with clock.phase("load"):
            ids, skipped = _learned(job).ids, _learned(job).skipped
            pupil = setup.pupil(plan, job.teacher, source, torch.from_numpy(ids), job.processes.device)
        lessons = Lessons(ids, plan.pace.steps * plan.pace.windows, plan.request.seed, skipped)
        progress.phase("distilling" if resume is None else f"distilling, from {resume}")
        begun = time.monotonic()
        if journal is not None and resume is not None:
            before = journal.done[CHECKPOINT]["seconds"]
        with clock.phase("train"):
            trained = train(pupil, lessons, setup.training(plan, job.processes.device), place, progress, saved, resume)
        if journal is not None:
            progress.phase("writing")
            if trained.gathered is not None:
                pupil = setup.pupil(plan, job.teacher, source, torch.from_numpy(ids), torch.device("cpu"))
                pupil.load_state_dict(trained.gathered, strict=False)
            digests = setup.write(pupil, source, job.folder, plan.request)
            journal.append(TRAINED, {"digests": digests, "curve": trained.curve, "seconds": spent()})


def _learned(job: Job) -> Windows:
    """The text that is learned from."""
    assert job.texts.calibration is not None
    return job.texts.calibration


def _keep_only(place: Path, checkpoint: str | None) -> None:
    """Removes checkpoints that a killed run did not finish, or has not come to remove."""
    place.mkdir(exist_ok=True)
    for name in os.listdir(place):
        if name != checkpoint:
            shutil.rmtree(place / name)


def _partial(out: Path) -> Path:
    return out.parent / f"{out.name}.partial"
