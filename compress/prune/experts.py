"""The plan of `llmpare prune --experts N`: every mixture keeps the N experts that matter most.

Which those are is found out block by block (drop). Routers lose the rows of the others, so tokens go to the best of
those that remain, as many as before. One number holds for all blocks, and config.json says it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llmpare.compress.checkpoint.write import TensorSpec
from llmpare.compress.errors import UnsupportedError, UsageError
from llmpare.compress.estimate import Work, needs_of
from llmpare.compress.model.layout import Layout, Linear, find
from llmpare.compress.planning import Plan, opened
from llmpare.compress.prune.cut import ShrinkRequest
from llmpare.compress.prune.decide import plan_shrink
from llmpare.compress.prune.surgery import HEALING, parameters
from llmpare.compress.request import NO_TEXT

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")


@dataclass(frozen=True)
class ExpertPlan(Plan):
    """The fate of every tensor when whole experts are removed.

    count: experts of every mixture; keep: how many remain. groups: in how many the router chooses, which stay equally
    large. original: the source's config.json.
    """

    count: int
    keep: int
    groups: int
    original: Mapping[str, Any]

    @property
    def compressed(self) -> Sequence[Linear]:
        """See Plan."""
        return self.layout.experts

    @property
    def linear_bytes(self) -> int:
        """See Plan."""
        tensors = {linear.tensor for linear in self.layout.experts}
        return sum(spec.nbytes for spec in self.specs if spec.name in tensors)

    def specs_of(self, index: int) -> dict[str, TensorSpec]:
        """See Plan."""
        names = set(self.layout.blocks[index])
        return {spec.name: spec for spec in self.specs if spec.name in names}

    def all_specs(self) -> Iterator[TensorSpec]:
        """The tensors of the output, in the order of the file. Places of experts that leave are the last ones."""
        for name in (*self.layout.outside, *(name for block in self.layout.blocks for name in block)):
            if name not in self.own or self.own[name][1] < self.keep:
                yield TensorSpec(name, self.tensors[name].dtype, self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """What a tensor of the source becomes in the output."""
        shape = self.tensors[name].shape
        return (self.keep, *shape[1:]) if name in self.per_expert else shape

    def fate(self, name: str) -> str:
        """See Plan."""
        if name in self.own:
            return f"kept for {self.keep} of {self.count} experts"
        return f"cut to {list(self.shape(name))}" if name in self.per_expert else "copied"

    def outcome(self) -> str:
        """See Plan."""
        kept = parameters(self.specs)
        return f"{kept:,} parameters ({1 - kept / self.parameters:.1%} removed), {self.keep} of {self.count} experts"

    @property
    def reshaped(self) -> tuple[Layout, dict[str, Any]] | None:
        """See Plan."""
        there = {spec.name for spec in self.specs}
        blocks = tuple(tuple(name for name in block if name in there) for block in self.layout.blocks)
        linears = tuple(self._linear(n) for n in self.layout.linears if n.expert is None or n.expert.index < self.keep)
        gates = tuple(replace(gate, rows=self.shape(gate.tensor)[0]) for gate in self.layout.gates)
        found = replace(self.layout, blocks=blocks, linears=linears, gates=gates)
        numbers = {name: self.keep for name in COUNTS if self.original.get(name) == self.count}
        return found, {**self.original, **numbers}

    def sections(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See Plan."""
        kept = parameters(self.specs)
        removed = 1 - kept / self.parameters
        request = self.request
        command = f"llmpare distill --teacher {request.model} --student {request.out} -o {request.out}-healed"
        flops = 2 * (self._active + self.vocabulary * find(self.original, "hidden_size", default=0))
        return {
            "structure": {
                "parameters": {"dense": self.parameters, "kept": kept, "removed_share": removed},
                "flops_per_token": {"dense": flops, "kept": flops},  # as many experts run as before
                "experts": {
                    "dense": self.count,
                    "kept": self.keep,
                    "mixtures": [
                        {"block": record["index"], **mixture}
                        for record in records
                        for mixture in record["kept_experts"]
                    ],
                },
                "healing": {"needed": removed > HEALING, "command": command if removed > HEALING else None},
            }
        }

    @property
    def _active(self) -> int:
        """Weights in linears that one token passes through."""
        chosen: int = find(self.original, *CHOSEN, default=1)
        plain = sum(linear.rows * linear.columns for linear in self.layout.linears if linear.expert is None)
        return plain + sum(n.rows * n.columns for n in self.layout.experts) * chosen // self.count

    @cached_property
    def own(self) -> dict[str, tuple[str, int]]:
        """(mixture, number) of the expert that a tensor belongs to alone, by its name."""
        experts = {(n.expert.mixture, n.expert.index) for n in self.layout.experts if n.expert}
        prefixes = {f"{mixture}.{index}.": (mixture, index) for mixture, index in experts}
        found = {}
        for name in self.tensors:
            head = next((name[: i + 1] for i, c in enumerate(name) if c == "." and name[: i + 1] in prefixes), None)
            if head is not None:
                found[name] = prefixes[head]
        return found

    @cached_property
    def per_expert(self) -> dict[str, str]:
        """The mixture that a tensor has an entry for every expert of, by its name: fused weights, routers, biases."""
        plain = {linear.name for linear in self.layout.linears if linear.expert is None}
        found = {}
        for mixture in {linear.expert.mixture for linear in self.layout.experts if linear.expert}:
            scope = mixture.rpartition(".")[0] + "."
            for name, info in self.tensors.items():
                if not name.startswith(scope) or name in self.own or name.rpartition(".")[0] in plain:
                    continue
                if info.shape[:1] == (self.count,):
                    found[name] = mixture
        return found

    def _linear(self, linear: Linear) -> Linear:
        """A linear that remains, as it is in the output."""
        return replace(linear, expert=linear.expert and replace(linear.expert, count=self.keep))


