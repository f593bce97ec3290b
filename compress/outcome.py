"""What a run has to go by and what it leaves behind, and the report that both make."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmpare.compress import routing
from llmpare.compress.checkpoint.read import CONFIG, Checkpoint
from llmpare.compress.checkpoint.write import weight_files
from llmpare.compress.clock import Clock
from llmpare.compress.command import Command
from llmpare.compress.environment import Prediction, cost, environment
from llmpare.compress.planning import Plan
from llmpare.compress.progress import Progress
from llmpare.compress.report import build, gates
from llmpare.compress.texts import Texts

_ASIDE = ("fallbacks", routing.EXPERTS, "kept_experts")  # facts of a block that the report has in sections of their own


@dataclass(frozen=True)
class Job:
    """What all steps of a run share.

    folder: where the output takes shape. promised: bytes of its weight files, as planned before any survey.
    """

    command: Command
    plan: Plan
    source: Checkpoint
    texts: Texts
    device: torch.device
    folder: Path
    clock: Clock
    progress: Progress
    promised: int


@dataclass(frozen=True)
class Done:
    """What the engine's pass leaves behind for the report. foreseen: see Pass."""

    records: list[dict[str, Any]]
    digests: dict[str, str]
    fidelity: dict[str, Any]
    outside: list[str]  # linear modules that belong to no block
    foreseen: float | None
    eager: bool  # the model's own code looks at weights while it is loaded


def describe(job: Job, done: Done) -> dict[str, Any]:
    """The report, as schema.json says."""
    plan, texts, request = job.plan, job.texts, job.plan.request
    compressed = set(plan.compressed)
    size = build.size(
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        linear_bytes=plan.linear_bytes if plan.reshaped is None else None,
        parameters_total=plan.parameters,
        parameters_compressed=sum(linear.rows * linear.columns for linear in compressed),
    )
    fallbacks = [note for record in done.records for note in record["fallbacks"]]
    warnings = [*plan.warnings, *texts.warnings(), *plan.caveats(done.eager)]
    checked = gates.evaluate(request.gates, done.fidelity, size)
    held = gates.verdict(checked, strict=request.strict, fallbacks=fallbacks, warnings=warnings)
    return {
        "schema_version": build.SCHEMA_VERSION,
        "command": job.command.name,
        "passed": held and gates.measurable(done.fidelity),
        "request": {**request.spec(), "model": request.model, "out": str(request.out)},
        "source": {
            "model": request.model,
            "architecture": plan.layout.architecture,
            "scheme": plan.source_scheme,
            "config_sha256": config_digest(job.source),
            "weights_sha256": weights_digest(job.source),
            "bytes": plan.source_bytes,
            "parameters": plan.parameters,
        },
        "calibration": texts.calibration.source if texts.calibration else None,
        "evaluation": texts.evaluation.source,
        "overlap": texts.overlap,
        "size": size,
        "fidelity": done.fidelity,
        "blocks": [{key: value for key, value in record.items() if key not in _ASIDE} for record in done.records],
        "kept_dense": [
            {"name": linear.name, "why": "asked for"} for linear in plan.layout.linears if linear not in compressed
        ],
        **plan.sections(done.records),
        **routing.section(done.records, size["parameters_compressed"]),
        "fallbacks": fallbacks,
        "warnings": warnings,
        "gates": checked,
        "cost": cost(
            job.clock,
            job.device,
            Prediction(plan.needs.memory, job.promised, done.foreseen),
            read=job.source.bytes_read,
            written=sum((job.folder / name).stat().st_size for name in weight_files(plan.specs)),
        ),
        "environment": environment(job.device),
    }


def config_digest(source: Checkpoint) -> str:
    """sha256 of config.json."""
    return hashlib.sha256((source.folder / CONFIG).read_bytes()).hexdigest()


def weights_digest(source: Checkpoint) -> str:
    """One digest for all weights; every tensor must have been read."""
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(source.digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()
