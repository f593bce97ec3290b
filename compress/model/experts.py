"""Experts while they run: what flows into each, and where its weights are.

transformers holds the experts of a mixture as parameters of three dimensions [experts, …] in one module, which is
called with the tokens and with the experts that the router chose for each. A hook sees no single expert there, so
while statistics are gathered the module runs a loop of ours instead, over the experts one by one. It is compared with
the module's own forward the first time, and a module that computes something else is refused by name.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmpare.compress.errors import InputError, UnsupportedError
from llmpare.compress.model.layout import Linear

_TOLERANCE = 8  # times the precision of the dtype: experts' outputs are summed in another order


@dataclass(frozen=True)
class Slot:
    """The part of a three-dimensional parameter that is one tensor on disk: rows of one expert's matrix."""

    parameter: str
    expert: int
    start: int
    rows: int

    def of(self, whole: Tensor) -> Tensor:
        """That part of the parameter, for reading and writing."""
        return whole[self.expert, self.start : self.start + self.rows]


def check_filled(slots: Mapping[str, Slot], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError unless the tensors fill their parameters. shapes: of parameters, by name."""
    filled: dict[str, dict[tuple[int, int], int]] = defaultdict(dict)
    for slot in slots.values():
        filled[slot.parameter][slot.expert, slot.start] = slot.rows
    for name, parts in filled.items():
        experts, height = shapes[name][:2]
        rows = Counter[int]()
        for (expert, _), count in parts.items():
            rows[expert] += count
        absent = [str(expert) for expert in range(experts) if rows[expert] != height]
        if absent:
            some = ", ".join(absent[:5])
            raise InputError(f"the checkpoint lacks weights of {name}: experts {some}", "download it again")


@dataclass(frozen=True)
class Routed:
    """What flows into the experts of a mixture at one place.

    counts: tokens that the router sends to each. of: what one expert learns from, [tokens, columns]. together: what
    all of them do, piece by piece, each token as often as experts see it or equally often.
    """

    counts: list[int]
    of: Callable[[int], Tensor]
    together: Callable[[], Iterator[Tensor]]


@dataclass
class Mixture:
    """The experts of one module.

    readers: for each of the two places where linears read, the tokens themselves and what inner linears make of them,
    the names of those linears by expert. doors: modules by place that are called, like a linear, with what flows in
    there: a Routed. Hooks on them see it.
    """

    name: str
    module: Any  # with the attributes that transformers' interface for experts promises
    readers: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    doors: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self._outside, self._inside = f"{self.name} (tokens)", f"{self.name} (inner)"
        self.exit = nn.Identity()  # the same for what comes out: (expert, weighted output [tokens, hidden])
        self.doors = {self._outside: nn.Identity(), self._inside: nn.Identity()}

    def add(self, linear: Linear, parameter: str) -> None:
        """Counts a linear in whose weight is part of that parameter."""
        assert linear.expert is not None
        place = self._inside if parameter == "down_proj" else self._outside
        self.readers.setdefault(place, {}).setdefault(linear.expert.index, []).append(linear.name)

    def misfit(self, linear: Linear, slot: Slot) -> str | None:
        """Why the linear is not what its names and shapes made it look like; None if it is."""
        kind = type(self.module).__name__
        leaf = slot.parameter.rpartition(".")[2]
        if not {"is_transposed", "has_bias", "has_gate"} <= vars(self.module).keys():
            return f"{linear.name} belongs to a {kind}, whose way of calling experts is not known"
        if leaf not in ("down_proj", "gate_up_proj" if self.module.has_gate else "up_proj"):
            return f"{linear.name} is {leaf} of a {kind}"
        if self.module.is_transposed != linear.transposed:
            return f"{linear.name} is stored as [{'input, output' if self.module.is_transposed else 'output, input'}]"
        return None

    @contextmanager
    def opened(self, *, everything: bool = False, check: bool = False) -> Iterator[None]:
        """Within the context, every forward goes through the doors.

        everything: experts learn from all tokens, not only from those that are routed to them; what comes out is the
        same. check: raise UnsupportedError unless what comes out is what the module's own forward gives.
        """

        def forward(hidden: Tensor, chosen: Tensor, gain: Tensor) -> Tensor:
            mixed = self._run(hidden, chosen, gain, everything)
            if check:
                self._require_same(type(self.module).forward(self.module, hidden, chosen, gain), mixed)
            return mixed

        self.module.forward = forward  # an instance attribute: the module's own stays visible
        try:
            yield
        finally:
            del self.module.forward

    def _run(self, hidden: Tensor, chosen: Tensor, gain: Tensor, everything: bool) -> Tensor:
        """The experts' part of the output [tokens, hidden]. chosen, gain [tokens, experts per token]."""
        count = len(self.module.down_proj)
        routes = [torch.where(chosen == expert) for expert in range(count)]
        counts = [len(tokens) for tokens, _ in routes]

        def routed(expert: int) -> Tensor:
            return hidden if everything else hidden[routes[expert][0]]

        self.doors[self._outside](Routed(counts, routed, lambda: iter([hidden])))
        made = {e: self._inner(e, hidden[tokens]) for e, (tokens, _) in enumerate(routes) if counts[e]}

        def inner(expert: int) -> Tensor:
            if everything:
                return self._inner(expert, hidden)
            return made[expert] if expert in made else hidden.new_empty(0, self._columns)

        self.doors[self._inside](Routed(counts, inner, lambda: iter(made.values())))
        out = torch.zeros_like(hidden)
        for expert, x in made.items():
            tokens, slots = routes[expert]
            part = self._product("down_proj", expert, x) * gain[tokens, slots, None]
            self.exit((expert, part))
            out.index_add_(0, tokens, part.to(out.dtype))
        return out

    @property
    def _columns(self) -> int:
        """Width of what the outer linears read."""
        return int(self.module.down_proj.shape[1 if self.module.is_transposed else 2])

    def _inner(self, expert: int, x: Tensor) -> Tensor:
        if self.module.has_gate:
            mid: Tensor = self.module._apply_gate(self._product("gate_up_proj", expert, x))
        else:
            mid = self.module.act_fn(self._product("up_proj", expert, x))
        return mid

    def _product(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight = self.module._parameters[name][expert]
        out = x @ weight if self.module.is_transposed else nn.functional.linear(x, weight)
        return out + self.module._parameters[f"{name}_bias"][expert] if self.module.has_bias else out

    def _require_same(self, own: Tensor, ours: Tensor) -> None:
        apart = (own.float() - ours.float()).norm()
        if not apart <= _TOLERANCE * torch.finfo(own.dtype).eps * own.float().norm():
            raise UnsupportedError(
                f"{self.name}: experts of a {type(self.module).__name__} compute something that is not known here",
                "--ignore 'experts' leaves them dense",
            )
