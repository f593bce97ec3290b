"""The command that sets weights to zero: plan, survey and treatment put together."""

from llmpare.compress.command import Command, Survey
from llmpare.compress.prune import look
from llmpare.compress.prune.block import MaskBlocks
from llmpare.compress.prune.plan import MaskPlan, plan_masks
from llmpare.compress.prune.request import MEASURED


def _survey(plan: MaskPlan) -> Survey | None:
    measured = plan.request.allocation == MEASURED and 0 < plan.request.sparsity < 1
    return Survey(look.look, look.settle) if measured else None


MASKS = Command("prune", plan_masks, MaskBlocks, _survey)
