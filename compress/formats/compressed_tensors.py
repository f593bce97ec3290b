"""The `pack-quantized` layout of compressed-tensors: what vLLM, SGLang and plain transformers load.

Per linear [rows, columns]: weight_packed int32 [rows, ⌈columns·bits/32⌉], weight_scale [rows, groups] in the model's
dtype, weight_shape int64 [2], and with a zero point weight_zero_point int32 [⌈rows·bits/32⌉, groups], packed along
the rows. Codes are stored as unsigned numbers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmpare.compress.checkpoint.write import TensorSpec
from llmpare.compress.errors import InputError
from llmpare.compress.model.layout import Linear
from llmpare.compress.request import PER_CHANNEL, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from llmpare.compress.grid import Solved


class CompressedTensors:
    """See the protocol in llmpare.compress.formats."""

    beside_vision = True

    def scale_dtype(self, linear: Linear) -> str:
        """The model's own: loaders cast scales to it, and a cast after rounding would move every weight."""
        return linear.dtype

    def check(self, schemes: Mapping[Linear, Scheme | None]) -> None:
        """Only nn.Linear is known to compressed-tensors, and experts only as transformers puts them together."""
        _check_experts(schemes)
        for linear, scheme in schemes.items():
            if scheme is not None and linear.transposed:
                raise InputError(
                    f"compressed-tensors cannot store {linear.name}: it is a Conv1D, not a Linear",
                    "use --format gptq or --format dense",
                )

    def specs(self, linear: Linear, scheme: Scheme) -> list[TensorSpec]:
        """See the top of this file."""
        name, groups = linear.name, scheme.groups(linear.columns)
        specs = [
            TensorSpec(f"{name}.weight_packed", "I32", (linear.rows, _words(linear.columns, scheme.bits))),
            TensorSpec(f"{name}.weight_scale", self.scale_dtype(linear), (linear.rows, groups)),
            TensorSpec(f"{name}.weight_shape", "I64", (2,)),
        ]
        if not scheme.symmetric:
            specs.append(TensorSpec(f"{name}.weight_zero_point", "I32", (_words(linear.rows, scheme.bits), groups)))
        return specs

    def weight(self, linear: Linear, solved: "Solved") -> "Tensor":
        """The dequantized weight, as it is."""
        return solved.weight()

    def encode(self, linear: Linear, scheme: Scheme, solved: "Solved") -> "dict[str, Tensor]":
        """Codes as they are: no weight is rounded a second time."""
        import torch

        from llmpare.compress.checkpoint.tensors import DTYPES
        from llmpare.compress.formats.packing import pack

        tensors = {
            f"{linear.name}.weight_packed": pack(solved.codes, scheme.bits),
            f"{linear.name}.weight_scale": solved.scale.to(DTYPES[self.scale_dtype(linear)]),
            f"{linear.name}.weight_shape": torch.tensor([linear.rows, linear.columns]),
        }
        if not scheme.symmetric:
            zero = pack(solved.zero.t().to(torch.uint8), scheme.bits)
            tensors[f"{linear.name}.weight_zero_point"] = zero.t().contiguous()
        return tensors

    def decode(self, linear: Linear, scheme: Scheme, tensors: "Mapping[str, Tensor]") -> "Tensor":
        """(code − zero point) · scale."""
        return self.solved(linear, scheme, tensors).weight()

    def solved(self, linear: Linear, scheme: Scheme, tensors: "Mapping[str, Tensor]") -> "Solved":
        """Codes as they were."""
        import torch

        from llmpare.compress.formats.packing import unpack
        from llmpare.compress.grid import Solved

        codes = unpack(tensors[f"{linear.name}.weight_packed"], scheme.bits, linear.columns)
        scale = tensors[f"{linear.name}.weight_scale"].float()
        if scheme.symmetric:
            zero = torch.full_like(scale, 2 ** (scheme.bits - 1))
        else:
            packed = tensors[f"{linear.name}.weight_zero_point"].t().contiguous()
            zero = unpack(packed, scheme.bits, linear.rows).t().float()
        return Solved(codes, scale, zero)

    def config(
        self, schemes: Mapping[Linear, Scheme | None], base: Scheme, outside: Sequence[str], *, eager: bool = False
    ) -> dict[str, Any]:
        """Groups of one scheme each: every Linear if there is only one, else by name.

        Beside names, "Linear" would not be what is left over: vLLM takes it first for the matrices that it fuses.
        """
        linears: dict[Scheme | None, list[Linear]] = {}
        for linear, scheme in schemes.items():
            linears.setdefault(scheme, []).append(linear)
        dense = _patterns(linears.pop(None, []))
        used = {scheme: group for scheme, group in linears.items() if scheme is not None}
        # transformers takes the first group that names anything like experts for theirs; shared ones are like them
        used = dict(sorted(used.items(), key=lambda item: all(linear.expert is None for linear in item[1])))
        targets = {scheme: _patterns(group) if len(used) > 1 else ["Linear"] for scheme, group in used.items()}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": [*outside, *dense],
            "config_groups": {f"group_{i}": _group(*group) for i, group in enumerate(targets.items())},
            # has transformers put every weight into place while it loads, by the first scheme: right if it is the only
            **({"dequantize": True} if eager and len(used) == 1 else {}),
        }

    def caveats(self, schemes: Mapping[Linear, Scheme | None]) -> Sequence[str]:
        """Seen with transformers 5.17 and 5.23."""
        why = "the model's own code looks at weights while it is loaded"
        if len({scheme for scheme in schemes.values() if scheme is not None}) > 1:
            return (f"{why}: transformers cannot load it with more than one scheme",)
        return (f"{why}: config.json asks transformers to unpack them first, which 5.17 cannot do and 5.23 does",)

    def aliases(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """None: whoever loads this format knows the config as it is."""
        return {}

    def files(self, schemes: Mapping[Linear, Scheme | None], base: Scheme) -> dict[str, bytes]:
        """None: config.json says it all."""
        return {}

    def notes(self, schemes: Mapping[Linear, Scheme | None]) -> Sequence[str]:
        """Zero points are where loaders differ."""
        if any(scheme is not None and not scheme.symmetric for scheme in schemes.values()):
            return (
                "transformers loads asymmetric compressed-tensors only with "
                "quantization_config=CompressedTensorsConfig(dequantize=True); vLLM and SGLang load it as it is",
            )
        return ()


def _check_experts(schemes: Mapping[Linear, Scheme | None]) -> None:
    """transformers unpacks the experts of a model under one symmetric scheme, before it stacks them.

    What it finds otherwise it takes for something else: some ends in an error, some in random or wrong weights.
    """
    experts = {linear: scheme for linear, scheme in schemes.items() if linear.expert is not None}
    used = set(experts.values())
    if (
        not any(schemes.values())
        or not used
        or (used == {None} and all(linear.tensor != linear.weight for linear in experts))
    ):
        return
    some = next(iter(experts))
    if some.tensor != some.weight:
        raise InputError(
            f"compressed-tensors cannot store the experts of {some.tensor}: one tensor holds them all, and no loader "
            "unpacks that",
            "--ignore 'experts' leaves them dense; --format dense shows what the loss would be",
        )
    if len(used) > 1 or None in used:
        found = ", ".join(sorted("dense" if scheme is None else scheme.name for scheme in used))
        raise InputError(
            f"compressed-tensors stores all experts of a model under one scheme, here they are {found}: "
            "transformers would load them wrong, some of them without a word",
            "let one pattern match all of 'experts', or use --format dense",
        )
    if any(scheme is not None and not scheme.symmetric for scheme in used):
        raise InputError(
            "transformers cannot load asymmetric experts from compressed-tensors", "use --sym, or --format dense"
        )


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _patterns(linears: Iterable[Linear]) -> list[str]:
    """Regular expressions for the modules of these linears, one for all blocks.

    Of what comes before the number of a block, only the name of the list: loaders give the rest names of their own. A
    checkpoint saved from a bare decoder lacks a part of it, and decoders of models that look at images have moved.
    Linears outside the decoder that are called the same are in `ignore` by their full names, which comes first.
    """
    blocks: dict[tuple[str, str], list[str]] = {}
    for linear in linears:
        before, _, after = linear.name.partition(f".{linear.block}.")
        blocks.setdefault((before.rpartition(".")[2], after), []).append(str(linear.block))
    return [
        rf"re:(.*\.)?{re.escape(before)}\.({'|'.join(numbers)})\.{re.escape(after)}$"
        for (before, after), numbers in blocks.items()
    ]


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    grouped = scheme.group_size != PER_CHANNEL
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if grouped else "channel",
        "dynamic": False,
    }
    if grouped:
        weights["group_size"] = scheme.group_size
    return {"targets": targets, "weights": weights}
