"""The plan of `llmpare prune` with a mask: how many weights of which linears become zero, and how they are stored."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llmpare.compress import formats, prune
from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.estimate import Work, needs_of
from llmpare.compress.model.layout import Linear
from llmpare.compress.planning import idle_patterns, opened
from llmpare.compress.prune.request import MEASURED, MaskRequest
from llmpare.compress.request import NO_TEXT, Scheme
from llmpare.compress.storage import StoredPlan, stored_specs

# Measured, and rounded up: float32 copies at the peak of a method, of the weights and of the Gram matrix.
_COPIES = {"magnitude": (12, 3), "wanda": (13, 3), "sparsegpt": (14, 7), "alps": (18, 6)}
_COPIES_THEN = (18, 9)
SAMPLE = 1024  # tokens that are followed to the end once for every part of the model, to measure what it costs
_PARTS = 4  # of a block: its inputs that linears share


@dataclass(frozen=True)
class MaskPlan(StoredPlan):
    """The fate of every tensor when weights become zero.

    sparsity: the share of zeros of every linear; 0 leaves it as it is. Under --allocation measured it is the mean until
    the survey has been made.
    """

    request: MaskRequest
    sparsity: Mapping[Linear, float]

    @property
    def compressed(self) -> Sequence[Linear]:
        """See Plan."""
        return self._compressed

    @cached_property
    def _compressed(self) -> tuple[Linear, ...]:
        return tuple(linear for linear in self.layout.linears if self.sparsity[linear] or self.schemes[linear])

    def fate(self, name: str) -> str:
        """See Plan."""
        linear = self._by_weight.get(name)
        if linear is None:
            return "copied"
        scheme = self.schemes[linear]
        parts = [self._zeros(linear)] if self.sparsity[linear] else []
        parts += [scheme.name] if scheme else []
        return ", ".join(parts) or "dense, as asked"

    def _zeros(self, linear: Linear) -> str:
        if self.request.pattern is not None:
            return f"{self.request.pattern.name} sparse"
        measured = ", more or less by measured cost" if self.request.allocation == MEASURED else ""
        return f"{self.sparsity[linear]:.0%} zeros{measured}"

    def outcome(self) -> str:
        """See Plan."""
        weights = sum(linear.rows * linear.columns for linear in self.layout.linears)
        zeros = sum(linear.rows * linear.columns * self.sparsity[linear] for linear in self.layout.linears)
        stored = f", linears {self.linear_bits:.2f} bits per weight" if self.quantized else ""
        return f"{zeros / weights:.0%} of the weights in linears zero{stored}"

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values, one entry per tensor."""
        return {
            **super().to_json(),
            "method": self.request.method,
            "format": self.request.format if self.quantized else "dense",
            "linear_bits_per_weight": round(self.linear_bits, 4) if self.compressed else None,
        }

    def lines(self) -> list[str]:
        """See Plan."""
        return [*super().lines(), *(f"note     {line}" for line in self.saved())]

    def saved(self) -> list[str]:
        """What the mask saves and what it does not, in plain sentences."""
        lines = []
        if self.quantized:
            lines.append("the zeros are stored as codes like any others: the mask makes the file no smaller")
        else:
            lines.append(
                "the zeros are stored: the file is no smaller, except when it is compressed (zip, zstd) to travel"
            )
        if self.request.pattern is None:
            lines.append(
                "no common runtime computes faster with zeros that are scattered: expect the speed of the dense model"
            )
        elif (self.request.pattern.kept, self.request.pattern.of) == (2, 4):
            lines.append(
                "2:4 runs faster where matrices are turned into sparse ones on NVIDIA GPUs since Ampere: PyTorch's "
                "torch.sparse.to_sparse_semi_structured, TensorRT-LLM; vLLM has dropped its 2:4 kernels"
            )
        else:
            lines.append(f"no common runtime computes faster with {self.request.pattern.name}; hardware knows only 2:4")
        lines.append("to get a smaller and faster model everywhere, remove whole channels: --ffn 0.75")
        return lines

    def sections(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See Plan."""
        linears = [linear for record in records for linear in record["linears"]]
        weights = sum(linear["rows"] * linear["columns"] for linear in linears)
        zeros = sum(linear["zeros"] for linear in linears)
        return {
            "mask": {
                "weights": weights,
                "zeros": zeros,
                "sparsity": zeros / weights if weights else 0.0,
                "pattern": self.request.pattern.name if self.request.pattern else None,
                "allocation": self.request.allocation,
                "saved": self.saved(),
            }
        }

    def allotted(self, sparsity: Mapping[str, float]) -> "MaskPlan":
        """The plan with the sparsity that a survey found for every linear, by name."""
        return replace(self, sparsity={linear: sparsity[linear.name] for linear in self.layout.linears})


def plan_masks(request: MaskRequest, device: str | None = None) -> MaskPlan:
    """The plan of a run that sets weights to zero. Raises for everything that cannot work and can be known now."""
    method = prune.find(request.method)
    form = formats.find(request.format)
    options = dict(request.options)
    wants = method.needs_text or options[prune.REFIT] or request.then or request.allocation == MEASURED
    if request.calibration.dataset == NO_TEXT and wants:
        raise UsageError(
            f"--method {request.method} as asked for needs calibration text",
            "give a --dataset, or use --method magnitude alone",
        )
    with opened(request, device) as (checkpoint, subject):
        found = subject.layout
        ignored = {n for n in found.linears if any(re.search(pattern, n.name) for pattern in request.ignore)}
        sparsity = {linear: 0.0 if linear in ignored else request.sparsity for linear in found.linears}
        then = request.then
        schemes = {n: None if then is None or n in ignored else then.fitted(n.columns) for n in found.linears}
        _refuse_odd_patterns(request, sparsity)
        if request.allocation == MEASURED and found.experts:
            raise UsageError(
                f"--allocation measured cuts all inputs of a block in turn, and {found.architecture} has experts",
                "use --allocation uniform",
            )
        copies = _COPIES_THEN if request.then else _COPIES[request.method]
        followed = _PARTS * len(found.blocks) * max(SAMPLE, subject.seqlen) if request.allocation == MEASURED else 0
        work = Work(*copies, followed=followed)
        needs = needs_of(
            checkpoint, found, request, work, dtype=subject.dtype, seqlen=subject.seqlen, device=subject.device
        )
        if not (method.corrects or options[prune.REFIT] or request.then):
            needs = replace(
                needs, waiting_per_token=0
            )  # what earlier linears lost, later ones could only take as given
        plan = MaskPlan(
            **vars(subject),
            request=request,
            specs=tuple(stored_specs(checkpoint, found, schemes, form)),
            needs=needs,
            warnings=(*idle_patterns(request.ignore, found), *(form.notes(schemes) if request.then else ())),
            schemes=schemes,
            format=form,
            base=request.then or Scheme(),
            sparsity=sparsity,
        )
    if ignored == set(found.linears):
        raise InputError("no linear is left to prune", "loosen --ignore")
    return plan


def _refuse_odd_patterns(request: MaskRequest, sparsity: Mapping[Linear, float]) -> None:
    if request.pattern is None:
        return
    size = request.pattern.of
    odd = [f"{n.name} [{n.rows}, {n.columns}]" for n, zeros in sparsity.items() if zeros and n.columns % size]
    if odd:
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise InputError(
            f"pattern {request.pattern.name} does not divide the columns of {', '.join(odd[:5])}{more}",
            "choose another --pattern, or leave these dense with --ignore",
        )
