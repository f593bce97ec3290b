"""The plan of `llmpare quantize`: the scheme of every linear, and how it is stored."""

import re
from dataclasses import dataclass
from typing import Any

from llmpare.compress import formats, quantize
from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.estimate import needs
from llmpare.compress.model.layout import Layout, Linear
from llmpare.compress.planning import idle_patterns, opened
from llmpare.compress.request import NO_TEXT, QuantizeRequest, Scheme
from llmpare.compress.storage import StoredPlan, stored_specs


@dataclass(frozen=True)
class QuantizePlan(StoredPlan):
    """The fate of every tensor when linears are quantized."""

    request: QuantizeRequest

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values, one entry per tensor."""
        return {
            **super().to_json(),
            "format": self.request.format,
            "method": self.request.method,
            "linear_bits_per_weight": round(self.linear_bits, 4),
        }


def plan_quantize(request: QuantizeRequest) -> QuantizePlan:
    """The plan of a quantize run. Raises for everything that cannot work and can be known now."""
    method, form = quantize.find(request.method), formats.find(request.format)
    if request.calibration.dataset == NO_TEXT and method.needs_text:
        raise UsageError(f"--method {request.method} needs calibration text", "give a --dataset, or use --method rtn")
    with opened(request) as (checkpoint, subject):
        schemes, warnings = _schemes(request, subject.layout)
        plan = QuantizePlan(
            **vars(subject),
            request=request,
            specs=tuple(stored_specs(checkpoint, subject.layout, schemes, form)),
            needs=needs(checkpoint, subject.layout, schemes, request, dtype=subject.dtype, seqlen=subject.seqlen),
            warnings=(*warnings, *form.notes(schemes)),
            schemes=schemes,
            format=form,
            base=request.scheme,
        )
    if not plan.quantized:
        raise InputError("no linear is left to quantize", "loosen --ignore or the layers of the config file")
    return plan


def _schemes(request: QuantizeRequest, found: Layout) -> tuple[dict[Linear, Scheme | None], list[str]]:
    """The scheme of every linear: the first rule that matches, else the request's."""
    schemes: dict[Linear, Scheme | None] = {}
    for linear in found.linears:
        rule = next((rule for rule in request.rules if re.search(rule.pattern, linear.name)), None)
        schemes[linear] = request.scheme if rule is None else rule.scheme
    return schemes, idle_patterns([rule.pattern for rule in request.rules], found)
