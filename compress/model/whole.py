"""The entire model in memory, through transformers' own classes and loader, with weights decoded on the way in.

For what cannot run block by block: architectures the streaming engine does not know, generation, task suites. Fused
experts, renamed tensors and tied heads come out as `from_pretrained` makes them, since it is what loads them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmpare.compress import memory
from llmpare.compress.checkpoint.files import clipped
from llmpare.compress.errors import InputError
from llmpare.compress.formats.decoded import DenseSource
from llmpare.compress.model.skeleton import auto_class, read_config

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class _Pending:
    """A tensor that is read and decoded when it is indexed, as the loader does with slices of a safetensors file."""

    source: DenseSource
    name: str
    dtype: torch.dtype

    def __getitem__(self, index: object) -> Tensor:
        return self.source.tensor(self.name, self.dtype)[index]  # type: ignore[index]


def load(source: DenseSource, dtype: torch.dtype, device: torch.device, *, trust: bool = False) -> "PreTrainedModel":
    """The model on `device` in `dtype`, ready to evaluate. trust: run code that comes with the model.

    Memory: the model, and the few tensors that are being decoded. Raises InputError when transformers cannot build
    it, and when weights are missing or do not fit it.
    """
    try:
        config = read_config(source, trust)
        family = _family(source, config, trust)
        with _without_progress_bar():
            model, found = family.from_pretrained(
                None,
                config=config,
                generation_config=_generation(source),
                state_dict={name: _Pending(source, name, dtype) for name in source.tensors},
                dtype=dtype,
                device_map={"": device},
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        if memory.exhausted(error):
            raise
        raise InputError(f"transformers cannot load {source.folder}: {clipped(error)}") from error
    for name, stored, expected in sorted(found["mismatched_keys"]):
        raise InputError(
            f"{name} has shape {list(stored)}, config.json implies {list(expected)}",
            "config.json and the weights do not belong together",
        )
    if found["missing_keys"]:  # filled with random numbers
        raise InputError(f"the checkpoint lacks {', '.join(sorted(found['missing_keys'])[:5])}", "download it again")
    loaded: PreTrainedModel = model.eval()
    return loaded


def _family(source: DenseSource, config: "PretrainedConfig", trust: bool) -> Any:
    """The class of the model: the automatic one takes either a folder or weights, not a config with weights."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return type(auto_class(source).from_config(config, trust_remote_code=trust))


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """The command line shows progress of its own."""
    from transformers import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _generation(source: DenseSource) -> "GenerationConfig | None":
    from transformers import GenerationConfig

    if not (source.folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(source.folder, local_files_only=True)
