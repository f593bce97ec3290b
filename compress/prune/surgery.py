"""The plan of structured pruning: new shapes for every tensor, and a config.json that says so.

One width holds for all blocks, so the ordinary config describes the output and every loader reads it. Which channels,
heads and blocks remain is not known yet, only how many; a survey of the model says which blocks and residual channels
(depth, hidden), the pass itself the rest (shrink).
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from llmpare.compress.checkpoint.header import tensor_bytes
from llmpare.compress.checkpoint.write import TensorSpec
from llmpare.compress.errors import UnsupportedError
from llmpare.compress.model.layout import Layout, Linear, find
from llmpare.compress.planning import Plan
from llmpare.compress.prune import structure
from llmpare.compress.prune.cut import Cut
from llmpare.compress.prune.structure import Units

DEPTH = ("num_hidden_layers", "n_layer", "n_layers")
HEALING = 0.15  # share of the parameters past which a model needs to be trained again to be of use


@dataclass(frozen=True)
class Sizes:
    """How many of each remain. heads: KV groups. blocks: which, or None until a survey has said."""

    ffn: int
    heads: int
    hidden: int
    depth: int
    blocks: tuple[int, ...] | None


@dataclass(frozen=True)
class ShrinkPlan(Plan):
    """The fate of every tensor when channels, heads or blocks are removed.

    ffn, heads: what feeds what, one entry per block; empty if it is not understood and stays. original: the source's
    config.json. remaining: the residual channels, None for all, () until a survey has said. lists: settings with one
    entry per block of the source, as transformers works them out. findings: what the survey saw, for the report.
    """

    cut: Cut
    sizes: Sizes
    ffn: tuple[Units, ...]
    heads: tuple[Units, ...]
    original: Mapping[str, Any]
    remaining: tuple[int, ...] | None = None
    lists: Mapping[str, list[Any]] = field(default_factory=dict)
    findings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compressed(self) -> Sequence[Linear]:
        """The linears that the run changes."""
        kinds = ((self.ffn, self.sizes.ffn), (self.heads, self.sizes.heads))
        names = {name for kind, keep in kinds for u in kind if keep < u.count for name in (*u.rows, u.writer.weight)}
        dropped = set(range(len(self.layout.blocks))) - set(self.blocks)
        return tuple(
            n for n in self.layout.linears if n.weight in names or n.block in dropped or self.remaining is not None
        )

    @property
    def linear_bytes(self) -> int:
        """Bytes of those linears in the output."""
        kept = set(self.blocks)
        return sum(
            tensor_bytes(linear.dtype, self.shape(linear.weight)) for linear in self.compressed if linear.block in kept
        )

    @property
    def channels(self) -> Sequence[int] | None:
        """See Plan."""
        return self.remaining

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that remain; before a survey has said which, as many of the first."""
        return tuple(range(self.sizes.depth)) if self.sizes.blocks is None else self.sizes.blocks

    def place_of(self, index: int) -> int | None:
        """See Plan."""
        return self.blocks.index(index) if index in self.blocks else None

    def renamed(self, name: str, index: int) -> str:
        """The output's name for a tensor of block `index`, which remains."""
        prefix = self.layout.prefix
        return re.sub(rf"^({re.escape(prefix)}\.?){index}\.", rf"\g<1>{self.place_of(index)}.", name)

    def specs_of(self, index: int) -> dict[str, TensorSpec]:
        """See Plan."""
        if index not in self.blocks:
            return {}
        return {spec.name: spec for spec in self._block_specs(index)}

    def shape(self, name: str) -> tuple[int, ...]:
        """What a tensor of the source becomes in the output, if its block remains."""
        shape = list(self.tensors[name].shape)
        linear = self._by_weight.get(name)
        rows, columns = (1, 0) if linear is not None and linear.transposed else (0, 1)
        for units, keep in self._units_of.get(name, ()):
            if name == units.writer.weight:
                shape[columns] = keep * units.columns
            else:
                shape[rows] = sum(keep * run.size for run in units.rows[name])
        for axis in self.hidden_axes(name):
            shape[axis] = self.sizes.hidden
        return tuple(shape)

    def hidden_axes(self, name: str) -> list[int]:
        """The axes of a source tensor that are residual channels and become fewer."""
        if self.remaining is None:
            return []
        index = self._block_of.get(name)
        units = () if index is None else (self.ffn[index], self.heads[index])
        hidden = structure.hidden_size(self.original, self.layout)
        return structure.residual_axes(self.layout, hidden, units, self.tensors, name)

    def fate(self, name: str) -> str:
        """See Plan."""
        index = self._block_of.get(name)
        if index is not None and self.sizes.blocks is not None and index not in self.sizes.blocks:
            return "removed"
        shape = self.shape(name)
        return "copied" if shape == self.tensors[name].shape else f"cut to {list(shape)}"

    def outcome(self) -> str:
        """See Plan."""
        kept = self.kept_parameters
        parts = [f"{kept:,} parameters ({1 - kept / self.parameters:.1%} removed)"]
        if self.sizes.depth < len(self.layout.blocks):
            which = "" if self.sizes.blocks is not None else ", to be chosen by measuring"
            parts.append(f"{self.sizes.depth} of {len(self.layout.blocks)} blocks{which}")
        if self.cut.searched:
            parts.append("before the search for what to remove")
        return ", ".join(parts)

    @property
    def kept_parameters(self) -> int:
        """Parameters of the output."""
        return parameters(self.specs)

    @property
    def reshaped(self) -> tuple[Layout, dict[str, Any]] | None:
        """See Plan."""
        if not self.changes:
            return None
        linears = tuple(self._linear(linear) for linear in self.layout.linears if linear.block in self.blocks)
        blocks = tuple(tuple(self.specs_of(index)) for index in self.blocks)
        return replace(self.layout, blocks=blocks, linears=linears, gates=()), new_config(self)

    @property
    def changes(self) -> bool:
        """Whether anything is removed at all."""
        return parameters(self.specs) < self.parameters

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values, one entry per tensor."""
        return {**super().to_json(), "parameters": self.parameters, "kept_parameters": self.kept_parameters}

    def sections(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See Plan."""
        removed = 1 - self.kept_parameters / self.parameters
        needs = removed > HEALING
        return {
            "structure": {
                "parameters": {"dense": self.parameters, "kept": self.kept_parameters, "removed_share": removed},
                "flops_per_token": {
                    "dense": self._flops(
                        {name: info.shape for name, info in self.tensors.items()},
                        structure.hidden_size(self.original, self.layout),
                    ),
                    "kept": self._flops({s.name: s.shape for s in self.specs}, self.sizes.hidden),
                },
                "blocks": list(self.blocks),
                "depth": self.findings.get("depth"),
                "search": self.findings.get("search"),
                "ffn_channels": self.sizes.ffn,
                "kv_groups": self.sizes.heads,
                "hidden_channels": self.sizes.hidden,
                "healing": {
                    "needed": needs,
                    "command": f"llmpare distill --teacher {self.request.model} --student {self.request.out}"
                    f" -o {self.request.out}-healed" if needs else None,
                },
            }
        }  # fmt: skip

    def _flops(self, shapes: Mapping[str, tuple[int, ...]], hidden: int) -> int:
        """Of all matrix products with weights, for one token; attention itself grows with the context."""
        inside = self.layout.prefix
        products = (s[0] * s[1] for name, s in shapes.items() if name.startswith(inside) and len(s) == 2)
        return 2 * (sum(products) + self.vocabulary * hidden)

    def _linear(self, linear: Linear) -> Linear:
        """A linear that remains, as it is in the output."""
        if linear.expert is not None:  # its block stays or goes as it is
            mixture, fused = linear.expert.mixture, linear.expert.fused
            expert = replace(
                linear.expert,
                mixture=self.renamed(mixture, linear.block),
                fused=fused and self.renamed(fused, linear.block),
            )
            place = self.place_of(linear.block)
            assert place is not None
            return replace(linear, name=self.renamed(linear.name, linear.block), block=place, expert=expert)
        shape = self.shape(linear.weight)
        rows, columns = shape[::-1] if linear.transposed else shape
        name = self.renamed(linear.weight, linear.block).removesuffix(".weight")
        place = self.place_of(linear.block)
        assert place is not None
        return replace(linear, name=name, block=place, rows=rows, columns=columns)

    def _block_specs(self, index: int) -> Iterator[TensorSpec]:
        for name in self.layout.blocks[index]:
            yield TensorSpec(self.renamed(name, index), self.tensors[name].dtype, self.shape(name))

    def all_specs(self) -> tuple[TensorSpec, ...]:
        """The tensors of the output, in the order of the file."""
        outside = (TensorSpec(n, self.tensors[n].dtype, self.shape(n)) for n in self.layout.outside)
        return (*outside, *(spec for index in self.blocks for spec in self._block_specs(index)))

    @cached_property
    def _by_weight(self) -> dict[str, Linear]:
        return {linear.weight: linear for linear in self.layout.linears}

    @cached_property
    def _block_of(self) -> dict[str, int]:
        return {name: index for index, block in enumerate(self.layout.blocks) for name in block}

    @cached_property
    def _units_of(self) -> dict[str, list[tuple[Units, int]]]:
        found: dict[str, list[tuple[Units, int]]] = {}
        for kind, keep in ((self.ffn, self.sizes.ffn), (self.heads, self.sizes.heads)):
            for units in kind:
                for name in (*units.rows, units.writer.weight):
                    found.setdefault(name, []).append((units, keep))
        return found


