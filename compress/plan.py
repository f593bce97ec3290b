"""What a run will do with every tensor, and what it needs, from headers alone: no torch, no weights, under a second.

Everything that can be refused early is refused here, so that no run dies in its third hour of something its first
second could have told.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmpare.compress import formats, memory, quantize
from llmpare.compress.calibration import DEFAULT_SEQLEN
from llmpare.compress.checkpoint import locate
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.checkpoint.write import TensorSpec
from llmpare.compress.errors import InputError, MemoryLimitError, OutputError, UsageError
from llmpare.compress.estimate import Needs, disk_free, needs
from llmpare.compress.model.layout import Layout, Linear, find, layout
from llmpare.compress.request import GROUP_SIZES, NO_TEXT, PER_CHANNEL, QuantizeRequest, Scheme

# Servers join these into one matrix when they load, so their rows must be stored alike.
FUSED_BY_SERVERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Plan:
    """The fate of every tensor. schemes: every linear of every block; None stays dense."""

    request: QuantizeRequest
    model: Path
    layout: Layout
    schemes: dict[Linear, Scheme | None]
    specs: tuple[TensorSpec, ...]  # of the output, in the order of the file
    dtype: str  # the precision of the forward passes, as safetensors spells it
    seqlen: int
    longest: int  # tokens the model allows
    vocabulary: int
    parameters: int
    source_bytes: int
    output_bytes: int
    needs: Needs
    warnings: tuple[str, ...]

    @property
    def sequential(self) -> bool:
        """Whether linears of a block are solved one after the other within a single forward: see collect."""
        return self.needs.sequential

    @property
    def format(self) -> formats.Format:
        """The output format."""
        return formats.find(self.request.format)

    @cached_property
    def quantized(self) -> dict[Linear, Scheme]:
        """The linears that are quantized, with their schemes."""
        return {linear: scheme for linear, scheme in self.schemes.items() if scheme is not None}

    @property
    def linear_bytes(self) -> int:
        """Bytes of the quantized linears in the output, all their tensors but biases counted."""
        return sum(
            spec.nbytes for linear, scheme in self.quantized.items() for spec in self.format.specs(linear, scheme)
        )

    @property
    def linear_bits(self) -> float:
        """The same per weight, in bits."""
        return 8 * self.linear_bytes / sum(linear.rows * linear.columns for linear in self.quantized)

    def specs_of(self, index: int) -> dict[str, TensorSpec]:
        """The output tensors of one block, by name."""
        names = set(self.layout.blocks[index])
        names |= {
            s.name for n in self.layout.of_block(index) if (c := self.schemes[n]) for s in self.format.specs(n, c)
        }
        return {spec.name: spec for spec in self.specs if spec.name in names}

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values, one entry per tensor."""
        return {
            "command": "plan",
            "model": str(self.model),
            "architecture": self.layout.architecture,
            "blocks": len(self.layout.blocks),
            "format": self.request.format,
            "method": self.request.method,
            "tensors": [dict(zip(("name", "shape", "dtype", "fate"), fate, strict=True)) for fate in self._fates()],
            "linear_bits_per_weight": round(self.linear_bits, 4),
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "memory_bytes": self.needs.memory,
            "disk_bytes": self.output_bytes,
            "warnings": list(self.warnings),
        }

    def lines(self) -> list[str]:
        """The plan for people: tensors that differ only in the number of their block share a line."""
        seen = Counter(
            (re.sub(r"\.\d+\.", ".*.", name), str(shape), dtype, fate) for name, shape, dtype, fate in self._fates()
        )
        width = max(len(key[0]) for key in seen)
        lines = [f"{self.layout.architecture}, {len(self.layout.blocks)} blocks, {self.parameters:,} parameters", ""]
        for (name, shape, dtype, fate), count in seen.items():
            lines.append(f"{count:5} × {name:{width}}  {shape:16} {dtype:5} → {fate}")
        lines += [
            "",
            f"output   {memory.show(self.output_bytes)} from {memory.show(self.source_bytes)}"
            f" ({self.output_bytes / self.source_bytes:.0%}), linears {self.linear_bits:.2f} bits per weight",
            f"memory   about {memory.show(self.needs.memory)}: {self.needs.explain()}",
            f"disk     {memory.show(self.output_bytes)} in {self.request.out.absolute().parent}",
        ]
        return lines + [f"note     {warning}" for warning in self.warnings]

    def _fates(self) -> Iterator[tuple[str, list[int], str, str]]:
        by_weight = {linear.weight: (linear, scheme) for linear, scheme in self.schemes.items()}
        with Checkpoint.open(self.model) as checkpoint:
            tensors = checkpoint.tensors
        for name in (*self.layout.outside, *(name for block in self.layout.blocks for name in block)):
            linear, scheme = by_weight.get(name, (None, None))
            fate = scheme.name if scheme else "dense, as asked" if linear else "copied"
            yield name, list(tensors[name].shape), tensors[name].dtype, fate


