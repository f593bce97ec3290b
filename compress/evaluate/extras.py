"""What an evaluation measures besides fidelity, when it is asked to: scores on tasks, and speed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpare.compress.evaluate.models import Subject
from llmpare.compress.evaluate.request import EvaluateRequest, SpeedRequest
from llmpare.compress.evaluate.stream import Setup

if TYPE_CHECKING:
    from llmpare.compress.evaluate.tasks import TaskScores


def check(request: EvaluateRequest, models: Sequence[Path]) -> None:
    """Raises UsageError or InputError for tasks and engines there are not, before a model runs."""
    asked = request.tasks
    if asked is not None:
        from llmpare.compress.evaluate import tasks

        tasks.check(asked.names, limit=asked.limit, num_fewshot=asked.num_fewshot, include=asked.include)
    if request.speed is not None:
        from llmpare.compress.evaluate.speed import measure as speed

        for model in models:
            speed.check(model, **_arguments(request.speed))


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

    def __init__(self, request: EvaluateRequest, setup: Setup) -> None:
        self._request = request
        self._setup = setup
        self._scores: TaskScores | None = None
        self.warnings: list[str] = []

    def baseline(self, subject: Subject | None) -> dict[str, Any]:
        """What the report says besides of the baseline: its speed."""
        if subject is None:
            return {"speed": None}
        self._scores = self._task_scores(subject)
        return {"speed": self.speed(subject)}

    def tasks(self, subject: Subject) -> dict[str, Any] | None:
        """The report's `tasks` section of a candidate; None if it was not asked for."""
        scores = self._task_scores(subject)
        if scores is None:
            return None
        from llmpare.compress.evaluate import tasks

        return tasks.compare(scores, self._scores)

    def speed(self, subject: Subject) -> dict[str, Any] | None:
        """The report's `speed` section of a model; None if it was not asked for."""
        asked, setup = self._request.speed, self._setup
        if asked is None:
            return None
        from llmpare.compress.evaluate.speed import measure as speed

        setup.progress.phase(f"timing {subject.name}")
        with setup.clock.phase("speed"):
            return speed.measure(
                subject.source.folder,
                **_arguments(asked),
                device=setup.device,
                dtype=setup.dtype,
                trust=setup.trust,
                max_memory=self._request.max_memory,
                progress=setup.progress,
            )

    def _task_scores(self, subject: Subject) -> "TaskScores | None":
        asked, setup = self._request.tasks, self._setup
        if asked is None:
            return None
        from llmpare.compress.evaluate import tasks

        setup.progress.phase(f"tasks with {subject.name}")
        with setup.clock.phase("tasks"):
            scores = tasks.run(
                subject.source,
                asked.names,
                limit=asked.limit,
                num_fewshot=asked.num_fewshot,
                include=asked.include,
                dtype=setup.dtype,
                device=setup.device,
                batch_size=asked.batch_size,
                trust=setup.trust,
                progress=setup.progress,
            )
        self.warnings += [f"{subject.given}: {warning}" for warning in scores.warnings]
        return scores