def plan_experts(request: ShrinkRequest, device: str | None = None) -> ExpertPlan:
    """The plan of a run that removes experts. Raises for everything that cannot work and can be known now."""
    keep = request.cut.experts
    assert keep is not None
    if request.cut.explicit != ["--experts"]:
        others = ", ".join(name for name in request.cut.explicit if name != "--experts")
        raise UsageError(f"--experts and {others} in one run", "do one after the other")
    if request.calibration.dataset == NO_TEXT:
        raise UsageError("structured pruning needs calibration text", "give a --dataset")
    with opened(request, device) as (checkpoint, subject):
        config, found = checkpoint.config, subject.layout
        count, groups = _counts(found, config, keep)
        plan = ExpertPlan(
            **vars(subject),
            request=request,
            specs=(),
            needs=needs_of(
                checkpoint,
                found,
                request,
                Work(1, 0, twin=True),
                dtype=subject.dtype,
                seqlen=subject.seqlen,
                device=subject.device,
            ),
            warnings=(),
            count=count,
            keep=keep,
            groups=groups,
            original=config,
        )
    return replace(plan, specs=tuple(plan.all_specs()))


def plan_structure(request: ShrinkRequest, device: str | None = None) -> Plan:
    """The plan of structured pruning, whatever it removes."""
    return plan_shrink(request, device) if request.cut.experts is None else plan_experts(request, device)


def _counts(found: Layout, config: Mapping[str, Any], keep: int) -> tuple[int, int]:
    """How many experts there are, and in how many groups. Raises for a number of them that cannot remain."""
    name = found.architecture
    counts = {linear.expert.count for linear in found.experts if linear.expert}
    if not counts:
        raise UnsupportedError(f"architecture {name} has no experts to remove", "leave out --experts")
    count = max(counts)
    if len(counts) > 1 or not any(config.get(key) == count for key in COUNTS):
        raise UnsupportedError(
            f"architecture {name}: config.json has no setting for {sorted(counts)} experts",
            f"it would have to be one of {', '.join(COUNTS)}",
        )
    chosen, groups = find(config, *CHOSEN, default=1), find(config, "n_group", default=1) or 1
    if not chosen <= keep < count:
        raise UsageError(
            f"--experts {keep}: there are {count}, and {chosen} of them run for every token",
            f"--experts takes {chosen} to {count - 1}",
        )
    least = max(2, -(-chosen // (find(config, "topk_group", default=1) or 1))) if groups > 1 else 1
    if keep % groups or keep // groups < least:
        raise UsageError(
            f"--experts {keep}: the router chooses among {groups} groups, which must stay equally large",
            f"--experts takes multiples of {groups} from {groups * least}",
        )
    return count, groups
