"""The trained student as a checkpoint, with the names, shapes and precision of the one it was loaded from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llmpare.compress.checkpoint.files import copy_file, read_json, write_file
from llmpare.compress.checkpoint.read import CONFIG, MAX_CONFIG
from llmpare.compress.checkpoint.tensors import DTYPES, to_bytes
from llmpare.compress.checkpoint.write import CheckpointWriter, TensorSpec
from llmpare.compress.errors import UnsupportedError
from llmpare.compress.formats.decoded import DenseSource
from llmpare.compress.model.layout import SUPPORTED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GENERATION = "generation_config.json"


def as_stored(student: "PreTrainedModel") -> Mapping[str, Tensor]:
    """The student's tensors under the names that its family has on disk, by transformers' own rules."""
    from transformers.core_model_loading import revert_weight_conversion

    stored: Mapping[str, Tensor] = revert_weight_conversion(student, student.state_dict())
    return stored


def check(student: "PreTrainedModel", source: DenseSource) -> None:
    """Raises UnsupportedError if something would be trained that `source` has no place for."""
    tied = {*student.all_tied_weights_keys, *student.all_tied_weights_keys.values()}
    for name, tensor in as_stored(student).items():
        info = source.tensors.get(name)
        if (info is None and name not in tied) or (info is not None and info.shape != tuple(tensor.shape)):
            raise UnsupportedError(
                f"{type(student).__name__} cannot be written as {source.folder} is: it has no {name} of that shape",
                f"supported: {SUPPORTED}",
            )


def write(folder: Path, student: "PreTrainedModel", source: DenseSource) -> dict[str, str]:
    """Writes the checkpoint and everything beside it that is no weight. Returns the sha256 of every tensor.

    What no module of the student claims is copied as it is.
    """
    stored = as_stored(student)
    specs = [TensorSpec(name, info.dtype, info.shape) for name, info in source.tensors.items()]
    digests = {}
    with CheckpointWriter(folder, specs) as writer:
        for spec in specs:
            tensor = stored[spec.name] if spec.name in stored else source.tensor(spec.name, DTYPES[spec.dtype])
            digests[spec.name] = writer.write(spec.name, to_bytes(tensor.detach().to("cpu", DTYPES[spec.dtype])))
        writer.sync()
    for name in source.checkpoint.files:
        copy_file(source.folder / name, folder / name)
    if source.packed:  # it was quantized, and is no longer
        write_file(folder / CONFIG, json.dumps(source.config, indent=2, ensure_ascii=False).encode() + b"\n")
    else:
        copy_file(source.folder / CONFIG, folder / CONFIG)
    return digests


def set_generation(folder: Path, settings: Mapping[str, Any]) -> None:
    """Puts settings into generation_config.json, beside what it has; makes one if there is none."""
    path = folder / GENERATION
    before = read_json(path, limit=MAX_CONFIG) if path.is_file() else {}
    write_file(path, json.dumps({**before, **settings}, indent=2, ensure_ascii=False).encode() + b"\n")
