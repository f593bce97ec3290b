"""Fewer channels in the residual stream: which, and the best weights for every linear that reads or writes it.

A channel runs through the whole model, so one choice holds for all blocks: a survey adds up, over all linears that
read the stream, the share of their output that the channel carries, ‖W_j‖²·E[x_j²] / Σ_k ‖W_k‖²·E[x_k²]. In the pass
every linear of a block is refitted in order of use: with x its input in the original model and x̃ in the smaller one,
readers get W·E[x·x̃ᵀ]·E[x̃·x̃ᵀ]⁻¹, so that they make up for what norms and earlier linears changed, and writers what the
smaller stream lacks in the channels that remain.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from llmpare.compress.gram import shared_inputs
from llmpare.compress.hooks import after, before
from llmpare.compress.model.models import Model
from llmpare.compress.prune.writers import Moments, Sums, flat, is_sum, lacking
from llmpare.compress.stages import Traveller, staged
from llmpare.compress.streams import Stream


def shares(weights: Sequence[Tensor], energy: Tensor) -> Tensor:
    """The share [columns] of each column in what linears [rows, columns] put out that read the same input.

    energy: E[x_j²] of that input.
    """
    carried = sum((weight.square().sum(0) for weight in weights), torch.zeros_like(energy)) * energy
    return carried / carried.sum().clamp(min=torch.finfo(carried.dtype).tiny)


class Refit:
    """One block in both models. modules: the dense model's linears, by name. writes: those that write to the stream."""

    def __init__(self, dense: Model, index: int, modules: Mapping[str, nn.Module], writes: Collection[str]) -> None:
        self._replay, self._index, self._modules, self._writes = dense.replay, index, modules, writes
        self._inputs: list[dict[str, Tensor]] = []  # of readers, per batch
        self._outputs: list[dict[str, Tensor]] = []  # of writers, in the channels that remain
        self._lacks: list[Tensor] = []
        self._adds_up = False

    @torch.no_grad()
    def follow(self, dense: Stream, calibration: Stream, channels: Tensor) -> dict[str, Moments]:
        """Takes the original model's stream past the block. Returns the writers' moments in the original model."""
        writers = {name: module for name, module in self._modules.items() if name in self._writes}
        readers = {name: module for name, module in self._modules.items() if name not in self._writes}
        sums: dict[str, Sums] = {}
        for batch, entered in enumerate(dense.hidden):
            inputs: dict[str, Tensor] = {}
            outputs: dict[str, Tensor] = {}
            fed: dict[str, Tensor] = {}
            look = inputs.__setitem__, fed.__setitem__, outputs.__setitem__
            with before(readers, look[0]), before(writers, look[1]), after(writers, look[2]):
                left = self._replay.run(self._index, entered)
            for name, out in outputs.items():
                target = flat(out).float()
                sums.setdefault(name, Sums(fed[name], target)).add(fed[name], target)
            if batch == 0:
                self._adds_up = is_sum(entered, [flat(out) for out in outputs.values()], left)
            self._inputs.append({name: flat(x) for name, x in inputs.items()})
            self._outputs.append({name: flat(out)[:, channels] for name, out in outputs.items()})
            entered_small = calibration.hidden[batch]
            self._lacks.append(flat(entered)[:, channels].float() - flat(entered_small).float())
            dense.hidden[batch] = left
        return {name: total.means() for name, total in sums.items()}

    @torch.no_grad()
    def moments(
        self,
        small: Model,
        place: int,
        modules: Mapping[str, nn.Module],
        rows: Mapping[str, Tensor],
        calibration: Stream,
        *,
        together: bool,
    ) -> Iterator[tuple[str, Moments]]:
        """The moments of every linear of the small model, in order of use; put the new weight in place at once.

        modules: its linears, which have weights already. rows: of the dense readers' outputs, those that remain. Then
        the calibration stream is past the block. together: see stages.staged.
        """
        groups = shared_inputs(modules, lambda: small.replay.run(place, calibration.hidden[0][:1]))
        noted = {name: modules[name] for name in self._writes}
        for names, waiting in staged(small.replay, place, modules, groups, calibration, together=together, noted=noted):
            sums: dict[str, Sums] = {}
            for traveller in waiting:
                for name in names:
                    target = self._target(name, traveller, rows)
                    sums.setdefault(name, Sums(traveller.input, target)).add(traveller.input, target)
            for name in names:
                yield name, sums[name].means()

    def _target(self, name: str, traveller: Traveller, rows: Mapping[str, Tensor]) -> Tensor:
        """What a linear ought to put out for a batch, [tokens, rows]."""
        batch = traveller.batch
        if name not in self._writes:
            out: Tensor = self._modules[name](self._inputs[batch][name])
            return out[:, rows[name]].float()
        outputs = self._outputs[batch]
        return lacking(outputs, name, self._lacks[batch], traveller.written) if self._adds_up else outputs[name].float()
