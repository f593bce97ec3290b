"""What a run will do with every tensor, and what it needs, from headers alone: no torch, no weights, under a second.

Everything that can be refused early is refused here, so that no run dies in its third hour of something its first
second could have told.
"""

from collections.abc import Callable
from typing import Any

from llmpare.compress import memory
from llmpare.compress.errors import MemoryLimitError, OutputError
from llmpare.compress.estimate import disk_free
from llmpare.compress.planning import Plan
from llmpare.compress.prune.cut import ShrinkRequest
from llmpare.compress.prune.experts import plan_structure
from llmpare.compress.prune.plan import plan_masks
from llmpare.compress.prune.request import MaskRequest, PruneRequest
from llmpare.compress.quantize.plan import plan_quantize

__all__ = ["Plan", "check_room", "plan_prune", "plan_quantize"]


_PRUNING: dict[type[PruneRequest], Callable[[Any], Plan]] = {MaskRequest: plan_masks, ShrinkRequest: plan_structure}


def plan_prune(request: PruneRequest) -> Plan:
    """The plan of a prune run, whatever it removes."""
    return _PRUNING[type(request)](request)


def check_room(plan: Plan, room: int) -> None:
    """Raises MemoryLimitError or OutputError when `room` bytes, --max-memory or the disk do not hold the plan."""
    request, need = plan.request, plan.needs.memory
    limit = request.max_memory
    have = room if limit is None else min(room, limit)
    if need > have:
        what = f"--max-memory {memory.show(have)}" if have == limit else f"{memory.show(have)} available"
        fit = plan.needs.largest_sample(have, plan.seqlen)
        hint = f"--nsamples {fit} fits" if fit else "no number of windows fits; use a larger machine"
        raise MemoryLimitError(f"the run needs about {memory.show(need)} of memory, there is {what}", hint)
    free = disk_free(request.out)
    if plan.output_bytes > free:
        raise OutputError(
            f"{request.out}: the output needs {memory.show(plan.output_bytes)} of disk, {memory.show(free)} are free",
            "free some space or choose another place with -o",
        )
