"""The plan of `llmpare quantize`: the scheme of every linear, and how it is stored."""

import re
from dataclasses import dataclass
from typing import Any

from llmpare.compress import formats, quantize
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.estimate import needs
from llmpare.compress.model.layout import Layout, Linear
from llmpare.compress.planning import idle_patterns, matches_linear, matches_outside, opened
from llmpare.compress.request import NO_TEXT, QuantizeRequest, Scheme
from llmpare.compress.storage import StoredPlan, stored_specs

LEAST_SHARE = 0.5  # of the weights in the blocks, that must be in linears


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


def plan_quantize(request: QuantizeRequest, device: str | None = None) -> QuantizePlan:
    """The plan of a quantize run. Raises for everything that cannot work and can be known now."""
    method, form = quantize.find(request.method), formats.find(request.format)
    if request.calibration.dataset == NO_TEXT and method.needs_text:
        raise UsageError(f"--method {request.method} needs calibration text", "give a --dataset, or use --method rtn")
    with opened(request, device) as (checkpoint, subject):
        _refuse_little(checkpoint, subject.layout)
        _refuse_for_experts(request, subject.layout)
        _refuse_outside(request, subject.layout)
        schemes, warnings = _schemes(request, subject.layout)
        plan = QuantizePlan(
            **vars(subject),
            request=request,
            specs=tuple(stored_specs(checkpoint, subject.layout, schemes, form)),
            needs=needs(
                checkpoint,
                subject.layout,
                schemes,
                request,
                dtype=subject.dtype,
                seqlen=subject.seqlen,
                device=subject.device,
            ),
            warnings=(*warnings, *form.notes(schemes)),
            schemes=schemes,
            format=form,
            base=request.scheme,
        )
    if not plan.quantized:
        raise InputError("no linear is left to quantize", "loosen --ignore or the layers of the config file")
    return plan


def _refuse_little(checkpoint: Checkpoint, found: Layout) -> None:
    """A scheme promises a size; a model that is mostly something else cannot keep that promise."""
    linears = sum(linear.rows * linear.columns for linear in found.linears)
    whole = sum(checkpoint.tensors[name].numel for block in found.blocks for name in block)
    if linears < LEAST_SHARE * whole:
        raise InputError(
            f"only {linears / whole:.0%} of the weights in the blocks of {found.architecture} are linears, "
            "the rest would stay as it is",
            "the output would be far from the size the scheme promises: this model cannot be quantized here",
        )


def _refuse_for_experts(request: QuantizeRequest, found: Layout) -> None:
    """What has no meaning where every token goes another way."""
    if not found.experts:
        if request.route_all:
            raise UsageError(f"--route-all: {found.architecture} has no mixture of experts", "leave it out")
        return
    if quantize.find(request.method).tuner:
        raise UsageError(
            f"--method {request.method} trains whole blocks, and not those with experts, as {found.architecture} has",
            "use --method gptq",
        )
    if dict(request.options).get("correction"):
        raise UsageError(
            f"--correction compares what flows into linears, and {found.architecture} sends tokens to other experts "
            "once it is compressed",
            "leave it out",
        )


def _refuse_outside(request: QuantizeRequest, found: Layout) -> None:
    """A scheme for what stays as it is whatever is asked, such as the head; that it stays may be asked for."""
    for rule in request.rules:
        if rule.scheme is None or matches_linear(rule.pattern, found) or not matches_outside(rule.pattern, found):
            continue
        raise UsageError(
            f"layers, match {rule.pattern!r}: only linears inside the blocks are quantized, and it matches none",
            "leave the rule out: embeddings, the head and all else outside the blocks stay as they are",
        )


def _schemes(request: QuantizeRequest, found: Layout) -> tuple[dict[Linear, Scheme | None], list[str]]:
    """The scheme of every linear: the first rule that matches, else the request's; group sizes fitted, if asked for."""
    schemes: dict[Linear, Scheme | None] = {}
    for linear in found.linears:
        rule = next((rule for rule in request.rules if re.search(rule.pattern, linear.name)), None)
        scheme = request.scheme if rule is None else rule.scheme
        schemes[linear] = None if scheme is None else scheme.fitted(linear.columns)
    return schemes, idle_patterns([rule.pattern for rule in request.rules], found)
