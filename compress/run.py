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

from llmpare.compress import calibration, memory
from llmpare.compress.calibration import Windows
from llmpare.compress.checkpoint import publish
from llmpare.compress.checkpoint.journal import Journal
from llmpare.compress.checkpoint.read import CONFIG, Checkpoint
from llmpare.compress.checkpoint.tensors import DTYPES
from llmpare.compress.checkpoint.write import CheckpointWriter
from llmpare.compress.clock import Clock
from llmpare.compress.engine import OUTSIDE, BrokenWeights, Pass, Streams
from llmpare.compress.errors import InputError, MemoryLimitError, UsageError
from llmpare.compress.estimate import PROCESS, batch_tokens
from llmpare.compress.evaluate import fidelity
from llmpare.compress.model.replay import Replay
from llmpare.compress.model.skeleton import Skeleton
from llmpare.compress.plan import Plan, check_room, plan_quantize
from llmpare.compress.progress import Progress
from llmpare.compress.quantize.block import QuantizeBlocks
from llmpare.compress.report import build, gates, markdown
from llmpare.compress.request import NO_TEXT, QuantizeRequest
from llmpare.compress.streams import Stream
from llmpare.compress.version import VERSION

REPORTS = ("report.json", "report.md")
OVERLAP_LIMIT = 0.01  # share of the evaluation text that calibration may know before the figures flatter


@dataclass(frozen=True)
class Texts:
    """The windows of a run. calibration is None for a method that is to do without."""

    calibration: Windows | None
    evaluation: Windows
    overlap: float


def run_quantize(request: QuantizeRequest, progress: Progress) -> dict[str, Any]:
    """Quantizes a checkpoint and returns the report that lies beside the result.

    A finished output of the same request is verified and its report returned. Raises LlmpareError, leaving either
    nothing or an unfinished output that the same command takes up again.
    """
    transformers.logging.set_verbosity_error()
    progress.phase("planning")
    plan = plan_quantize(request)
    device = _device(request.device)
    clock = Clock(torch.cuda.synchronize if device.type == "cuda" else lambda: None)
    with clock.phase("text"):
        texts = _texts(plan)
    for warning in _warnings(plan, texts):
        progress.warn(warning)
    with Checkpoint.open(plan.model) as source:
        spec = _spec(plan, source, texts)
        if publish.finished(request.out, spec):
            progress.phase("verifying")
            return _existing(plan, source, texts)
        check_room(plan, _room(device))
        with publish.Workspace(request.out, force=request.force, restart=request.restart) as workspace:
            for message in workspace.messages:
                progress.warn(message)
            manifest = workspace.pending(spec)
            if manifest is None:
                manifest = _produce(plan, source, texts, spec, workspace, device, clock, progress)
            workspace.publish(manifest)
    report: dict[str, Any] = json.loads((request.out / REPORTS[0]).read_bytes())
    return report


def _produce(
    plan: Plan,
    source: Checkpoint,
    texts: Texts,
    spec: dict[str, Any],
    workspace: publish.Workspace,
    device: torch.device,
    clock: Clock,
    progress: Progress,
) -> dict[str, Any]:
    """Fills the workspace and returns its manifest."""
    versions = {"llmpare": VERSION, "torch": torch.__version__, "transformers": transformers.__version__}
    begun = {**spec, "versions": versions, "device": device.type}
    with Journal(workspace.journal, begun) as journal:
        with CheckpointWriter(workspace.partial, plan.specs) as writer:
            try:
                done = _compress(plan, source, texts, writer, journal, device, clock, progress)
            except InputError as error:
                if isinstance(error, BrokenWeights) or not any(unit != OUTSIDE for unit in journal.done):
                    workspace.journal.unlink()  # nothing that was begun is worth resuming
                raise
            progress.phase("verifying")
            with clock.phase("verify"):
                source.check_unchanged()
        _write_files(plan, source, done.outside, workspace.partial)
        report = _report(plan, source, texts, done, device, clock)
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


@dataclass(frozen=True)
class _Done:
    """What the engine's pass leaves behind for the report."""

    records: list[dict[str, Any]]
    digests: dict[str, str]
    fidelity: dict[str, Any]
    outside: list[str]  # linear modules that belong to no block