def plan_quantize(request: QuantizeRequest) -> Plan:
    """The plan of a quantize run. Raises for everything that cannot work and can be known now."""
    method, form = quantize.find(request.method), formats.find(request.format)
    if request.calibration.dataset == NO_TEXT and method.needs_text:
        raise UsageError(f"--method {request.method} needs calibration text", "give a --dataset, or use --method rtn")
    model = locate.resolve(request.model, revision=request.revision)
    _refuse_nested(model, request.out)
    with Checkpoint.open(model) as checkpoint:
        config = checkpoint.config
        _refuse_custom_code(config, request.trust_remote_code)
        found = layout(checkpoint)
        schemes, warnings = _schemes(request, found)
        form.check(schemes)
        specs = tuple(_specs(checkpoint, found, schemes, form))
        longest = find(config, "max_position_embeddings", "n_positions", default=DEFAULT_SEQLEN)
        seqlen = request.calibration.seqlen or min(DEFAULT_SEQLEN, longest)
        dtype = _dtype(request.dtype, checkpoint, found)
        required = needs(checkpoint, found, schemes, request, dtype=dtype, seqlen=seqlen)
        parameters = sum(info.numel for info in checkpoint.tensors.values())
        source_bytes = sum(info.nbytes for info in checkpoint.tensors.values())
    plan = Plan(
        request=request,
        model=model,
        layout=found,
        schemes=schemes,
        specs=specs,
        dtype=dtype,
        seqlen=seqlen,
        longest=longest,
        vocabulary=find(config, "vocab_size", default=0),
        parameters=parameters,
        source_bytes=source_bytes,
        output_bytes=sum(spec.nbytes for spec in specs),
        needs=required,
        warnings=(*warnings, *form.notes(schemes)),
    )
    if not plan.quantized:
        raise InputError("no linear is left to quantize", "loosen --ignore or the layers of the config file")
    return plan


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


def _refuse_nested(model: Path, out: Path) -> None:
    source, target = model.resolve(), out.absolute().parent.resolve() / out.name
    if source == target or source in target.parents or target in source.parents:
        raise UsageError(
            f"the output {out} and the model {model} lie inside each other", "choose another place with -o"
        )


def _refuse_custom_code(config: dict[str, Any], trusted: bool) -> None:
    if "auto_map" in config and not trusted:
        raise InputError(
            "config.json has an auto_map: this model runs code from the model folder",
            "read that code, then add --trust-remote-code",
        )


def _schemes(request: QuantizeRequest, found: Layout) -> tuple[dict[Linear, Scheme | None], list[str]]:
    """The scheme of every linear: the first rule that matches, else the request's."""
    schemes: dict[Linear, Scheme | None] = {}
    used: set[str] = set()
    for linear in found.linears:
        rule = next((rule for rule in request.rules if re.search(rule.pattern, linear.name)), None)
        schemes[linear] = request.scheme if rule is None else rule.scheme
        if rule is not None:
            used.add(rule.pattern)
    everything = " ".join((*found.outside, "lm_head"))
    idle = [
        rule.pattern for rule in request.rules if rule.pattern not in used and not re.search(rule.pattern, everything)
    ]
    _refuse_divided(schemes)
    _refuse_odd_groups(schemes)
    return schemes, [f"pattern {pattern!r} matches no linear" for pattern in idle]


def _refuse_divided(schemes: dict[Linear, Scheme | None]) -> None:
    by_name = {linear.name: scheme for linear, scheme in schemes.items()}
    for name, scheme in by_name.items():
        parent, _, leaf = name.rpartition(".")
        for family in FUSED_BY_SERVERS:
            siblings = [f"{parent}.{other}" for other in family if leaf in family]
            different = [other for other in siblings if other in by_name and by_name[other] != scheme]
            if different:
                raise InputError(
                    f"{name} and {different[0]} have different schemes, but servers join them into one matrix",
                    f"let one pattern match all of {', '.join(family)}",
                )


def _refuse_odd_groups(schemes: dict[Linear, Scheme | None]) -> None:
    sizes = {linear.columns for linear, scheme in schemes.items() if scheme and scheme.group_size != PER_CHANNEL}
    odd = [
        f"{linear.name} [{linear.rows}, {linear.columns}]"
        for linear, scheme in schemes.items()
        if scheme and scheme.group_size != PER_CHANNEL and linear.columns % scheme.group_size
    ]
    if odd:
        fit = next(
            (size for size in sorted(GROUP_SIZES, reverse=True) if all(c % size == 0 for c in sizes)), PER_CHANNEL
        )
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise InputError(
            f"the group size does not divide the columns of {', '.join(odd[:5])}{more}",
            f"--group-size {fit} divides all of them; or leave these dense with --ignore",
        )


def _specs(
    checkpoint: Checkpoint, found: Layout, schemes: dict[Linear, Scheme | None], form: formats.Format
) -> Iterator[TensorSpec]:
    by_weight = {linear.weight: (linear, scheme) for linear, scheme in schemes.items()}
    for name in (*found.outside, *(name for block in found.blocks for name in block)):
        linear, scheme = by_weight.get(name, (None, None))
        if linear is not None and scheme is not None:
            yield from form.specs(linear, scheme)
        else:
            yield TensorSpec(name, checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape)


def _dtype(asked: str, checkpoint: Checkpoint, found: Layout) -> str:
    """The precision of the forward passes: the one asked for, else the one most weights are stored in."""
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    if asked == "auto":
        counts: Counter[str] = Counter()
        for linear in found.linears:
            counts[linear.dtype] += checkpoint.tensors[linear.weight].numel
        return counts.most_common(1)[0][0]
    if asked not in names:
        raise UsageError(f"unknown dtype {asked!r}", f"--dtype takes auto, {', '.join(names)}")
    return names[asked]
