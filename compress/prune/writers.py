"""What flows into the linears that write to the residual stream, and what they ought to write.

A block adds to the residual stream what its writers put out: attention's output projection and the FFN's. Where it
does just that, the target of a writer in the compressed model is all that its stream then lacks,

    dense stream after the dense writer  −  compressed stream before the compressed one,

so that every writer makes up for what earlier ones lost, in this block and in all before it. Where something stands
between, such as a norm after the writer, the target is what the dense writer puts out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from llmpare.compress.gram import Gram, shared_inputs
from llmpare.compress.model.models import Model
from llmpare.compress.streams import Stream


@dataclass(frozen=True)
class Moments:
    """Means over tokens of a writer's input x and target t, float32.

    gram x·xᵀ [columns, columns]; cross t·xᵀ [rows, columns]; inputs x [columns]; targets t [rows];
    square ‖t‖². tokens: how many.
    """

    gram: Tensor
    cross: Tensor
    inputs: Tensor
    targets: Tensor
    square: float
    tokens: int


class Writers:
    """The writers of one block of the dense model, by name, in order of use."""

    def __init__(self, model: Model, index: int, modules: Mapping[str, nn.Module], calibration: Stream) -> None:
        self._replay, self._index, self._calibration = model.replay, index, calibration
        groups = shared_inputs(modules, lambda: self._replay.run(index, calibration.hidden[0][:1]))
        self._modules = {name: modules[name] for names in groups for name in names}
        self._outputs: list[dict[str, Tensor]] = []
        self._lacks: list[Tensor] = []  # per batch: dense stream − compressed stream, [tokens, hidden]
        self._batch = 0  # the one that is on its way
        self.add_up = True

    @torch.no_grad()
    def follow(self, dense: Stream) -> None:
        """Takes the original model's stream past the block, which still has its own weights, and notes the targets."""
        for batch, entered in enumerate(dense.hidden):
            outputs: dict[str, Tensor] = {}
            with after(self._modules, outputs.__setitem__):
                left = self._replay.run(self._index, entered)
            self._outputs.append({name: flat(out) for name, out in outputs.items()})
            self._lacks.append(flat(entered).float() - flat(self._calibration.hidden[batch]).float())
            self.add_up = self.add_up and is_sum(entered, self._outputs[-1].values(), left)
            dense.hidden[batch] = left

    @torch.no_grad()
    def moments(self, *, together: bool) -> Iterator[tuple[str, Moments]]:
        """The moments of one writer after the other; whoever iterates puts its new weight in place at once.

        together: all batches wait at each writer, one forward in all, which costs the memory of their activations;
        otherwise one forward per writer. The calibration stream stays where it is.
        """
        yield from self._together() if together else self._apart()

    def _together(self) -> Iterator[tuple[str, Moments]]:
        hub = getcurrent()
        batches = range(len(self._calibration))

        def travel(batch: int) -> None:
            self._replay.run(self._index, self._calibration.hidden[batch])

        with before(self._modules, lambda name, x: hub.switch((name, x))), after(self._modules, self._written):
            travellers = [greenlet(travel) for _ in batches]
            waiting = [traveller.switch(batch) for batch, traveller in enumerate(travellers)]
            for stage in range(1, len(self._modules) + 1):
                name = waiting[0][0]
                total = Sums(waiting[0][1], self._target(name, 0))
                for batch, (_, x) in enumerate(waiting):
                    total.add(x, self._target(name, batch))
                del x, waiting
                yield name, total.means()
                waiting = []
                for batch, traveller in enumerate(travellers):
                    self._batch = batch
                    if stage < len(self._modules):
                        waiting.append(traveller.switch())
                    else:
                        traveller.throw()  # nobody waits for what lies past the last writer

    def _apart(self) -> Iterator[tuple[str, Moments]]:
        previous: str | None = None
        for name, module in self._modules.items():
            total: Sums | None = None
            for batch, hidden in enumerate(self._calibration.hidden):
                self._batch = batch
                seen: dict[str, Tensor] = {}
                known = {} if previous is None else {previous: self._modules[previous]}
                with after(known, self._written), before({name: module}, seen.__setitem__):
                    self._replay.run(self._index, hidden)
                target = self._target(name, batch)
                total = total or Sums(seen[name], target)
                total.add(seen[name], target)
            assert total is not None
            yield name, total.means()
            previous = name

    def _target(self, name: str, batch: int) -> Tensor:
        """What writer `name` ought to put out for a batch, [tokens, rows]."""
        output = self._outputs[batch][name].float()
        return output + self._lacks[batch] if self.add_up else output

    def _written(self, name: str, out: Tensor) -> None:
        """Notes what a writer with its new weight has put out for the batch on its way."""
        dense = self._outputs[self._batch][name]
        self._lacks[self._batch] += dense.float() - flat(out).float()


class Sums:
    """Adds up moments, batch by batch. x, target: the first batch, for their sizes."""

    def __init__(self, x: Tensor, target: Tensor) -> None:
        columns, rows = x.shape[-1], target.shape[-1]
        self._gram = Gram(columns, x.device)
        self._cross = torch.zeros(rows, columns, device=x.device)
        self._inputs, self._targets = torch.zeros(columns, device=x.device), torch.zeros(rows, device=x.device)
        self._square = torch.zeros((), dtype=torch.float64, device=x.device)

    def add(self, x: Tensor, target: Tensor) -> None:
        x = flat(x)
        self._gram.add(x)
        self._cross.addmm_(target.t(), x.float())
        self._inputs += x.sum(0, dtype=torch.float32)
        self._targets += target.sum(0)
        self._square += target.square().sum(dtype=torch.float64)

    def means(self) -> Moments:
        tokens = self._gram.tokens
        return Moments(
            self._gram.statistics().gram,
            self._cross / tokens,
            self._inputs / tokens,
            self._targets / tokens,
            float(self._square) / tokens,
            tokens,
        )


def flat(x: Tensor) -> Tensor:
    """[…, columns] as [tokens, columns]."""
    return x.reshape(-1, x.shape[-1])


def is_sum(entered: Tensor, outputs: Iterable[Tensor], left: Tensor) -> bool:
    """Whether a block's output is its input plus what its writers put out, up to the rounding of the stream."""
    adds = flat(left).float() - flat(entered).float()
    miss = adds - torch.stack([out.float() for out in outputs]).sum(0)
    rounding = 4 * torch.finfo(left.dtype).eps ** 2 * left.float().square().sum()
    return bool(miss.square().sum() <= 0.01 * adds.square().sum() + rounding)


@contextmanager
def before(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Within the context, see(name, input) is called when a module begins."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: (see(name, args[0]), None)[1]

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def after(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Within the context, see(name, output) is called when a module has ended."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda module, args, out: (see(name, out), None)[1]

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
