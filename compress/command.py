"""What a command decides about a run, beside its plan: see run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmpare.compress.clock import Clock
from llmpare.compress.engine import Treatment
from llmpare.compress.model.models import Model, Models
from llmpare.compress.planning import Plan
from llmpare.compress.streams import Stream
from llmpare.compress.walk import Walk


@dataclass(frozen=True)
class Survey:
    """A look at the whole model before the pass, for what headers do not tell.

    look(plan, walk, model, calibration, clock): what was learned, as JSON values. It is journalled, so that a resumed
    run does not look again. The walk stands before its blocks, the calibration stream before the first of them.
    settle(plan, learned): the plan that follows from it.
    """

    look: Callable[[Any, Walk, Model, Stream | None, Clock], Any]
    settle: Callable[[Any, Any], Plan]


@dataclass(frozen=True)
class Command:
    """What one command decides; everything else about a run is the same for all.

    plan(request, kind of device): what it will do. survey(plan): the look that this plan needs before it can be
    carried out, if any.
    """

    name: str
    plan: Callable[[Any, str], Plan]
    treatment: Callable[[Any, Models, Clock], Treatment]
    survey: Callable[[Any], Survey | None] = lambda plan: None
