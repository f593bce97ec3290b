"""What an evaluation measures besides fidelity, when it is asked to: scores on tasks, and speed.

A part that fails is a fact of the report: it comes last, and what was measured before it may have taken hours.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmpare.compress import memory
from llmpare.compress.clock import Clock
from llmpare.compress.errors import LlmpareError
from llmpare.compress.evaluate.models import Subject
from llmpare.compress.evaluate.request import EvaluateRequest, SpeedRequest
from llmpare.compress.evaluate.sections import Job

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict

    from llmpare.compress.evaluate.tasks import TaskScores

_Found = TypeVar("_Found")


def prepare(request: EvaluateRequest, models: Sequence[Path], clock: Clock) -> "Mapping[str, TaskDict]":
    """The tasks that are asked for, with their documents.

    Raises UsageError or InputError for tasks and engines that there are not, or that cannot be used.
    """
    if request.speed is not None:
        from llmpare.compress.evaluate.speed import measure as speed

        for model in models:
            speed.check(model, **_arguments(request.speed))
    if request.tasks is None:
        return {}
    from llmpare.compress.evaluate import tasks

    with clock.phase("tasks"):
        return tasks.prepare(request.tasks)


def _arguments(asked: SpeedRequest) -> dict[str, Any]:
    return {
        "engines": asked.engines,
        "batches": asked.batch_sizes,
        "prompts": asked.prompt_lengths,
        "new_tokens": asked.new_tokens,
        "repeats": asked.repeats,
        "variations": asked.variations,
    }


class Extras:
    """Tasks and speed of one evaluation; the baseline is to be measured first."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._scores: TaskScores | None = None

    def baseline(self, subject: Subject | None) -> dict[str, Any]:
        """What the report says besides of the baseline: its speed."""
        if subject is None:
            return {"speed": None}
        if self._job.request.tasks is not None:
            self._scores = self._part("tasks", subject, lambda: self._answers(subject))
        return {"speed": self.speed(subject)}

    def tasks(self, subject: Subject) -> dict[str, Any] | None:
        """The report's `tasks` section of a candidate; None if it was not asked for, or failed."""
        if self._job.request.tasks is None:
            return None
        from llmpare.compress.evaluate import tasks

        return self._part("tasks", subject, lambda: tasks.compare(self._answers(subject), self._scores))

    def speed(self, subject: Subject) -> dict[str, Any] | None:
        """The report's `speed` section of a model; None if it was not asked for, or failed."""
        asked, setup = self._job.request.speed, self._job.setup
        if asked is None:
            return None
        from llmpare.compress.evaluate.speed import measure as speed

        return self._part(
            "speed",
            subject,
            lambda: speed.measure(
                subject.source.folder,
                **_arguments(asked),
                device=setup.device,
                dtype=setup.dtype,
                trust=setup.trust,
                max_memory=self._job.request.max_memory,
                progress=setup.progress,
            ),
        )

    def _answers(self, subject: Subject) -> "TaskScores":
        job, setup = self._job, self._job.setup
        assert job.request.tasks is not None
        from llmpare.compress.evaluate import tasks

        scores = tasks.run(
            subject.source,
            job.tasks,
            job.request.tasks,
            dtype=setup.dtype,
            device=setup.device,
            trust=setup.trust,
            progress=setup.progress,
        )
        job.warnings += [f"{subject.given}: {warning}" for warning in scores.warnings]
        for why in scores.failures:
            self._fail("tasks", subject, why)
        return scores

    def _part(self, name: str, subject: Subject, work: Callable[[], _Found]) -> _Found | None:
        """What the work finds, or None if it fails in a way that is no bug."""
        setup = self._job.setup
        setup.progress.phase(f"{name} of {subject.name}")
        try:
            with setup.clock.phase(name):
                return work()
        except LlmpareError as error:
            why = f"{error.message}; {error.hint}" if error.hint else error.message
        except (MemoryError, RuntimeError) as error:
            if not memory.exhausted(error):
                raise
            why = "out of memory"
        self._fail(name, subject, why)
        return None

    def _fail(self, name: str, subject: Subject, why: str) -> None:
        self._job.failures.append({"model": subject.given, "part": name, "why": why})
        self._job.setup.progress.warn(f"{subject.given}: {name}: {why}")
