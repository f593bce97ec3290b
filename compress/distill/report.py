"""The report of a distillation: what was learned from what, for how many tokens, at what cost, to what end."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmpare.compress.clock import Clock
from llmpare.compress.distill import inputs
from llmpare.compress.distill.launch import Processes
from llmpare.compress.distill.measure import Measured
from llmpare.compress.distill.plan import DistillPlan
from llmpare.compress.distill.request import TEXT_ALONE, DistillRequest
from llmpare.compress.environment import cost, environment
from llmpare.compress.evaluate.models import Subject, digest
from llmpare.compress.formats.decoded import DenseSource, open_dense
from llmpare.compress.outcome import config_digest
from llmpare.compress.report import build, gates
from llmpare.compress.texts import Texts


def describe(
    plan: DistillPlan, teacher: DenseSource, student: DenseSource, made: Path, texts: Texts, trained: Mapping[str, Any],
    found: Measured, exits: list[dict[str, Any]], processes: Processes, clock: Clock,
) -> dict[str, Any]:  # fmt: skip
    """The report, as schema.json says.

    student: as it came. made: the folder of what it has become. trained: what the journal says of the training.
    exits: what each early exit is worth.
    """
    request = plan.request
    assert texts.calibration is not None
    with open_dense(made) as output:
        size = build.size(
            source_bytes=teacher.weight_bytes,
            output_bytes=output.weight_bytes,
            linear_bytes=sum(linear.nbytes for linear in output.packed.values()),
            parameters_total=output.parameters,
            parameters_compressed=sum(linear.rows * linear.columns for linear in output.packed.values()),
        )
    warnings = inputs.warnings(plan, texts)
    checked = gates.evaluate(request.gates, found.after, size)
    held = gates.verdict(checked, strict=request.strict, fallbacks=found.fallbacks, warnings=warnings)
    return {
        "schema_version": build.SCHEMA_VERSION,
        "command": "distill",
        "passed": held and gates.measurable(found.after),
        "request": {**request.spec(), "model": request.model, "out": str(request.out)},
        "source": {
            "model": request.model,
            "architecture": plan.teacher.architecture,
            "scheme": teacher.scheme,
            "config_sha256": config_digest(teacher.checkpoint),
            "weights_sha256": digest(teacher),
            "bytes": teacher.weight_bytes,
            "parameters": teacher.parameters,
        },
        "calibration": texts.calibration.source,
        "evaluation": texts.evaluation.source,
        "overlap": texts.overlap,
        "size": size,
        "fidelity": found.after,
        "distillation": {
            "student": {**Subject(plan.student.name, "", student, None).describe(), "made": _made(plan)},
            "before": found.before,
            "quantized_without_training": found.rounded,
            "recovered": recovered(found.before, found.after),
            "training": {
                "tokens": plan.tokens,
                "epochs": plan.tokens / texts.calibration.ids.size,
                "steps": plan.pace.steps,
                "windows_per_step": plan.pace.windows,
                "seqlen": plan.seqlen,
                "rate": plan.rate,
                "warmup": plan.warmup,
                "loss": request.loss,
                "learned_from": _learned_from(request),
                "processes": processes.count,
                "seconds": trained["seconds"],
                "tokens_per_second": plan.tokens / trained["seconds"] if trained["seconds"] else None,
            },
            "curve": trained["curve"],
            "early_exits": exits,
        },
        "fallbacks": found.fallbacks,
        "warnings": warnings,
        "gates": checked,
        "cost": cost(clock, processes.device),
        "environment": environment(processes.device),
    }


def recovered(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    """The share of the perplexity lost to the teacher that the training brought back; None if none was lost."""
    teacher, first, now = (
        before["perplexity"]["dense"], before["perplexity"]["compressed"], after["perplexity"]["compressed"]
    )  # fmt: skip
    if not all(math.isfinite(each) for each in (teacher, first, now)) or first <= teacher:
        return None
    return float((first - now) / (first - teacher))


def _learned_from(request: DistillRequest) -> str:
    if request.loss == TEXT_ALONE:
        return "the text alone"
    return "the cache of an absent teacher" if request.teacher_absent else "the teacher"


def _made(plan: DistillPlan) -> str:
    if plan.student.folder is not None:
        return "given"
    return "carved from the teacher" if plan.carve is not None else "new"