def _compress(
    plan: Plan,
    source: Checkpoint,
    texts: Texts,
    writer: CheckpointWriter,
    journal: Journal,
    device: torch.device,
    clock: Clock,
    progress: Progress,
) -> _Done:
    """The pass itself; once more with half the batch if the device runs out of memory.

    The second attempt takes up what the first one finished, like any other run that was cut short.
    """
    batch = max(1, batch_tokens(device.type) // plan.seqlen)
    try:
        return _attempt(plan, source, texts, writer, journal, device, clock, progress, batch)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    progress.warn(f"the device ran out of memory with {batch} windows at a time, trying {max(1, batch // 2)}")
    try:
        return _attempt(plan, source, texts, writer, journal, device, clock, progress, max(1, batch // 2))
    except torch.OutOfMemoryError as error:
        done = sum(unit.startswith("block") for unit in journal.done)
        raise MemoryLimitError(
            f"the device ran out of memory in block {done}: {error}",
            "the same command resumes there, with a larger device, fewer --nsamples, or --device cpu",
        ) from error


def _attempt(
    plan: Plan,
    source: Checkpoint,
    texts: Texts,
    writer: CheckpointWriter,
    journal: Journal,
    device: torch.device,
    clock: Clock,
    progress: Progress,
    batch: int,
) -> _Done:
    progress.phase("loading")
    with clock.phase("load"):
        trust = plan.request.trust_remote_code
        skeleton = Skeleton(source, plan.layout, DTYPES[plan.dtype], device, trust=trust)
    engine = Pass(plan, source, writer, journal, skeleton, clock, progress)
    engine.outside()
    with clock.phase("load"):
        engine.first()
        replay = Replay(skeleton)
        treatment = QuantizeBlocks(plan, skeleton, replay, clock)
        watched = Stream.enter(torch.from_numpy(texts.evaluation.ids), replay, batch)
        learned = None
        if texts.calibration is not None:
            learned = Stream.enter(torch.from_numpy(texts.calibration.ids), replay, batch)
    twin = learned.fork() if learned is not None and treatment.wants_dense else None
    streams = Streams(learned, twin, watched, watched.fork())
    progress.phase("compressing")
    engine.blocks(replay, streams, treatment)
    progress.phase("measuring")
    with clock.phase("measure"):
        scores = engine.scores(replay, streams)
    summary = fidelity.summarise(scores, str(DTYPES[plan.dtype]))
    return _Done(engine.records, engine.digests, summary, skeleton.outside())


def _texts(plan: Plan) -> Texts:
    request = plan.request
    tokenizer = calibration.load_tokenizer(plan.model, trust_remote_code=request.trust_remote_code)
    learned = None
    if request.calibration.dataset != NO_TEXT:
        learned = _windows(plan, tokenizer, "calibration")
    watched = _windows(plan, tokenizer, "evaluation")
    return Texts(learned, watched, calibration.overlap(learned, watched) if learned else 0.0)


def _windows(plan: Plan, tokenizer: Any, part: str) -> Windows:
    spec = plan.request.calibration if part == "calibration" else plan.request.evaluation
    return calibration.load(spec, tokenizer, vocab_size=plan.vocabulary, part=part, max_length=plan.longest)


def _spec(plan: Plan, source: Checkpoint, texts: Texts) -> dict[str, Any]:
    """What decides the bytes of the output, as far as it is known before the weights are read."""
    layout = hashlib.sha256(repr(list(source.tensors.values())).encode()).hexdigest()
    return {
        "request": plan.request.spec(),
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


def _write_files(plan: Plan, source: Checkpoint, outside: Sequence[str], folder: Path) -> None:
    """config.json and everything else of the source that is no weight. outside: linears that belong to no block."""
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


def _report(
    plan: Plan, source: Checkpoint, texts: Texts, done: _Done, device: torch.device, clock: Clock
) -> dict[str, Any]:
    request = plan.request
    linears = plan.quantized
    size = build.size(
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        linear_bytes=plan.linear_bytes,
        parameters_total=plan.parameters,
        parameters_compressed=sum(linear.rows * linear.columns for linear in linears),
    )
    fallbacks = [note for record in done.records for note in record["fallbacks"]]
    warnings = _warnings(plan, texts)
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
            "config_sha256": _config_digest(source),
            "weights_sha256": _weights_digest(source),
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
            "seconds": {name: round(seconds, 3) for name, seconds in clock.seconds.items()},
            "total_seconds": round(clock.total(), 3),
            "peak_rss_bytes": memory.peak_resident(),
            "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        },
        "environment": {
            "llmpare": VERSION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
        },
    }


def _warnings(plan: Plan, texts: Texts) -> list[str]:
    found = [*plan.warnings]
    if texts.calibration is not None and texts.calibration.source["short"]:
        windows, length = texts.calibration.ids.shape
        found.append(f"the calibration text gives only {windows} windows of {length} tokens")
    if texts.overlap > OVERLAP_LIMIT:
        found.append(f"{texts.overlap:.0%} of the evaluation text is also in the calibration text: the figures flatter")
    return found


def _config_digest(source: Checkpoint) -> str:
    return hashlib.sha256((source.folder / CONFIG).read_bytes()).hexdigest()


def _weights_digest(source: Checkpoint) -> str:
    """One digest for all weights; every tensor must have been read."""
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(source.digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _device(name: str) -> torch.device:
    """The device to work on. Raises UsageError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}", "--device takes auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--device {name}: this torch sees no CUDA device", "use --device cpu, or a torch built for CUDA"
        )
    return torch.device(name)


def _room(device: torch.device) -> int:
    """Bytes a run on this device can have."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + PROCESS  # what the estimate counts for the process is not on the device
    return memory.available() + memory.resident()
