"""A student that is built anew from a config.json, with random weights and the teacher's tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING

from llmpare.compress.checkpoint.files import copy_file, parse_json, read_file, shown, write_file
from llmpare.compress.checkpoint.header import tensor_bytes
from llmpare.compress.checkpoint.read import CONFIG, MAX_CONFIG
from llmpare.compress.checkpoint.write import CheckpointWriter, TensorSpec
from llmpare.compress.distill.plan import Side, sized
from llmpare.compress.errors import InputError
from llmpare.compress.formats.decoded import DenseSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CARRIED = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "generation_config")
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def sketch(path: Path, trust: bool) -> Side:
    """What a model of that config is like. Raises InputError if transformers cannot build it."""
    import torch

    config = parse_json(read_file(path, limit=MAX_CONFIG), path)
    with torch.device("meta"):
        specs = _specs(_build(path, trust), _stored_as(config))
    parameters = sum(spec.nbytes // tensor_bytes(spec.dtype, (1,)) for spec in specs)
    nbytes = sum(spec.nbytes for spec in specs)
    return sized(str(path), config, folder=None, parameters=parameters, nbytes=nbytes)


def create(path: Path, folder: Path, teacher: DenseSource, seed: int, trust: bool) -> None:
    """Writes a checkpoint of a new model: the same weights for the same seed."""
    import torch

    from llmpare.compress.checkpoint.tensors import DTYPES, to_bytes

    data = bytes(read_file(path, limit=MAX_CONFIG))
    torch.manual_seed(seed)
    model = _build(path, trust)
    specs = _specs(model, _stored_as(parse_json(data, path)))
    folder.mkdir(exist_ok=True)
    state = model.state_dict()
    with CheckpointWriter(folder, specs) as writer:
        for spec in specs:
            writer.write(spec.name, to_bytes(state[spec.name].to(DTYPES[spec.dtype])))
        writer.sync()
    for name in teacher.checkpoint.files:
        if Path(name).name.startswith(_CARRIED) or name.endswith((".model", ".tiktoken")):
            copy_file(teacher.folder / name, folder / name)
    write_file(folder / CONFIG, data)  # last: a folder with it is complete


def _stored_as(config: dict[str, object]) -> str:
    return _STORED.get(str(config.get("dtype", config.get("torch_dtype"))), "F32")


def _build(path: Path, trust: bool) -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust, local_files_only=True)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"transformers cannot build a model from {shown(path)}: {error}") from error
    return model


def _specs(model: "PreTrainedModel", dtype: str) -> list[TensorSpec]:
    """Every parameter once: of tied ones the first."""
    names = [name for name, _ in model.named_parameters()]
    buffers = [name for name, _ in model.named_buffers() if name in model.state_dict()]
    state = model.state_dict()
    return [TensorSpec(name, dtype, tuple(state[name].shape)) for name in (*names, *buffers)]
