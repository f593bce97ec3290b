"""What flows into the linears that write to the residual stream, and what they ought to write.

A block adds to the residual stream what its writers put out: attention's output projection and the FFN's. Where it
does just that, the target of a writer in the compressed model is all that its stream then lacks,

    dense stream after the dense writer  −  compressed stream before the compressed one,

so that every writer makes up for what earlier ones lost, in this block and in all before it. Where something stands
between, such as a norm after the writer, the target is what the dense writer puts out.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmpare.compress.gram import Gram, shared_inputs
from llmpare.compress.hooks import after
from llmpare.compress.model.models import Model
from llmpare.compress.stages import Traveller, staged
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
        self._adds_up = False

    @torch.no_grad()
    def follow(self, dense: Stream) -> None:
        """Takes the original model's stream past the block, which still has its own weights, and notes the targets."""
        for batch, entered in enumerate(dense.hidden):
            outputs: dict[str, Tensor] = {}
            with after(self._modules, outputs.__setitem__):
                left = self._replay.run(self._index, entered)
            self._outputs.append({name: flat(out) for name, out in outputs.items()})
            self._lacks.append(flat(entered).float() - flat(self._calibration.hidden[batch]).float())
            if batch == 0:
                self._adds_up = is_sum(entered, self._outputs[0].values(), left)
            dense.hidden[batch] = left

    @torch.no_grad()
    def moments(self, wanted: Collection[str], *, together: bool) -> Iterator[tuple[str, Moments]]:
        """The moments of one wanted writer after the other; whoever iterates puts its new weight in place at once.

        Then the calibration stream is past the block. together: see stages.staged.
        """
        stages = [[name] for name in self._modules if name in wanted]
        for (name,), waiting in staged(
            self._replay, self._index, self._modules, stages, self._calibration, together=together, noted=self._modules
        ):
            sums: Sums | None = None
            for traveller in waiting:
                target = self._target(name, traveller)
                sums = sums or Sums(traveller.input, target)
                sums.add(traveller.input, target)
            assert sums is not None
            yield name, sums.means()

    def _target(self, name: str, traveller: Traveller) -> Tensor:
        """What writer `name` ought to put out for a batch, [tokens, rows]."""
        outputs = self._outputs[traveller.batch]
        if not self._adds_up:
            return outputs[name].float()
        return lacking(outputs, name, self._lacks[traveller.batch], traveller.written)


def lacking(outputs: Mapping[str, Tensor], name: str, entered: Tensor, written: Mapping[str, Tensor]) -> Tensor:
    """What writer `name` has to add to a stream that then is the dense one, [tokens, rows], float32.

    outputs: of the dense writers. entered: what the stream lacked before the block. written: what its writers have
    put out so far.
    """
    target = outputs[name].float() + entered
    for earlier, out in written.items():
        target += outputs[earlier].float() - flat(out).float()
    return target


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
        wide = x.float()
        self._gram.add(x if x.is_cuda else wide)
        self._cross.addmm_(target.t(), wide)
        self._inputs += wide.sum(0)
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
