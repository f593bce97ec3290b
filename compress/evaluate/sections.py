"""What an evaluation knows, and the report it becomes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from llmpare.compress import devices
from llmpare.compress.environment import cost, environment
from llmpare.compress.evaluate.baseline import Identity, Saved
from llmpare.compress.evaluate.models import Subject
from llmpare.compress.evaluate.request import EvaluateRequest
from llmpare.compress.evaluate.stream import Setup
from llmpare.compress.evaluate.text import Text
from llmpare.compress.report import against, build, gates

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict


@dataclass
class Job:
    """What all steps of an evaluation share. tasks: by name. previous: an earlier report, to be compared with.

    warnings, fallbacks and failures grow on the way. failures: {model, part, why} of what could not be measured.
    """

    request: EvaluateRequest
    baseline: Subject | None
    saved: Saved | None
    candidates: list[Subject]
    text: Text
    tokenizer: Any
    dtype: str
    setup: Setup
    tasks: "Mapping[str, TaskDict]"
    previous: dict[str, Any] | None
    warnings: list[str]
    fallbacks: list[dict[str, str]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)

    @property
    def ids(self) -> torch.Tensor:
        return torch.from_numpy(self.text.ids)


def size(job: Job, subject: Subject) -> dict[str, Any]:
    """Its `size`, beside that of the baseline."""
    own = subject.source.weight_bytes
    before = None
    if job.baseline is not None:
        before = job.baseline.source.weight_bytes
    elif job.saved is not None:
        before = job.saved.identity.weight_bytes
    return {
        "bytes": own,
        "baseline_bytes": before,
        "ratio": None if before is None else own / before,
        "linear_bits_per_weight": subject.source.linear_bits,
        "parameters": subject.source.parameters,
    }


def identity(job: Job, subject: Subject) -> Identity:
    """What saved predictions of this model belong to."""
    return Identity(
        **subject.describe(),
        vocabulary=min(each.vocabulary for each in (subject, *job.candidates)),
        ids_sha256=job.text.source["ids_sha256"],
        dtype=job.dtype,
    )


def _baseline(job: Job, reference: dict[str, Any]) -> dict[str, Any] | None:
    if job.baseline is not None:
        return {**job.baseline.describe(), "saved": None, **reference}
    if job.saved is None:
        return None
    identity = job.saved.identity
    names = ("model", "architecture", "scheme", "weight_bytes", "parameters", "weights_sha256")
    saved = {"folder": str(job.saved.folder), "top_k": job.saved.top_k}
    return {**{name: vars(identity)[name] for name in names}, "saved": saved, **reference}


def outline(job: Job) -> dict[str, Any]:
    """What of the report is known before anything is measured, as far as reports are compared by it.

    Reads the weights of the original, if there is one.
    """
    machine = None if job.request.speed is None else {"machine": {"device": devices.name(job.setup.device)}}
    known = {"fidelity": {"dtype": str(job.setup.dtype)}, "speed": machine}
    return {
        "schema_version": build.SCHEMA_VERSION,
        "command": "evaluate",
        "request": job.request.spec(),
        "baseline": _baseline(job, {}),
        "evaluation": job.text.source,
        "candidates": [{"name": subject.name, **known} for subject in job.candidates],
    }


def report(job: Job, candidates: list[dict[str, Any]], reference: dict[str, Any]) -> dict[str, Any]:
    """The whole report. candidates: their sections. reference: what else there is to say of the baseline."""
    request, setup = job.request, job.setup
    several = len(candidates) > 1
    checked = [
        {**gate, "name": f"{candidate['name']}: {gate['name']}" if several else gate["name"]}
        for candidate in candidates
        for gate in candidate["gates"]
    ]
    if job.previous is not None:
        measured = {"candidates": candidates}
        for warning in against.missing(measured, job.previous):
            job.warnings.append(warning)
            setup.progress.warn(warning)
        checked += against.regressions(measured, job.previous)
    held = gates.verdict(checked, strict=request.strict, fallbacks=job.fallbacks, warnings=job.warnings)
    return {
        "schema_version": build.SCHEMA_VERSION,
        "command": "evaluate",
        "passed": held and not job.failures and all(candidate["passed"] for candidate in candidates),
        "request": request.spec(),
        "baseline": _baseline(job, reference),
        "evaluation": {**job.text.source, "scored_bytes": job.text.scored_bytes},
        "candidates": candidates,
        "fallbacks": job.fallbacks,
        "warnings": job.warnings,
        "failures": job.failures,
        "gates": checked,
        "cost": cost(setup.clock, setup.device),
        "environment": environment(setup.device),
    }
