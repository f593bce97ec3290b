"""A narrower writer: which of its units remain, and the weights that come nearest to its target.

A writer is a linear that writes to the residual stream; its units are FFN channels or KV groups (structure), its
target and inputs are known by their moments (writers). Which units leave is chosen in `width`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmpare.compress.errors import InputError
from llmpare.compress.prune import width
from llmpare.compress.prune.structure import Units
from llmpare.compress.prune.writers import Moments

DAMPING = 1e-4  # of the mean diagonal: enough for float32, little enough that what is redundant costs nothing
_MAX_DAMPING = 1.0
CAUTION = 1.0  # times columns / tokens: the damping of what is fitted to more than the original weight's output


@dataclass(frozen=True)
class Narrowed:
    """A writer after its treatment. units: those that remain. weight [rows, kept columns]; bias, if it has one.

    before, after: squared error over square of its target, with the columns merely removed and with the new weight.
    """

    units: list[int]
    weight: Tensor
    bias: Tensor | None
    before: float
    after: float
    damping: float


def narrow(weight: Tensor, bias: Tensor | None, moments: Moments, units: Units, keep: int) -> Narrowed:
    """A writer [rows, columns] with the columns of `keep` units."""
    kept: list[int] = []

    def pick(full: Tensor, damped: Tensor) -> Tensor:
        kept[:] = choose(full, damped, units, keep)
        return torch.tensor(units.kept_columns(kept), device=full.device)

    solved, offset, damping = solve(weight, bias, moments, pick)
    columns = torch.tensor(units.kept_columns(kept), device=weight.device)
    return Narrowed(
        units=kept,
        weight=solved,
        bias=offset,
        before=missed(weight[:, columns], bias, columns, moments),
        after=missed(solved, offset, columns, moments),
        damping=damping,
    )


def choose(full: Tensor, damped: Tensor, units: Units, keep: int) -> list[int]:
    """The units that remain. full: the best weight with all columns; damped: its Gram matrix."""
    if units.columns == 1:
        return width.eliminate(full, damped, keep).tolist()
    return width.eliminate_groups(full, damped, units.columns, keep).tolist()


def solve(
    weight: Tensor, bias: Tensor | None, moments: Moments, pick: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor | None, float]:
    """The best weight [rows, kept] for the columns that pick(best weight with all, damped Gram matrix) names.

    Returns it with its bias, if there is one, which makes up for lost means; and the damping it took. What the
    original weight [rows, columns] gives is a function of these inputs, so it is fitted exactly; what the target asks
    beyond that is not, so it is fitted with the caution that so few tokens for so many columns deserve. Raises
    InputError for a Gram matrix that nothing helps.
    """
    gram, cross = centred(moments) if bias is not None else (moments.gram, moments.cross)
    beyond = cross - weight @ gram
    every = torch.arange(weight.shape[1], device=weight.device)
    damping = _sound(gram)
    damped = width.damped(gram, damping)
    cautious = width.damped(gram, max(damping, CAUTION * len(gram) / moments.tokens))
    columns = pick(weight + width.refit(beyond, cautious, every), damped)
    solved = width.refit(weight @ damped, damped, columns) + width.refit(beyond, cautious, columns)
    return solved, None if bias is None else moments.targets - solved @ moments.inputs[columns], damping


def centred(moments: Moments) -> tuple[Tensor, Tensor]:
    """gram and cross of what is left when a bias takes care of the means."""
    gram = moments.gram - torch.outer(moments.inputs, moments.inputs)
    return gram, moments.cross - torch.outer(moments.targets, moments.inputs)


def _sound(gram: Tensor) -> float:
    """The least damping that makes a Gram matrix positive definite, from DAMPING by factors of ten."""
    damping = DAMPING
    while int(torch.linalg.cholesky_ex(width.damped(gram, damping)).info) != 0:
        if damping >= _MAX_DAMPING:
            raise InputError(
                "a Gram matrix of activations is not positive definite whatever the damping",
                "try --dtype float32, or more --nsamples",
            )
        damping *= 10
    return damping


def missed(weight: Tensor, bias: Tensor | None, columns: Tensor, moments: Moments) -> float:
    """E‖t − W·x − b‖² / E‖t‖² for a weight [rows, kept] of some columns."""
    gram, cross = moments.gram[columns][:, columns], moments.cross[:, columns]
    parts = ((weight @ gram - 2 * cross) * weight).sum(dtype=torch.float64)
    if bias is not None:
        offset = bias.to(weight.device, weight.dtype)
        parts += (offset * (offset - 2 * moments.targets + 2 * (weight @ moments.inputs[columns]))).sum()
    return max(0.0, float(1 + parts / moments.square)) if moments.square > 0 else 0.0
