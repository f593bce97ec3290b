"""Looking at what goes into modules and what comes out of them, for as long as a context lasts."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

See = Callable[[str, Tensor], object]


@contextmanager
def before(modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Within the context, see(name, input) is called when a module begins."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            see(name, args[0])

        return look

    with _removed(module.register_forward_pre_hook(hook(name)) for name, module in modules.items()):
        yield


@contextmanager
def after(modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Within the context, see(name, output) is called when a module has ended."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def look(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            see(name, out)

        return look

    with _removed(module.register_forward_hook(hook(name)) for name, module in modules.items()):
        yield


@contextmanager
def _removed(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that last as long as the context."""
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()
