"""Mixtures of experts, read off tensor names and shapes: no torch, no list of models.

An expert is a second number in a name (`model.layers.7.mlp.experts.3.up_proj.weight`) or the first dimension of a
weight of three (`model.layers.7.mlp.experts.up_proj` [experts, …]). The matrix beside them with one row per expert
routes tokens to them; a matrix of one row beside them weighs an expert that all tokens share. Those decide what runs,
cost next to nothing to keep, and are no linears here.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

_KERNEL = 16  # a third dimension below this is a convolution's


class Header(Protocol):
    """See layout.Header."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Expert:
    """Whose linear it is: expert `index` of `count` in a mixture, which is what the names of its experts begin with.

    fused: the three-dimensional tensor on disk whose slice `index` is the weight; None if it has a tensor of its own.
    """

    mixture: str
    index: int
    count: int
    fused: str | None = None


def own_weights(prefix: str, names: Iterable[str]) -> dict[str, Expert]:
    """Which of a block's weights belong to one expert, by name. prefix: of the block, 'model.layers.7'."""
    found: dict[str, tuple[str, int]] = {}
    count: dict[str, int] = defaultdict(int)
    for name in names:
        match = re.fullmatch(re.escape(prefix) + r"\.((?:.*\.)?experts)\.(\d+)\.(.+)\.weight", name)
        if match:
            mixture = f"{prefix}.{match[1]}"
            found[name] = mixture, int(match[2])
            count[mixture] = max(count[mixture], int(match[2]) + 1)
    return {name: Expert(mixture, index, count[mixture]) for name, (mixture, index) in found.items()}


def fused(info: Header) -> bool:
    """Whether a tensor holds one matrix per expert."""
    return len(info.shape) == 3 and min(info.shape[1:]) >= _KERNEL


def of_fused(info: Header) -> list[tuple[str, Expert]]:
    """Names for the linears that a fused tensor holds, and what they are."""
    owner, _, leaf = info.name.removesuffix(".weight").rpartition(".")
    mixture = owner if owner.endswith("experts") else f"{owner}.experts"
    count = info.shape[0]
    return [(f"{mixture}.{index}.{leaf}", Expert(mixture, index, count, info.name)) for index in range(count)]


def gates(prefix: str, experts: Collection[Expert], matrices: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Which of a block's matrices route tokens to its experts or weigh shared ones, by name.

    matrices: shapes of the two-dimensional weights that are no expert's.
    """
    found = set()
    for mixture, count in {(expert.mixture, expert.count) for expert in experts}:
        scope = mixture.rpartition(".")[0]
        parts: dict[str, list[str]] = defaultdict(list)
        for name in matrices:
            if name.startswith(f"{scope}."):
                parts[name.removeprefix(f"{scope}.").partition(".")[0]].append(name)
        for names in parts.values():
            if len(names) == 1 and matrices[names[0]][0] in (1, count):
                found.add(names[0])
    return found
