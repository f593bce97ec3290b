"""One run, from a request to a published output: what surrounds the engine's loop, whatever the command.

The order is chosen so that whatever can go wrong goes wrong early: plan and texts before the first byte is written,
the report and the read-back before the output gets its name.

A command is a plan (planning.Plan: fates, sizes, the output's config, its own sections of the report), a treatment
(engine.Treatment: what happens to a block's tensors) and, where headers are not enough, a survey that looks at the
model before the first block is treated. A treatment gets two models that run block by block: the dense one and the
output's. They are one and the same object unless the plan says that the output has other shapes or fewer blocks
(Plan.reshaped, Plan.place_of); the compressed stream always runs through the output's.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor

from llmpare.compress import devices, memory
from llmpare.compress.checkpoint import publish
from llmpare.compress.checkpoint.journal import Journal
from llmpare.compress.checkpoint.read import CONFIG, DENSE, Checkpoint
from llmpare.compress.checkpoint.tensors import DTYPES
from llmpare.compress.checkpoint.write import CheckpointWriter
from llmpare.compress.command import Command
from llmpare.compress.engine import OUTSIDE, Pass, Streams
from llmpare.compress.errors import InputError, MemoryLimitError, UnsupportedError
from llmpare.compress.evaluate import fidelity
from llmpare.compress.formats.source import open_source
from llmpare.compress.model.models import Model, Models, Sketch
from llmpare.compress.model.replay import Replay
from llmpare.compress.model.skeleton import Skeleton
from llmpare.compress.outcome import Done, Job, config_digest, describe, weights_digest
from llmpare.compress.plan import Plan, plan_quantize, within_room
from llmpare.compress.progress import Progress
from llmpare.compress.prune.cut import ShrinkRequest
from llmpare.compress.prune.masking import MASKS
from llmpare.compress.prune.request import MaskRequest, PruneRequest
from llmpare.compress.prune.structured import SHRINK
from llmpare.compress.quantize.block import QuantizeBlocks
from llmpare.compress.report import build, files, gates
from llmpare.compress.request import QuantizeRequest, RunRequest
from llmpare.compress.spill import Batches, Spill
from llmpare.compress.streams import Stream
from llmpare.compress.texts import Texts, read_texts
from llmpare.compress.version import VERSION
from llmpare.compress.walk import BrokenWeights, Walk

SURVEY = "survey"  # the journal's name for what a command learned from the model before the first block
_Found = TypeVar("_Found")


QUANTIZE = Command("quantize", plan_quantize, QuantizeBlocks)
_PRUNING: dict[type[PruneRequest], Command] = {MaskRequest: MASKS, ShrinkRequest: SHRINK}


def run_quantize(request: QuantizeRequest, progress: Progress) -> dict[str, Any]:
    """Quantizes a checkpoint: see `run`."""
    return run(QUANTIZE, request, progress)


def run_prune(request: PruneRequest, progress: Progress) -> dict[str, Any]:
    """Prunes a checkpoint: see `run`."""
    return run(_PRUNING[type(request)], request, progress)


def run(command: Command, request: RunRequest, progress: Progress) -> dict[str, Any]:
    """Makes a checkpoint and returns the report that lies beside it.

    A finished output of the same request is verified and its report returned. Raises LlmpareError, leaving either
    nothing or an unfinished output that the same command takes up again.
    """
    transformers.logging.set_verbosity_error()
    progress.phase("planning")
    device = devices.find(request.device)
    plan = command.plan(request, device.type)
    clock = devices.clock(device)
    with clock.phase("text"):
        texts = read_texts(plan)
    for warning in (*plan.warnings, *texts.warnings()):
        progress.warn(warning)
    with open_source(plan.model) as source:
        spec = _spec(plan, source, texts)
        if publish.finished(request.out, spec):
            progress.phase("already complete, verifying")
            return _existing(plan, source)
        plan = within_room(plan, devices.room(device))
        devices.limit(device, request.max_memory)
        if plan.needs.way.ready:
            memory.keep_ready()
        else:
            memory.keep_lean()
        with publish.Workspace(request.out, force=request.force, restart=request.restart, spec=spec) as workspace:
            for message in workspace.messages:
                progress.warn(message)
            manifest = workspace.pending(spec)
            if manifest is None:
                job = Job(command, plan, source, texts, device, workspace.partial, clock, progress, plan.file_bytes)
                manifest = _produce(job, spec, workspace)
            workspace.publish(manifest)
    return files.read(request.out)


def _produce(job: Job, spec: dict[str, Any], workspace: publish.Workspace) -> dict[str, Any]:
    """Fills the workspace and returns its manifest."""
    versions = {"llmpare": VERSION, "torch": torch.__version__, "transformers": transformers.__version__}
    begun = {**spec, "versions": versions, "device": job.device.type, "dtype": job.plan.dtype}
    with Journal(workspace.journal, begun) as journal:
        if finished := _blocks_done(journal):
            job.progress.phase(f"resuming, {finished} of {len(job.plan.layout.blocks)} blocks are done")
        try:
            job = _surveyed(job, journal)
            with CheckpointWriter(job.folder, job.plan.specs) as writer, _spill(job) as spill:
                done = _fitting(job, journal, lambda batch: _attempt(job, writer, journal, spill, batch))
        except InputError as error:
            if isinstance(error, BrokenWeights) or not journal.done.keys() - {OUTSIDE, SURVEY}:
                workspace.journal.unlink()  # nothing that was begun is worth resuming
            raise
        job.progress.phase("verifying")
        with job.clock.phase("verify"):
            job.source.check_unchanged()
        for caveat in job.plan.caveats(done.eager):
            job.progress.warn(caveat)
        _write_files(job, done)
        report = describe(job, done)
        files.write(job.folder, report)
    return publish.build_manifest(
        job.folder,
        spec=spec,
        source={"weights_sha256": report["source"]["weights_sha256"]},
        versions=versions,
        tensors=done.digests,
        unhashed=files.REPORTS,
    )


def _surveyed(job: Job, journal: Journal) -> Job:
    """The job with a plan that leaves nothing open, after a look at the model if the plan needs one."""
    survey = job.command.survey(job.plan)
    if survey is None:
        return job
    if SURVEY not in journal.done:

        def look(batch: int) -> Any:
            model, walk, _ = _load(job)
            calibration = _enter(job, model, batch)
            job.progress.phase("surveying")
            return survey.look(job.plan, walk, model, calibration, job.clock)

        learned = _fitting(job, journal, look)
        journal.append(SURVEY, {"sha256": {}, "source": dict(job.source.digests), "facts": learned})
    known = journal.done[SURVEY]
    job.source.digests.update(known["source"])  # other weights than those that were looked at will be refused
    return replace(job, plan=survey.settle(job.plan, known["facts"]))


def _fitting(job: Job, journal: Journal, work: Callable[[int], _Found]) -> _Found:
    """work(windows at a time), on whatever batch the device has room for.

    A second attempt takes up what the first one finished, like any other run that was cut short.
    """

    def failure(batch: int, error: Exception) -> MemoryLimitError:
        return MemoryLimitError(
            f"the device ran out of memory in block {_blocks_done(journal)}: {error}",
            "the same command resumes there, with a larger device, fewer --nsamples, or --device cpu",
        )

    return devices.fitting(work, job.plan.needs.at_once // job.plan.seqlen, job.progress, failure)


def _blocks_done(journal: Journal) -> int:
    return sum(unit.startswith("block") for unit in journal.done)


def _attempt(job: Job, writer: CheckpointWriter, journal: Journal, spill: Spill | None, batch: int) -> Done:
    """One pass over the model with `batch` windows at a time."""
    plan, texts, clock = job.plan, job.texts, job.clock
    dense, walk, outside = _load(job)
    output = dense if plan.reshaped is None else _output(job, dense)
    models = Models(dense, output)
    treatment = job.command.treatment(plan, models, clock)
    engine = Pass(plan, job.source, writer, journal, models, treatment, clock, job.progress)
    engine.outside(outside)
    keep: Keep = list if spill is None else spill.keep
    with clock.phase("load"):
        ids = torch.from_numpy(texts.evaluation.ids)
        watched = Stream.enter(ids, dense.replay, batch, keep)
        judged = watched.fork() if models.same else Stream.enter(ids, output.replay, batch, keep)
        learned = _enter(job, output, batch, keep)
        twin = None
        if learned is not None and treatment.wants_dense:
            twin = learned.fork() if models.same else _enter(job, dense, batch, keep)
    outside.clear()
    if not plan.needs.way.outside:
        dense.skeleton.unload_outside()
        memory.trim()
    streams = Streams(learned, twin, watched, judged)
    job.progress.phase("compressing")
    engine.blocks(walk, streams)
    job.progress.phase("measuring")
    if not plan.needs.way.outside:
        walk.head()
    with clock.phase("measure"):
        scores = engine.scores(streams)
    summary = fidelity.summarise(scores, str(DTYPES[plan.dtype]))
    stored = {spec.name for spec in plan.specs}
    packed = [n.name for n in plan.compressed if n.weight not in stored and n.expert is None] if models.same else []
    eager = output.skeleton.eager(packed)  # nothing is packed in a model of another shape
    return Done(engine.records, engine.digests, summary, output.skeleton.outside(), engine.foreseen, eager)


def _load(job: Job) -> tuple[Model, Walk, dict[str, Tensor]]:
    """The original model, with a way through its blocks and the tensors that belong to none of them."""
    plan = job.plan
    job.progress.phase("loading")
    with job.clock.phase("load"):
        skeleton = Skeleton(
            job.source, plan.layout, DTYPES[plan.dtype], job.device, trust=plan.request.trust_remote_code
        )
    walk = Walk(plan, job.source, skeleton, job.clock)
    outside = walk.outside()
    with job.clock.phase("load"):
        return Model(skeleton, Replay(skeleton)), walk, outside


def _output(job: Job, dense: Model) -> Model:
    """The model of an output with shapes of its own, still without weights."""
    plan = job.plan
    assert plan.reshaped is not None
    layout, config = plan.reshaped
    for name in job.source.files:  # the model's own code, if it has any, belongs to its config
        publish.copy_file(job.source.folder / name, job.folder / name)
    _write_config(job.folder, config)
    sketch = Sketch.of(job.folder, config, plan.specs)
    try:
        with job.clock.phase("load"):
            skeleton = Skeleton(sketch, layout, DTYPES[plan.dtype], job.device, trust=plan.request.trust_remote_code)
            return Model(skeleton, Replay(skeleton, like=dense.replay))
    except UnsupportedError as error:
        raise UnsupportedError(
            f"what remains fits no config.json: {error}",
            "what is in a block may follow from its number, as experts often do: leave out other blocks",
        ) from error


Keep = Callable[[Iterable[Tensor]], Batches]


def _spill(job: Job) -> AbstractContextManager[Spill | None]:
    """The place for what memory has no room for, if there is anything."""
    if job.plan.needs.way.kept:
        return nullcontext()
    return Spill(job.folder, memory.available() // 2 if job.device.type == "cuda" else 0)


def _enter(job: Job, model: Model, batch: int, keep: Keep = list) -> Stream | None:
    """The calibration text before block 0 of a model, `batch` windows at a time."""
    text = job.texts.calibration
    return None if text is None else Stream.enter(torch.from_numpy(text.ids), model.replay, batch, keep)


def _spec(plan: Plan, source: Checkpoint, texts: Texts) -> dict[str, Any]:
    """What decides the bytes of the output, as far as it is known before the weights are read."""
    settled = {**plan.request.spec(), "device": plan.device, "dtype": plan.dtype}  # what `auto` came to
    del settled["trust_remote_code"]  # which code, the source says
    layout = hashlib.sha256(repr(list(source.tensors.values())).encode()).hexdigest()
    return {
        "request": settled,
        "sequential": plan.sequential,
        "source": {
            "config_sha256": config_digest(source),
            "headers_sha256": layout,
            "files_sha256": source.file_digests(),
        },
        "text": texts.spec(),
    }


def _existing(plan: Plan, source: Checkpoint) -> dict[str, Any]:
    source.hash()
    return verified(plan.request, weights_digest(source))


def verified(request: RunRequest, weights_sha256: str) -> dict[str, Any]:
    """The report of a finished output of the same request, read back, and judged by the gates of this request.

    Its files say what these gates say. weights_sha256: of the model as it is now.
    """
    publish.settle(request.out)
    manifest = publish.verify(request.out)
    if manifest["source"]["weights_sha256"] != weights_sha256:
        raise InputError(
            f"{request.out} was made from other weights than {request.model} holds now", "--force makes it anew"
        )
    before = files.read(request.out)
    checked = gates.evaluate(request.gates, before["fidelity"], before["size"])
    passed = gates.measurable(before["fidelity"]) and gates.verdict(
        checked, strict=request.strict, fallbacks=before["fallbacks"], warnings=before["warnings"]
    )
    report = {**before, "gates": checked, "passed": passed}
    if build.finite(report) != before:
        files.write(request.out, report)
    return report


def _write_files(job: Job, done: Done) -> None:
    """config.json and everything else of the source that is no weight."""
    plan, source = job.plan, job.source
    for name in source.files:
        publish.copy_file(source.folder / name, job.folder / name)
    config = plan.config(source.config, done.outside, done.eager)
    if config is None and source.scheme != DENSE:
        config = source.config
    if config is None:
        publish.copy_file(source.folder / CONFIG, job.folder / CONFIG)
    else:
        _write_config(job.folder, config)
    for name, data in plan.files().items():
        publish.write_file(job.folder / name, data)


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    publish.write_file(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n")
