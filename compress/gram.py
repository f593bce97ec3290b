"""Statistics of what flows into linears, one per *unique* input tensor.

q, k and v read the same tensor, and so do gate and up: they are recognised by identity, so each input is multiplied
with itself once, however many linears read it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmpare.compress.grid import Statistics
from llmpare.compress.hooks import before

_STRIPS = 8  # that H is computed in, each up to the diagonal only: 9/16 of the full square
_SMALLEST = 128  # columns; narrower strips do not keep a processor busy


class Gram:
    """H = XᵀX and, when asked for, D = (X − X̃)ᵀX̃, summed in float32 over the tokens seen."""

    def __init__(self, columns: int, device: torch.device, *, with_drift: bool = False) -> None:
        self.gram = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.drift = torch.zeros_like(self.gram) if with_drift else None
        self.tokens = 0

    def add(self, inputs: Tensor, original: Tensor | None = None) -> None:
        """inputs: what the compressed model feeds the linear, [..., columns]; original: the dense model's, likewise."""
        x = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += len(x)
        if not x.is_cuda:
            x = x.float()  # the CPU's half-precision products return half precision: too coarse for a Gram matrix
        strip = max(_SMALLEST, -(-x.shape[1] // _STRIPS))
        for start in range(0, x.shape[1], strip):
            end = start + strip
            _accumulate(self.gram[start:end, :end], x[:, start:end], x[:, :end])
        if self.drift is not None and original is not None:
            _accumulate(self.drift, original.reshape(x.shape).to(x.dtype) - x, x)

    def statistics(self) -> Statistics:
        """Means per token; the upper triangle is the mirror of the lower, so H is symmetric to the bit.

        They take the memory of the sums: nothing can be added or asked for afterwards.
        """
        if not self.tokens:
            raise ValueError("statistics of nothing, or asked for twice")
        full = self.gram.tril_().div_(self.tokens)  # in place: it is large, and done with
        for start in range(0, len(full), _SMALLEST):
            end = start + _SMALLEST
            full[start:end, end:] = full[end:, start:end].t()
            corner = full[start:end, start:end]
            corner += corner.tril(-1).t()
        drift = None if self.drift is None else self.drift.div_(self.tokens)
        self.tokens = 0
        return Statistics(full, drift)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += aᵀ·b, summed in float32; products of half-precision numbers are exact in it."""
    if a.dtype == torch.float32:
        total.addmm_(a.t(), b)
    else:
        torch.addmm(total, a.t(), b, out_dtype=torch.float32, out=total)


def shared_inputs(linears: Mapping[str, nn.Module], forward: Callable[[], object]) -> list[list[str]]:
    """Which linears read the same tensor when `forward` runs, in order of use."""
    groups: list[list[str]] = []
    seen: list[Tensor] = []  # kept until the end: a freed tensor's identity may come back

    def look(name: str, x: Tensor) -> None:
        group = next((index for index, tensor in enumerate(seen) if tensor is x), None)
        if group is None:
            seen.append(x)
            groups.append([name])
        else:
            groups[group].append(name)

    with before(linears, look):
        forward()
    return groups


@contextmanager
def watched(
    linears: Mapping[str, nn.Module], groups: Sequence[Sequence[str]], see: Callable[[int, Tensor], object]
) -> Iterator[None]:
    """Within the context, every forward calls see(group, input) when it reaches the first linear of a group."""
    first = {names[0]: group for group, names in enumerate(groups)}
    with before({name: linears[name] for name in first}, lambda name, x: see(first[name], x)):
        yield
