"""The command that removes structure: plan, survey and treatment put together."""

from llmpare.compress.clock import Clock
from llmpare.compress.command import Command, Survey
from llmpare.compress.engine import Treatment
from llmpare.compress.model.models import Models
from llmpare.compress.prune import survey
from llmpare.compress.prune.decide import plan_shrink
from llmpare.compress.prune.shrink import ShrinkBlocks
from llmpare.compress.prune.surgery import ShrinkPlan
from llmpare.compress.prune.thin import ThinBlocks


def _survey(plan: ShrinkPlan) -> Survey | None:
    return Survey(survey.look, survey.settle) if survey.needed(plan) else None


def _treatment(plan: ShrinkPlan, models: Models, clock: Clock) -> Treatment:
    return ShrinkBlocks(plan, models, clock) if plan.remaining is None else ThinBlocks(plan, models, clock)


SHRINK = Command("prune", plan_shrink, _treatment, _survey)
