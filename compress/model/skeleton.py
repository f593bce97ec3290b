"""The model as modules on the meta device; weights come and go one part at a time.

The only file that knows how transformers maps names on disk to parameters. It uses calls of transformers that carry
no promise of stability; tests/compress/model/test_skeleton.py pins what they must do.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmpare.compress.checkpoint.files import clipped
from llmpare.compress.checkpoint.read import QUANTIZATION
from llmpare.compress.errors import InputError, UnsupportedError
from llmpare.compress.model.experts import Mixture, Slot, check_filled
from llmpare.compress.model.layout import SUPPORTED, Layout, Linear, Source, sees

if TYPE_CHECKING:
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        PretrainedConfig,
        PreTrainedModel,
    )
    from transformers.core_model_loading import WeightConverter


class Skeleton:
    """A causal language model without weights.

    model: the transformers module. blocks: its decoder blocks. names: checkpoint tensor name → parameter name, for
    every tensor the model claims; tensors it does not claim (extra prediction heads) are absent. slots: the same for
    tensors that are a part of a parameter, such as those of single experts.
    """

    def __init__(self, checkpoint: Source, layout: Layout, dtype: torch.dtype, device: torch.device, *, trust: bool):
        self.dtype, self.device = dtype, device
        self.model = _build(checkpoint, layout.architecture, dtype, trust)
        self.names, self.slots = _names(self.model, checkpoint, layout.architecture)
        self._kept = self.model._get_dtype_plan(dtype)  # what stays in float32 whatever the working dtype
        self._fused = {linear.tensor for linear in layout.experts if linear.expert and linear.expert.fused}
        self._extra = [
            name.removesuffix(".weight")
            for name in layout.outside
            if name.endswith(".weight")
            and len(checkpoint.tensors[name].shape) == 2
            and name not in self.names
            and name not in self.slots
        ]  # matrices of further prediction heads, which servers build and transformers does not
        first = next((self.names[name] for name in layout.blocks[0] if name in self.names), "")
        self.blocks = _find_blocks(self.model, len(layout.blocks), first, layout.architecture)
        for buffer in self.model.buffers():
            if not buffer.is_meta:
                buffer.data = buffer.data.to(device)
        self._tied = False
        self._check_linears(layout)
        self._check_blocks()
        self._narrow = self._kept_narrow(layout) if dtype == torch.float32 and device.type == "cpu" else set()

    def place(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts tensors, by checkpoint name, where they belong, in the working dtype and on the device.

        On the CPU in float32, which may be wider than what is stored, linears and embeddings keep their weights so.
        """
        for name, tensor in tensors.items():
            if name in self.slots:
                self._fill(self.slots[name], tensor)
                continue
            target = self.names.get(name)
            if target is None:
                continue
            owner, _, leaf = target.rpartition(".")
            module = self.model.get_submodule(owner)
            dtype = self._dtype(target) if tensor.is_floating_point() else None
            if leaf == "weight" and id(module) in self._narrow:
                dtype = None
            value = tensor.to(self.device, dtype, copy=name in self._fused)  # single experts are written to
            if leaf in module._buffers:
                module._buffers[leaf] = value
            else:
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def put(self, linear: Linear, weight: Tensor) -> None:
        """Puts a weight [rows, columns] where the linear's own is, in the working dtype."""
        weight = weight.t().contiguous() if linear.transposed else weight
        if linear.tensor == linear.weight:
            self.place({linear.weight: weight.to(self.dtype)})
        else:
            self._fill(self._slot(linear), weight)

    def _fill(self, slot: Slot, tensor: Tensor) -> None:
        owner, _, leaf = slot.parameter.rpartition(".")
        module = self.model.get_submodule(owner)
        whole = module._parameters[leaf]
        assert whole is not None
        if whole.is_meta:  # the other tensors of the block fill the rest of it
            whole = nn.Parameter(whole.new_empty(whole.shape, dtype=self.dtype, device=self.device), False)
            module._parameters[leaf] = whole
        slot.of(whole).copy_(tensor)

    def _slot(self, linear: Linear) -> Slot:
        """Where an expert's weight is."""
        if linear.expert is None:
            raise ValueError(f"{linear.name} belongs to no expert")
        if linear.expert.fused is None:
            return self.slots[linear.weight]
        parameter = self.names[linear.tensor]
        return Slot(parameter, linear.expert.index, 0, self.model.get_parameter(parameter).shape[1])

    def _dtype(self, target: str) -> torch.dtype:
        return next((d for key, d in self._kept.items() if re.search(key.replace("*", ".*"), target)), self.dtype)

    def mixtures(self, linears: Sequence[Linear]) -> list[Mixture]:
        """The mixtures of experts that linears belong to, in order."""
        found: dict[str, Mixture] = {}
        for linear in linears:
            if linear.expert is not None:
                owner, _, leaf = self._slot(linear).parameter.rpartition(".")
                name = linear.expert.mixture
                mixture = found.setdefault(name, Mixture(name, self.model.get_submodule(owner)))
                mixture.add(linear, leaf)
        return list(found.values())

    def place_outside(self, tensors: Mapping[str, Tensor]) -> None:
        """The same for all that is not a block; ties the head to the embeddings and checks that nothing is missing."""
        self.place(tensors)
        absent = {n for n, p in self.model.named_parameters(remove_duplicate=False) if p.is_meta}
        self.model.tie_weights(missing_keys=absent, recompute_mapping=False)  # as loaders do: not if both differ
        inside = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        missing = [n for n, p in self.model.named_parameters() if p.is_meta and id(p) not in inside]
        _refuse_missing(missing)

    def unload(self, index: int) -> None:
        """Frees the block's weights. Buffers stay: some are made when the model is built and are not in any file."""
        for module in self.blocks[index].modules():
            for name in module._parameters:
                _unload(module, name)

    def unload_outside(self) -> None:
        """Frees the weights of the embeddings and of the head, by far the largest of all that is no block."""
        embeddings, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        self._tied = head is not None and head.weight is embeddings.weight
        for module in (embeddings, head):
            if module is not None:
                _unload(module, "weight")

    def head(self) -> list[str]:
        """Names on disk of what `unload_outside` freed and logits need; a tied weight may have either name."""
        modules = self._head_modules()
        slots = {name: target.rpartition(".") for name, target in self.names.items()}
        return [n for n, (owner, _, leaf) in slots.items()
                if leaf == "weight" and self.model.get_submodule(owner) in modules]  # fmt: skip

    def place_head(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts those tensors back where they belong."""
        self.place(tensors)
        modules = self._head_modules()
        loaded = next(module.weight for module in modules if not module.weight.is_meta)
        for module in modules:
            module.weight = loaded

    def _head_modules(self) -> list[nn.Module]:
        """Those that have the weight of the head."""
        found = [self.model.get_output_embeddings()]
        return [*found, self.model.get_input_embeddings()] if self._tied else found

    def inside(self, index: int) -> dict[str, str]:
        """Checkpoint tensor name → parameter name within block `index`."""
        of_parameter = {id(parameter): name for name, parameter in self.blocks[index].named_parameters()}
        found = {}
        for name, target in self.names.items():
            owner, _, leaf = target.rpartition(".")
            parameter = self.model.get_submodule(owner)._parameters.get(leaf)
            if id(parameter) in of_parameter:
                found[name] = of_parameter[id(parameter)]
        return found

    def norms(self, index: int) -> list[str]:
        """The gains of the block's norms, by checkpoint name: one-dimensional weights of what is no linear."""
        return [
            name
            for name in self.inside(index)
            if name.endswith(".weight") and self.module(name.removesuffix(".weight")).weight.ndim == 1
        ]

    def outside(self) -> list[str]:
        """Names of the linears that belong to no block: the head, projections around the embeddings, further heads."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        modules = [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and id(m) not in inside]
        return modules + self._extra

    def eager(self, linears: Iterable[str]) -> bool:
        """Whether the model's own code looks at weights of these linears, by checkpoint name, while it is loaded.

        Loaders that leave them packed fail on such a model. Asks of blocks that are not in memory.
        """
        modules = {name: module for name in linears if (module := self.module(name)).weight.is_meta}
        taken = {name: module._parameters.pop("weight") for name, module in modules.items()}
        try:
            for block in self.blocks:
                if all(parameter.is_meta for parameter in block.parameters()):
                    _initialize(block, self.model._init_weights)
        except AttributeError:
            return True
        finally:
            for name, module in modules.items():
                module._parameters["weight"] = taken[name]
        return False

    def module(self, linear: str) -> nn.Module:
        """The module of a linear, by its checkpoint name."""
        return self.model.get_submodule(self.names[f"{linear}.weight"].removesuffix(".weight"))

    def _kept_narrow(self, layout: Layout) -> set[int]:
        """The modules, by identity, whose weights stay as they are stored until they are needed in float32.

        Embeddings widen the rows that are looked up, linears their weights when they are called, and logits are made in
        float32 from any head.
        """
        linears = [self.module(linear.name) for linear in layout.linears if linear.expert is None]
        plain = [module for module in linears if type(module) is nn.Linear]
        for module in plain:
            module.forward = MethodType(_widened, module)  # type: ignore[method-assign]
        large = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        return {id(module) for module in (*plain, *large) if isinstance(module, nn.Embedding | nn.Linear)}

    def _check_blocks(self) -> None:
        """Every parameter of a block must be in the file, or run with whatever lies in memory."""
        filled = {*self.names.values(), *(slot.parameter for slot in self.slots.values())}
        known = {id(p) for n, p in self.model.named_parameters(remove_duplicate=False) if n in filled}  # by any name
        inside = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        _refuse_missing([n for n, p in self.model.named_parameters() if id(p) in inside - known])

    def _check_linears(self, layout: Layout) -> None:
        """What the headers look like must be what the model is; a wrong guess must not reach the maths."""
        for linear in layout.linears:
            if linear.expert is not None:
                self._check_expert(linear, layout.architecture)
                continue
            if linear.weight not in self.names:
                raise _unsupported(layout.architecture, f"no module claims {linear.weight}")
            module = self.module(linear.name)
            kind = type(module).__name__
            stored = module.weight.shape if isinstance(module.weight, Tensor) else ()
            expected = (linear.columns, linear.rows) if linear.transposed else (linear.rows, linear.columns)
            known = kind == "Conv1D" if linear.transposed else isinstance(module, nn.Linear)
            if not known or tuple(stored) != expected:
                raise _unsupported(layout.architecture, f"{linear.name} is a {kind} of {list(stored)}, not a linear")

    def _check_expert(self, linear: Linear, architecture: str) -> None:
        if linear.tensor not in self.slots and linear.tensor not in self.names:
            raise _unsupported(architecture, f"no module claims {linear.tensor}")
        if linear.tensor == linear.weight and linear.weight not in self.slots:
            raise _unsupported(architecture, f"{linear.name} is a module of its own, not one of fused experts")
        why = self.mixtures([linear])[0].misfit(linear, self._slot(linear))
        if why:
            raise _unsupported(architecture, why)


def _widened(linear: nn.Linear, x: Tensor) -> Tensor:
    """The forward of a linear whose weight may be kept in less than the working precision."""
    return functional.linear(x, linear.weight.to(x.dtype), linear.bias)


def _unload(module: nn.Module, name: str) -> None:
    parameter = module._parameters[name]
    if parameter is not None:
        module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _refuse_missing(names: Sequence[str]) -> None:
    if names:
        raise InputError(f"the checkpoint lacks {', '.join(names[:5])}", "download it again")


def _unsupported(architecture: str, why: str) -> UnsupportedError:
    return UnsupportedError(f"architecture {architecture} is not supported: {why}", f"supported: {SUPPORTED}")


def read_config(source: Source, trust: bool) -> "PretrainedConfig":
    """config.json without what it says of quantization, which would change the modules. trust: run its own code."""
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust, local_files_only=True)
    for name in QUANTIZATION:
        vars(config).pop(name, None)
    return config


def auto_class(source: Source) -> "type[AutoModelForCausalLM | AutoModelForImageTextToText]":
    """The class of transformers that makes the right one of a config: of text alone, or of images as well."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if sees(source.config) else AutoModelForCausalLM


def _build(checkpoint: Source, architecture: str, dtype: torch.dtype, trust: bool) -> "PreTrainedModel":
    try:
        config, family = read_config(checkpoint, trust), auto_class(checkpoint)
        with torch.device("meta"):
            model: PreTrainedModel = family.from_config(config, dtype=dtype, trust_remote_code=trust)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = clipped(" ".join(str(error).split()))
        raise _unsupported(architecture, f"transformers cannot build it from config.json ({reason})") from error
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    with torch.no_grad():  # computes what is in no file, rotary frequencies above all; weights are not there to be set
        _initialize(model, model._init_weights)
    model.tie_weights()
    model.requires_grad_(False)
    model.eval()
    return model


def _initialize(module: nn.Module, initialize: Callable[[nn.Module], None]) -> None:
    """Applies to every module the rules of the innermost model around it: a decoder's need not be those of its head."""
    from transformers import PreTrainedModel

    for child in module.children():
        _initialize(child, child._init_weights if isinstance(child, PreTrainedModel) else initialize)
    initialize(module)


def _names(model: "PreTrainedModel", checkpoint: Source, architecture: str) -> tuple[dict[str, str], dict[str, Slot]]:
    """Checkpoint name → parameter name, and checkpoint name → part of a parameter, by transformers' own rules."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    names, slots = {}, {}
    for name in checkpoint.tensors:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state:
            continue
        shape, expected = checkpoint.tensors[name].shape, tuple(state[target].shape)
        if pattern is not None:
            converter = next(entry for entry in converters if pattern in entry.source_patterns)
            slots[name] = _slot(name, target, pattern, converter, shape, expected, architecture)
            continue
        if expected != shape:
            raise InputError(
                f"{name} has shape {list(shape)}, config.json implies {list(expected)}",
                "config.json and the weights do not belong together",
            )
        names[name] = target
    check_filled(slots, {name: tuple(tensor.shape) for name, tensor in state.items()})
    return names, slots


def _slot(
    name: str,
    target: str,
    pattern: str,
    converter: "WeightConverter",
    shape: tuple[int, ...],
    expected: tuple[int, ...],
    architecture: str,
) -> Slot:
    """The part of parameter `target` that a tensor is: one expert's matrix, or one of several that are joined.

    transformers stacks the tensors of one pattern over the experts, then joins those of all patterns by rows.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    index = re.search(re.escape(pattern.lstrip("^")).replace(r"\*", r"(\d+)"), name)
    stacked, *joined = converter.operations
    parts = converter.source_patterns
    known = isinstance(stacked, MergeModulelist) and stacked.dim == 0 and len(joined) == (len(parts) > 1)
    if not index or not known or any(not isinstance(each, Concatenate) or each.dim != 1 for each in joined):
        raise _unsupported(architecture, f"transformers converts {name} in a way that is not known here")
    if len(shape) != 2 or expected[1:] != (len(parts) * shape[0], shape[1]) or int(index[1]) >= expected[0]:
        raise InputError(
            f"{name} has shape {list(shape)}, config.json implies a part of {list(expected)}",
            "config.json and the weights do not belong together",
        )
    return Slot(target, int(index[1]), parts.index(pattern) * shape[0], shape[0])


def _find_blocks(model: nn.Module, count: int, parameter: str, architecture: str) -> nn.ModuleList:
    """The list of so many modules that the parameter, one of the first block, is in; else the one that holds most."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    if not lists:
        raise _unsupported(architecture, f"it has no list of {count} blocks")
    owners = [module for name, module in lists.items() if parameter.startswith(f"{name}.")]
    return max(owners or lists.values(), key=lambda module: sum(each.numel() for each in module.parameters()))
