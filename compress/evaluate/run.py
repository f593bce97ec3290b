"""One evaluation, from a request to a report.

Whatever can be refused is refused before a model runs: folders, tokenizers, text, memory, the place of the report.
Then the baseline reads the text, once, and every candidate after it; two models at most are at the head together.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from llmpare.compress import devices, hardware
from llmpare.compress.activations import windows_at_once
from llmpare.compress.checkpoint.files import shown
from llmpare.compress.checkpoint.tensors import DTYPES
from llmpare.compress.clock import Clock
from llmpare.compress.errors import InputError, MemoryLimitError, UsageError
from llmpare.compress.evaluate import compare, estimate, extras, fidelity, publish, sections, text, vocabulary, worst
from llmpare.compress.evaluate.baseline import Saved, Saver, is_saved
from llmpare.compress.evaluate.fidelity import Scores
from llmpare.compress.evaluate.models import Subject, digest, locate_baseline, open_subjects
from llmpare.compress.evaluate.request import EvaluateRequest
from llmpare.compress.evaluate.sections import Job
from llmpare.compress.evaluate.stream import Reader, Setup, read
from llmpare.compress.evaluate.text import Text
from llmpare.compress.formats.decoded import open_dense
from llmpare.compress.progress import Progress
from llmpare.compress.report import against, gates


def run_evaluate(request: EvaluateRequest, progress: Progress) -> dict[str, Any]:
    """Measures models and returns the report, which also lies in request.out if that is set.

    Raises LlmpareError for models that cannot be run. A model that fails its gates, gives no numbers, or whose tasks or
    speed cannot be measured, is no error: the report says `"passed": false`.
    """
    transformers.logging.set_verbosity_error()
    progress.phase("planning")
    device = devices.find(request.device)
    clock = devices.clock(device)
    with ExitStack() as stack:
        job = _prepare(request, device, clock, progress, stack)
        for warning in job.warnings:
            progress.warn(warning)
        with publish.prepared(request):
            saver = None if request.save_baseline is None else Saver(request.save_baseline, request.top_k)
            if saver is not None:
                stack.enter_context(saver)
            report = _measure(job, saver)
            publish.write(request, report)
    return report


def _prepare(request: EvaluateRequest, device: torch.device, clock: Clock, progress: Progress, stack: ExitStack) -> Job:
    """Everything that can be known, and refused, before a model runs."""
    previous = None if request.against is None else against.load(request.against)
    place = locate_baseline(request)
    saved = Saved(place) if place is not None and is_saved(place) else None
    if saved is not None and request.save_baseline is not None:
        raise UsageError("--save-baseline: the baseline is saved already", "name the original model with --baseline")
    if saved is not None and request.gates.min_recovery is not None:
        raise UsageError(
            f"--min-recovery compares scores, and {shown(saved.folder)} keeps predictions only",
            "name the original model with --baseline",
        )
    baseline, candidates = open_subjects(request, None if saved else place, stack)
    subjects = [*([baseline] if baseline else []), *candidates]
    first = next((subject for subject in subjects if subject.tokenizer is not None), None)
    if first is None:
        raise InputError(f"{subjects[0].source.folder}: no tokenizer in the model folder, expected tokenizer.json")
    warnings = _same_tokens(first, subjects)
    with clock.phase("text"):
        watched = _text(request, subjects, first.tokenizer, saved)
    if request.text.nsamples is None and not watched.source["whole"]:
        measured = f"{watched.ids.size:,} tokens of {watched.source['dataset']}"
        warnings.append(f"only the first {measured} are measured; --nsamples says how many")
    windows, seqlen = watched.ids.shape
    dtype = _precision(request, saved, previous, (baseline or candidates[0]).dtype, device)
    needs = estimate.needs(subjects, dtype=dtype, device=device.type, seqlen=seqlen, paired=baseline is not None)
    room = devices.room(device)
    needs.check(windows * seqlen, seqlen, room, request.max_memory)
    if request.tasks is not None:
        estimate.require_whole(subjects, dtype=dtype, room=room, limit=request.max_memory)
    batch = min(windows_at_once(subject.source, seqlen, device.type) for subject in subjects)
    setup = Setup(DTYPES[dtype], device, batch, request.trust_remote_code, clock, progress)
    tasks = extras.prepare(request, [subject.source.folder for subject in subjects], clock)
    job = Job(request, baseline, saved, candidates, watched, first.tokenizer, dtype, setup, tasks, previous, warnings)
    if previous is not None:
        with clock.phase("read"):
            against.require_comparable(sections.outline(job), previous)
    return job


def _precision(
    request: EvaluateRequest, saved: Saved | None, previous: dict[str, Any] | None, stored: str, device: torch.device
) -> str:
    """What all models run in, as safetensors spells it: by default that of what they are compared with, which may have
    been measured on another processor. stored: of most weights.
    """
    if request.dtype == "auto" and saved is not None:
        return saved.identity.dtype
    asked = request.dtype
    if asked == "auto" and previous is not None and previous["command"] == "evaluate":
        asked = against.precision(previous)
    return hardware.forward_dtype(asked, stored, device.type)


def _same_tokens(first: Subject, subjects: list[Subject]) -> list[str]:
    """Raises InputError if a tokenizer differs from that of `first`. Returns what the user should know."""
    warnings = []
    for subject in subjects:
        if subject.tokenizer is None:
            warnings.append(f"{subject.given} has no tokenizer, that of {first.given} is used")
        elif subject is not first:
            vocabulary.require_same(first.tokenizer, subject.tokenizer, first.given, subject.given)
    sizes = sorted({subject.vocabulary for subject in subjects})
    if len(sizes) > 1:
        warnings.append(f"vocabularies of {sizes[-1]:,} and {sizes[0]:,} tokens: compared on those that both have")
    return warnings


def _text(request: EvaluateRequest, subjects: list[Subject], tokenizer: Any, saved: Saved | None) -> Text:
    """The text to measure on. Raises InputError if predictions were saved for another, or of another model."""
    least = min(subject.vocabulary for subject in subjects)
    longest = min(subject.longest for subject in subjects)
    watched = text.read(request.text, tokenizer, vocab_size=least, max_length=longest)
    if saved is not None:
        saved.require(watched.source["ids_sha256"])
        _same_model(saved)
        if saved.identity.vocabulary > least:
            raise InputError(
                f"{saved.folder} was saved for a vocabulary of {saved.identity.vocabulary}, a model has {least}",
                "give the original model as --baseline: vocabularies can then be cut to what they share",
            )
    return watched


def _same_model(saved: Saved) -> None:
    """If the model that was saved is still where it was, it must still be that model."""
    folder = Path(saved.identity.model)
    if folder.is_dir():
        with open_dense(folder) as source:
            saved.require_model(saved.identity.model, digest(source))


def _measure(job: Job, saver: Saver | None) -> dict[str, Any]:
    dense: Reader | Saved | None = job.saved
    if job.baseline is not None:
        dense = _read(job, job.baseline)
    plus = extras.Extras(job)
    reference = plus.baseline(job.baseline)
    candidates = []
    for subject in job.candidates:
        candidates.append(_candidate(job, subject, dense, saver, plus))
        if saver is not None:  # the first candidate has seen all that the baseline predicts
            saver.finish(sections.identity(job, job.baseline or subject))
            saver = None
    return sections.report(job, candidates, reference)


def _read(job: Job, subject: Subject) -> Reader:
    """The model after it has read the text; with half the batch if the device runs out of memory."""
    setup = job.setup
    setup.progress.phase(f"reading with {subject.name}")
    reader, fallback = devices.fitting(
        lambda batch: read(subject.source, job.ids, replace(setup, batch=batch)),
        setup.batch,
        setup.progress,
        lambda batch, error: MemoryLimitError(
            f"{subject.given}: the device ran out of memory with {batch} windows at a time: {error}",
            "--nsamples and --seqlen make it less, --device cpu does without the device",
        ),
    )
    if fallback is not None:
        job.fallbacks.append(fallback)
    if reader.broken is not None:
        job.warnings.append(f"{subject.given}: {reader.broken} are NaN or infinite in {setup.dtype}")
        setup.progress.warn(job.warnings[-1])
    return reader


def _candidate(
    job: Job, subject: Subject, dense: Reader | Saved | None, saver: Saver | None, plus: "extras.Extras"
) -> dict[str, Any]:
    """The report's section on one candidate."""
    setup = job.setup
    compressed = _read(job, subject)
    setup.progress.phase(f"measuring {subject.name}")
    size = sections.size(job, subject)
    kind = torch.from_numpy(job.text.kind)
    dtype = str(setup.dtype).removeprefix("torch.")
    found: Scores | torch.Tensor
    with setup.clock.phase("score"):
        if dense is None:
            found = compare.alone(compressed, job.ids, setup.device, saver)
            section = fidelity.alone(found, dtype, job.text.scored_bytes)
        else:
            found = compare.scores(dense, compressed, job.ids, setup.device, saver)
            section = fidelity.summarise([found], dtype, job.text.scored_bytes)
    del compressed
    after = found.compressed_nll if isinstance(found, Scores) else found
    if where := compare.where_not_finite(after):
        job.warnings.append(f"{subject.given}: perplexity is not finite, first at {where}")
        setup.progress.warn(job.warnings[-1])
    tasks, speed = plus.tasks(subject), plus.speed(subject)
    complete = all(failure["model"] != subject.given for failure in job.failures)
    checked = gates.evaluate(job.request.gates, section, {"output_bytes": size["bytes"]}, tasks, speed)
    return {
        "name": subject.name,
        "source": subject.describe(),
        "size": size,
        "fidelity": section,
        "domains": worst.domains(found, kind, job.text.kinds),
        "worst": worst.contexts(found, job.ids, job.tokenizer) if isinstance(found, Scores) else [],
        "tasks": tasks,
        "speed": speed,
        "gates": checked,
        "passed": complete and gates.measurable(section) and all(gate["passed"] for gate in checked),
    }
