"""One run, from a request to a published output: what surrounds the engine's loop.

The order is chosen so that whatever can go wrong goes wrong early: plan and texts before the first byte is written,
the report and the read-back before the output gets its name.
"""

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from llmpare.compress import devices, memory
from llmpare.compress.checkpoint import publish
from llmpare.compress.checkpoint.journal import Journal
from llmpare.compress.checkpoint.read import CONFIG, Checkpoint
from llmpare.compress.checkpoint.tensors import DTYPES
from llmpare.compress.checkpoint.write import CheckpointWriter
from llmpare.compress.clock import Clock
from llmpare.compress.engine import OUTSIDE, BrokenWeights, Pass, Streams
from llmpare.compress.errors import InputError, MemoryLimitError
from llmpare.compress.estimate import batch_tokens
from llmpare.compress.evaluate import fidelity
from llmpare.compress.model.replay import Replay
from llmpare.compress.model.skeleton import Skeleton
from llmpare.compress.plan import Plan, check_room, plan_quantize
from llmpare.compress.progress import Progress
from llmpare.compress.quantize.block import QuantizeBlocks
from llmpare.compress.report import build, gates, markdown
from llmpare.compress.request import QuantizeRequest
from llmpare.compress.streams import Stream
from llmpare.compress.texts import Texts, read_texts
from llmpare.compress.version import VERSION

REPORTS = ("report.json", "report.md")


def run_quantize(request: QuantizeRequest, progress: Progress) -> dict[str, Any]:
    """Quantizes a checkpoint and returns the report that lies beside the result.

    A finished output of the same request is verified and its report returned. Raises LlmpareError, leaving either
    nothing or an unfinished output that the same command takes up again.
    """
    transformers.logging.set_verbosity_error()
    memory.keep_lean()
    progress.phase("planning")
    plan = plan_quantize(request)
    device = devices.find(request.device)
    clock = Clock(torch.cuda.synchronize if device.type == "cuda" else lambda: None)
    with clock.phase("text"):
        texts = read_texts(plan)
    for warning in (*plan.warnings, *texts.warnings()):
        progress.warn(warning)
    with Checkpoint.open(plan.model) as source:
        spec = _spec(plan, source, texts)
        if publish.finished(request.out, spec):
            progress.phase("verifying")
            return _existing(plan, source, texts)
        check_room(plan, devices.room(device))
        with publish.Workspace(request.out, force=request.force, restart=request.restart) as workspace:
            for message in workspace.messages:
                progress.warn(message)
            manifest = workspace.pending(spec)
            if manifest is None:
                job = _Job(plan, source, texts, device, clock, progress)
                manifest = _produce(job, spec, workspace)
            workspace.publish(manifest)
    report: dict[str, Any] = json.loads((request.out / REPORTS[0]).read_bytes())
    return report


@dataclass(frozen=True)
class _Job:
    """What all steps of a run share."""

    plan: Plan
    source: Checkpoint
    texts: Texts
    device: torch.device
    clock: Clock
    progress: Progress


@dataclass(frozen=True)
class _Done:
    """What the engine's pass leaves behind for the report."""

    records: list[dict[str, Any]]
    digests: dict[str, str]
    fidelity: dict[str, Any]
    outside: list[str]  # linear modules that belong to no block


def _produce(job: _Job, spec: dict[str, Any], workspace: publish.Workspace) -> dict[str, Any]:
    """Fills the workspace and returns its manifest."""
    versions = {"llmpare": VERSION, "torch": torch.__version__, "transformers": transformers.__version__}
    begun = {**spec, "versions": versions, "device": job.device.type}
    with Journal(workspace.journal, begun) as journal:
        with CheckpointWriter(workspace.partial, job.plan.specs) as writer:
            try:
                done = _compress(job, writer, journal)
            except InputError as error:
                if isinstance(error, BrokenWeights) or not any(unit != OUTSIDE for unit in journal.done):
                    workspace.journal.unlink()  # nothing that was begun is worth resuming
                raise
            job.progress.phase("verifying")
            with job.clock.phase("verify"):
                job.source.check_unchanged()
        _write_files(job, done.outside, workspace.partial)
        report = _report(job, done)
        publish.write_file(workspace.partial / REPORTS[0], build.encode(report))
        publish.write_file(workspace.partial / REPORTS[1], markdown.render(report).encode())
    return publish.build_manifest(
        workspace.partial,
        spec=spec,
        source={"weights_sha256": report["source"]["weights_sha256"]},
        versions=versions,
        tensors=done.digests,
        unhashed=REPORTS,
    )