def parameters(specs: Sequence[TensorSpec]) -> int:
    """How many numbers these tensors hold."""
    return sum(math.prod(spec.shape) for spec in specs)


def new_config(plan: ShrinkPlan) -> dict[str, Any]:
    """The config.json of the output: the source's, with the numbers that are other ones now.

    Raises UnsupportedError for a config that cannot say them.
    """
    config, sizes, found = dict(plan.original), plan.sizes, plan.layout
    if plan.ffn and sizes.ffn != plan.ffn[0].count:
        config[_key(config, structure.CHANNELS, plan.ffn[0].count, found, "FFN channels")] = sizes.ffn
    if plan.heads and (sizes.heads != plan.heads[0].count or plan.remaining is not None):
        units = plan.heads[0]
        heads = find(config, *structure.HEADS)
        config["head_dim"] = units.columns * units.count // heads
        config[_key(config, structure.HEADS, heads, found, "attention heads")] = heads // units.count * sizes.heads
        config.update({name: sizes.heads for name in structure.KV_HEADS if config.get(name) is not None})
    if plan.remaining is not None:
        old = structure.hidden_size(config, found)
        config[_key(config, structure.HIDDEN, old, found, "residual channels")] = sizes.hidden
    if sizes.depth < len(found.blocks):
        config[_key(config, DEPTH, len(found.blocks), found, "blocks")] = sizes.depth
        per_layer = {**plan.lists, **{name: value for name, value in config.items() if _per_layer(name, value)}}
        for name, values in per_layer.items():
            if len(values) == len(found.blocks):
                config[name] = [values[index] for index in plan.blocks]
    return config


def _per_layer(name: str, value: object) -> bool:
    """Whether a setting may have one entry per block; that it does, its length says."""
    return isinstance(value, list) and re.search("layer|block", name) is not None


def _key(config: Mapping[str, Any], names: Sequence[str], value: int, found: Layout, what: str) -> str:
    """The name of the setting that holds `value`; one that is null leaves it to be worked out, so it may be set."""
    for name in names:
        if name in config and config[name] in (value, None):
            return name
    raise UnsupportedError(
        f"architecture {found.architecture}: config.json has no setting for the number of {what}",
        f"it would have to be one of {', '.join(names)}",
    )
