"""What a run will do with every tensor, and what it needs, from headers alone: no torch, no weights, under a second.

Everything that can be refused early is refused here, so that no run dies in its third hour of something its first
second could have told.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from llmpare.compress import memory
from llmpare.compress.errors import MemoryLimitError, OutputError
from llmpare.compress.estimate import disk_free
from llmpare.compress.planning import Plan
from llmpare.compress.prune.cut import ShrinkRequest
from llmpare.compress.prune.experts import plan_structure
from llmpare.compress.prune.plan import plan_masks
from llmpare.compress.prune.request import MaskRequest, PruneRequest
from llmpare.compress.quantize.plan import plan_quantize

__all__ = ["Plan", "plan_prune", "plan_quantize", "within_room"]

_Plan = TypeVar("_Plan", bound=Plan)
_PRUNING: dict[type[PruneRequest], Callable[[Any, str | None], Plan]] = {
    MaskRequest: plan_masks,
    ShrinkRequest: plan_structure,
}


def plan_prune(request: PruneRequest, device: str | None = None) -> Plan:
    """The plan of a prune run, whatever it removes. device: see planning.opened."""
    return _PRUNING[type(request)](request, device)


def within_room(plan: _Plan, room: int) -> _Plan:
    """The plan, made to fit `room` bytes on its device, --max-memory and the disk.

    Raises MemoryLimitError or OutputError when there is no way to.
    """
    limit = plan.request.max_memory
    have = room if limit is None else min(room, limit)
    needs = plan.needs.within(have)
    if needs.memory > have:
        what = f"--max-memory {memory.show(have)}" if have == limit else f"{memory.show(have)} available"
        raise MemoryLimitError(
            f"the run needs at least {memory.show(needs.memory)} of memory, there is {what}",
            "allow more with --max-memory" if have == limit and room > needs.memory else "use a larger machine",
        )
    out, free = plan.request.out, disk_free(plan.request.out)
    if plan.file_bytes > free:
        raise OutputError(
            f"{out}: the output needs {memory.show(plan.file_bytes)} of disk, {memory.show(free)} are free",
            "free some space or choose another place with -o",
        )
    if plan.file_bytes + needs.spilled > free:
        raise OutputError(
            f"{out}: hidden states that memory has no room for need {memory.show(needs.spilled)} of disk beside the "
            f"output's {memory.show(plan.file_bytes)}, {memory.show(free)} are free",
            "free some space, choose another place with -o, allow more --max-memory, or use fewer --nsamples",
        )
    return replace(plan, needs=needs)