def _compress(job: _Job, writer: CheckpointWriter, journal: Journal) -> _Done:
    """The pass itself; once more with half the batch if the device runs out of memory.

    The second attempt takes up what the first one finished, like any other run that was cut short.
    """
    batch = max(1, batch_tokens(job.device.type) // job.plan.seqlen)
    try:
        return _attempt(job, writer, journal, batch)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    half = max(1, batch // 2)
    job.progress.warn(f"the device ran out of memory with {batch} windows at a time, trying {half}")
    try:
        return _attempt(job, writer, journal, half)
    except torch.OutOfMemoryError as error:
        done = sum(unit.startswith("block") for unit in journal.done)
        raise MemoryLimitError(
            f"the device ran out of memory in block {done}: {error}",
            "the same command resumes there, with a larger device, fewer --nsamples, or --device cpu",
        ) from error


def _attempt(job: _Job, writer: CheckpointWriter, journal: Journal, batch: int) -> _Done:
    """One pass over the model with `batch` windows at a time."""
    plan, texts, clock = job.plan, job.texts, job.clock
    job.progress.phase("loading")
    with clock.phase("load"):
        trust = plan.request.trust_remote_code
        skeleton = Skeleton(job.source, plan.layout, DTYPES[plan.dtype], job.device, trust=trust)
    engine = Pass(plan, job.source, writer, journal, skeleton, clock, job.progress)
    engine.outside()
    first = engine.first()
    with clock.phase("load"):
        replay = Replay(skeleton)
        treatment = QuantizeBlocks(plan, skeleton, replay, clock)
        watched = Stream.enter(torch.from_numpy(texts.evaluation.ids), replay, batch)
        learned = None
        if texts.calibration is not None:
            learned = Stream.enter(torch.from_numpy(texts.calibration.ids), replay, batch)
    twin = learned.fork() if learned is not None and treatment.wants_dense else None
    streams = Streams(learned, twin, watched, watched.fork())
    job.progress.phase("compressing")
    engine.blocks(replay, streams, treatment, first)
    job.progress.phase("measuring")
    with clock.phase("measure"):
        scores = engine.scores(replay, streams)
    summary = fidelity.summarise(scores, str(DTYPES[plan.dtype]))
    return _Done(engine.records, engine.digests, summary, skeleton.outside())


def _spec(plan: Plan, source: Checkpoint, texts: Texts) -> dict[str, Any]:
    """What decides the bytes of the output, as far as it is known before the weights are read."""
    layout = hashlib.sha256(repr(list(source.tensors.values())).encode()).hexdigest()
    return {
        "request": plan.request.spec(),
        "sequential": plan.sequential,
        "source": {"config_sha256": _config_digest(source), "headers_sha256": layout},
        "text": {
            "calibration_sha256": texts.calibration.source["sha256"] if texts.calibration else None,
            "evaluation_sha256": texts.evaluation.source["sha256"],
        },
    }


def _existing(plan: Plan, source: Checkpoint, texts: Texts) -> dict[str, Any]:
    """The report of a finished output of the same request, judged by the gates of this request."""
    request = plan.request
    publish.settle(request.out)
    manifest = publish.verify(request.out)
    for name in source.tensors:
        source.read(name)
    if manifest["source"]["weights_sha256"] != _weights_digest(source):
        raise InputError(
            f"{request.out} was made from other weights than {plan.model} holds now", "--force makes it anew"
        )
    report: dict[str, Any] = json.loads((request.out / REPORTS[0]).read_bytes())
    report["gates"] = gates.evaluate(request.gates, report["fidelity"], report["size"])
    report["passed"] = gates.measurable(report["fidelity"]) and gates.verdict(
        report["gates"], strict=request.strict, fallbacks=report["fallbacks"], warnings=report["warnings"]
    )
    return report


def _write_files(job: _Job, outside: Sequence[str], folder: Path) -> None:
    """config.json and everything else of the source that is no weight. outside: linears that belong to no block."""
    plan, source = job.plan, job.source
    for name in source.files:
        publish.copy_file(source.folder / name, folder / name)
    added = plan.format.config(plan.schemes, plan.request.scheme, outside)
    if added is None:
        publish.copy_file(source.folder / CONFIG, folder / CONFIG)
    else:
        config = {**source.config, **plan.format.aliases(source.config), "quantization_config": added}
        publish.write_file(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n")
    for name, data in plan.format.files(plan.schemes, plan.request.scheme).items():
        publish.write_file(folder / name, data)


def _report(job: _Job, done: _Done) -> dict[str, Any]:
    plan, texts, request = job.plan, job.texts, job.plan.request
    size = build.size(
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        linear_bytes=plan.linear_bytes,
        parameters_total=plan.parameters,
        parameters_compressed=sum(linear.rows * linear.columns for linear in plan.quantized),
    )
    fallbacks = [note for record in done.records for note in record["fallbacks"]]
    warnings = [*plan.warnings, *texts.warnings()]
    checked = gates.evaluate(request.gates, done.fidelity, size)
    held = gates.verdict(checked, strict=request.strict, fallbacks=fallbacks, warnings=warnings)
    return {
        "schema_version": build.SCHEMA_VERSION,
        "command": "quantize",
        "passed": held and gates.measurable(done.fidelity),
        "request": {**request.spec(), "model": request.model, "out": str(request.out)},
        "source": {
            "model": request.model,
            "architecture": plan.layout.architecture,
            "config_sha256": _config_digest(job.source),
            "weights_sha256": _weights_digest(job.source),
            "bytes": plan.source_bytes,
            "parameters": plan.parameters,
        },
        "calibration": texts.calibration.source if texts.calibration else None,
        "evaluation": texts.evaluation.source,
        "overlap": texts.overlap,
        "size": size,
        "fidelity": done.fidelity,
        "blocks": [{key: value for key, value in record.items() if key != "fallbacks"} for record in done.records],
        "kept_dense": [
            {"name": linear.name, "why": "asked for"} for linear, scheme in plan.schemes.items() if scheme is None
        ],
        "fallbacks": fallbacks,
        "warnings": warnings,
        "gates": checked,
        "cost": {
            "seconds": {name: round(seconds, 3) for name, seconds in job.clock.seconds.items()},
            "total_seconds": round(job.clock.total(), 3),
            "peak_rss_bytes": memory.peak_resident(),
            "peak_device_bytes": devices.peak(job.device),
        },
        "environment": {
            "llmpare": VERSION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "device": devices.name(job.device),
            "threads": torch.get_num_threads(),
        },
    }


def _config_digest(source: Checkpoint) -> str:
    return hashlib.sha256((source.folder / CONFIG).read_bytes()).hexdigest()


def _weights_digest(source: Checkpoint) -> str:
    """One digest for all weights; every tensor must have been read."""
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(source.digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()
