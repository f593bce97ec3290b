"""Running a decoder one block at a time, with the arguments its own forward would have given each block.

Masks, position embeddings and per-layer attention kinds depend on the family. Instead of knowing them, the model's
own forward runs with every block replaced by a pass-through that writes down what it was called with.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmpare.compress.errors import UnsupportedError
from llmpare.compress.model.skeleton import Skeleton

_CHECKS = 3  # batches whose block arguments are compared: what depends on tokens shows at once
_HEAD_ROWS = 8192  # rows of the head turned into float32 at a time, on devices whose products cannot do it themselves


@dataclass(frozen=True)
class Call:
    """What a block is called with besides its hidden states [windows, tokens, hidden]."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positional: bool  # hidden states come as the first positional argument, not as `hidden_states=`


class _Stop(Exception):
    """Ends a forward once it has shown what was to be learned."""


class Replay:
    """Block-by-block execution of one model.

    Block 0 must be loaded when it is made; or `like` is that of another model of the same family.
    """

    def __init__(self, skeleton: Skeleton, like: "Replay | None" = None) -> None:
        self._skeleton = skeleton
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._returns_tensor: bool = self._learn() if like is None else like._returns_tensor
        self._checks = _CHECKS

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._skeleton.device

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states [windows, tokens, hidden] that enter block 0, for ids [windows, tokens] on the device.

        Raises InputError for a model whose blocks take arguments that depend on the tokens: replaying those from
        another window would be wrong.
        """
        calls: list[Call] = []
        entered: list[Tensor] = []

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            calls.append(Call(args[1:], rest, bool(args)))
            if index == 0:
                entered.append(hidden)
            return hidden

        model = self._skeleton.model
        with self._replaced(record), _widened(model.get_input_embeddings(), self._skeleton.dtype):
            model.base_model(input_ids=ids, use_cache=False)
        known = self._calls.setdefault(tuple(ids.shape), calls)
        self._checks -= 1
        if self._checks >= 0 and any(
            not _same(a.args, b.args) or not _same(a.kwargs, b.kwargs) for a, b in zip(known, calls, strict=True)
        ):
            name = type(model).__name__
            raise UnsupportedError(
                f"architecture {name} is not supported: its blocks take arguments that depend on the tokens"
            )
        return entered[0]

    def run(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The output [windows, tokens, hidden] of block `index`, which must be loaded.

        weights: parameters of the block, by their names within it, to use in place of its own; gradients reach them.
        """
        shape = tuple(hidden.shape[:2])
        if shape not in self._calls:
            with _embedding(self._skeleton.model.get_input_embeddings(), hidden):
                self.embed(torch.zeros(shape, dtype=torch.long, device=self.device))
        call, block = self._calls[shape][index], self._skeleton.blocks[index]
        args = (hidden, *call.args) if call.positional else ()
        kwargs = call.kwargs if call.positional else {"hidden_states": hidden, **call.kwargs}
        out = functional_call(block, dict(weights), args, kwargs) if weights else block(*args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    @torch.no_grad()
    def logits(self, ids: Tensor, hidden: Tensor, start: int, end: int) -> Tensor:
        """Float32 logits [windows, end − start, vocabulary] of positions start … end − 1.

        hidden: the last block's output [windows, tokens, hidden] for ids [windows, tokens]. The model's own forward
        runs around it, so final norm, scaling and soft caps are its own. The head's product is kept in float32:
        half-precision logits are coarser than the differences to be measured.
        """
        model = self._skeleton.model
        positions = torch.arange(start, end, device=hidden.device)
        inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
        with self._replaced(lambda index, args, kwargs: hidden), _embedding(inner, hidden), float32_head(outer):
            logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits
        return logits.float()

    @torch.no_grad()
    def _learn(self) -> bool:
        """Whether blocks return a tensor; older families return a tuple that starts with it."""
        skeleton, returned = self._skeleton, []

        def look(module: nn.Module, args: Any, out: Any) -> None:
            returned.append(isinstance(out, Tensor))
            raise _Stop

        handle = skeleton.blocks[0].register_forward_hook(look)
        ids = torch.zeros(1, 2, dtype=torch.long, device=skeleton.device)
        try:
            with _widened(skeleton.model.get_input_embeddings(), skeleton.dtype):
                skeleton.model.base_model(input_ids=ids, use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
        return returned[0]

    @contextmanager
    def _replaced(self, function: Callable[[int, tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
        """Within the context, block `index` called with (*args, **kwargs) returns function(index, args, kwargs)."""

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = function(index, args, kwargs)
                return hidden if self._returns_tensor else (hidden, None, None, None)

            return forward

        blocks = self._skeleton.blocks
        for index, block in enumerate(blocks):
            block.forward = stand_in(index)  # an instance attribute: the module's own attributes stay visible
        try:
            yield
        finally:
            for block in blocks:
                del block.forward


def _same(a: Any, b: Any) -> bool:
    """Equality that looks into the tensors of tuples and dicts."""
    if isinstance(a, Tensor):
        return a is b or (isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b))
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b)


@contextmanager
def _embedding(module: nn.Module, like: Tensor) -> Iterator[None]:
    """Within the context, embeddings that were unloaded give zeros: what they put out is looked at by nobody."""
    weight = module.weight
    if not isinstance(weight, Tensor) or not weight.is_meta:
        yield
        return
    width = weight.shape[1]
    module.forward = lambda ids: like.new_zeros(*ids.shape, width)
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _widened(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the context, embeddings [vocabulary, width] that are kept in less than the working precision put out that.

    Only the rows that are looked up exist in it.
    """
    if not isinstance(module, nn.Embedding) or module.weight.is_meta or module.weight.dtype == dtype:
        yield
        return
    weight, padding = module.weight, module.padding_idx

    def forward(ids: Tensor) -> Tensor:
        used, places = ids.unique(return_inverse=True)
        module.weight, module.padding_idx = nn.Parameter(weight[used].to(dtype), requires_grad=False), None
        found: Tensor = type(module).forward(module, places)
        module.weight, module.padding_idx = weight, padding
        return found

    module.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del module.forward


@contextmanager
def float32_head(head: nn.Module | None) -> Iterator[None]:
    """Within the context, the head multiplies in its own precision but accumulates and returns float32."""
    if not isinstance(head, nn.Linear):
        yield
        return

    def forward(hidden: Tensor) -> Tensor:
        weight, flat = head.weight, hidden.reshape(-1, hidden.shape[-1])
        if weight.dtype == torch.float32:
            out = flat @ weight.t()
        elif weight.is_cuda:
            out = torch.mm(flat, weight.t(), out_dtype=torch.float32)
        else:
            out = torch.cat([flat.float() @ part.float().t() for part in weight.split(_HEAD_ROWS)], dim=1)
        out = out.view(*hidden.shape[:-1], -1)
        return out if head.bias is None else out + head.bias

    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward
