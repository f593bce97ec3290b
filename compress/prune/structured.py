"""The command that removes structure: plan, survey and treatment put together."""

from llmpare.compress.clock import Clock
from llmpare.compress.command import Command, Survey
from llmpare.compress.engine import Treatment
from llmpare.compress.model.models import Models
from llmpare.compress.planning import Plan
from llmpare.compress.prune import survey
from llmpare.compress.prune.drop import DropExperts
from llmpare.compress.prune.experts import ExpertPlan, plan_structure
from llmpare.compress.prune.shrink import ShrinkBlocks
from llmpare.compress.prune.surgery import ShrinkPlan
from llmpare.compress.prune.thin import ThinBlocks


def _survey(plan: Plan) -> Survey | None:
    if not isinstance(plan, ShrinkPlan):
        return None
    return Survey(survey.look, survey.settle) if survey.needed(plan) else None


def _treatment(plan: Plan, models: Models, clock: Clock) -> Treatment:
    if isinstance(plan, ExpertPlan):
        return DropExperts(plan, models, clock)
    assert isinstance(plan, ShrinkPlan)
    return ShrinkBlocks(plan, models, clock) if plan.remaining is None else ThinBlocks(plan, models, clock)


SHRINK = Command("prune", plan_structure, _treatment, _survey)
