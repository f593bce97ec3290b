"""Statistics of what flows into linears, one per *unique* input tensor.

q, k and v read the same tensor, and so do gate and up: they are recognised by identity, so each input is multiplied
with itself once, however many linears read it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmpare.compress.grid import Statistics

_TILES = 8  # strips H is computed in, each up to the diagonal only: 9/16 of the full square
_SMALLEST = 256  # columns; narrower strips do not keep a processor busy


class Gram:
    """H = XᵀX and, when asked for, D = (X − X̃)ᵀX̃, summed in float32 over the tokens seen."""

    def __init__(self, columns: int, device: torch.device, *, with_drift: bool) -> None:
        self.gram = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.drift = torch.zeros_like(self.gram) if with_drift else None
        self.tokens = 0

    def add(self, inputs: Tensor, original: Tensor | None = None) -> None:
        """inputs: what the compressed model feeds the linear, [..., columns]; original: the dense model's, likewise."""
        x = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += len(x)
        strip = max(_SMALLEST, -(-x.shape[1] // _TILES))
        for start in range(0, x.shape[1], strip):
            end = start + strip
            _accumulate(self.gram[start:end, :end], x[:, start:end], x[:, :end])
        if self.drift is not None and original is not None:
            _accumulate(self.drift, original.reshape(x.shape) - x, x)

    def statistics(self) -> Statistics:
        """Means per token; the upper triangle is the mirror of the lower, so H is symmetric to the bit."""
        lower = self.gram.tril().div_(self.tokens)
        full = lower + lower.tril(-1).t()
        return Statistics(full, None if self.drift is None else self.drift / self.tokens)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += aᵀ·b, with exact products of half-precision inputs and sums in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a.t(), b, out_dtype=torch.float32, out=total)
    elif a.dtype == torch.bfloat16:
        with _bfloat16_products():
            total.add_(a.float().t() @ b.float())
    else:
        total.addmm_(a.float().t(), b.float())


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Within the context the CPU multiplies float32 matrices as bfloat16 and sums in float32.

    Nothing is lost when the numbers came from bfloat16. A product of bfloat16 tensors is as fast, but returns
    bfloat16, and its rounding error can make a Gram matrix of few tokens indefinite.
    """
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


class SharedInputs:
    """Which linears of a block read the same tensor, found by watching one forward. Groups are in order of use."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []

    @contextmanager
    def watch(self, linears: Mapping[str, nn.Module], see: Callable[[int, Tensor], None] | None) -> Iterator[None]:
        """Within the context, every forward calls see(group, input) once per unique input, as it happens."""
        seen: list[tuple[Tensor, int]] = []
        known = {name: index for index, group in enumerate(self.groups) for name in group}

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def look(module: nn.Module, args: tuple[Any, ...]) -> None:
                x: Tensor = args[0]
                group = next((index for tensor, index in seen if tensor is x), None)
                if group is not None:
                    if name not in known:
                        known[name] = group
                        self.groups[group].append(name)
                    return
                if name not in known:
                    known[name] = len(self.groups)
                    self.groups.append([name])
                seen.append((x, known[name]))
                if see is not None:
                    see(known[name], x)

            return look

        handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
