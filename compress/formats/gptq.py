"""The GPTQ layout: v1 for symmetric weights (zero point − 1 is stored), v2 for asymmetric ones (stored as it is).

Per linear [rows, columns]: qweight int32 [columns·bits/32, rows] packed along the input, qzeros int32
[groups, rows·bits/32] packed along the output, scales float16 [groups, rows], g_idx int32 [columns]. Groups are runs
of consecutive columns, so g_idx is trivial and kernels that ignore it are right to.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmpare.compress.checkpoint.write import TensorSpec
from llmpare.compress.errors import InputError
from llmpare.compress.model.layout import Linear
from llmpare.compress.request import Scheme
from llmpare.compress.version import VERSION

if TYPE_CHECKING:
    from torch import Tensor

    from llmpare.compress.grid import Solved


class Gptq:
    """See the protocol in llmpare.compress.formats."""

    beside_vision = False

    def scale_dtype(self, linear: Linear) -> str:
        """Every loader of this format holds scales in half precision."""
        return "F16"

    def check(self, schemes: Mapping[Linear, Scheme | None]) -> None:
        """Whole words in both directions, and one scheme: most loaders of this format know only one."""
        used = {scheme for scheme in schemes.values() if scheme is not None}
        if used and any(linear.expert is not None for linear in schemes):
            raise InputError(
                "the gptq format cannot store mixtures of experts: transformers fills the experts with random numbers",
                "use --format compressed-tensors",
            )
        if len(used) > 1:
            both = ", ".join(sorted(scheme.name for scheme in used))
            raise InputError(
                f"the gptq format stores one scheme per model, this run asks for {both}",
                "use --format compressed-tensors",
            )
        odd = [
            f"{linear.name} [{linear.rows}, {linear.columns}]"
            for linear, scheme in schemes.items()
            if scheme is not None and (linear.rows % 32 or linear.columns % 32)
        ]
        if odd:
            raise InputError(
                f"the gptq format packs 32 values at a time; these do not divide: {', '.join(odd[:5])}",
                "leave them dense with --ignore, or use --format compressed-tensors",
            )

    def specs(self, linear: Linear, scheme: Scheme) -> list[TensorSpec]:
        """See the top of this file."""
        name, rows, columns, bits = linear.name, linear.rows, linear.columns, scheme.bits
        groups = scheme.groups(columns)
        return [
            TensorSpec(f"{name}.qweight", "I32", (columns * bits // 32, rows)),
            TensorSpec(f"{name}.qzeros", "I32", (groups, rows * bits // 32)),
            TensorSpec(f"{name}.scales", self.scale_dtype(linear), (groups, rows)),
            TensorSpec(f"{name}.g_idx", "I32", (columns,)),
        ]

    def weight(self, linear: Linear, solved: "Solved") -> "Tensor":
        """The dequantized weight, as it is."""
        return solved.weight()

    def encode(self, linear: Linear, scheme: Scheme, solved: "Solved") -> "dict[str, Tensor]":
        """Codes as they are: no weight is rounded a second time."""
        import torch

        from llmpare.compress.formats.packing import pack

        zero = solved.zero.t().to(torch.uint8)
        group = linear.columns // scheme.groups(linear.columns)
        return {
            f"{linear.name}.qweight": pack(solved.codes, scheme.bits).t().contiguous(),
            f"{linear.name}.qzeros": pack(zero - 1 if scheme.symmetric else zero, scheme.bits),
            f"{linear.name}.scales": solved.scale.t().to(torch.float16).contiguous(),
            f"{linear.name}.g_idx": (torch.arange(linear.columns) // group).to(torch.int32),
        }

    def decode(self, linear: Linear, scheme: Scheme, tensors: "Mapping[str, Tensor]") -> "Tensor":
        """(code − zero point) · scale, each column with the scale g_idx gives it."""
        found = self.solved(linear, scheme, tensors)
        index = tensors[f"{linear.name}.g_idx"].long()
        return (found.codes.float() - found.zero[:, index]) * found.scale[:, index]

    def solved(self, linear: Linear, scheme: Scheme, tensors: "Mapping[str, Tensor]") -> "Solved":
        """Codes as they were; g_idx is taken to be trivial, as `encode` makes it."""
        from llmpare.compress.formats.packing import unpack
        from llmpare.compress.grid import Solved

        codes = unpack(tensors[f"{linear.name}.qweight"].t().contiguous(), scheme.bits, linear.columns)
        zero = unpack(tensors[f"{linear.name}.qzeros"], scheme.bits, linear.rows).float().t()
        if scheme.symmetric:
            zero = zero + 1
        return Solved(codes, tensors[f"{linear.name}.scales"].float().t(), zero)

    def config(
        self, schemes: Mapping[Linear, Scheme | None], base: Scheme, outside: Sequence[str], *, eager: bool = False
    ) -> dict[str, Any]:
        """One scheme, and two ways of naming what stays dense, since no key is understood by every loader."""
        scheme = next((scheme for scheme in schemes.values() if scheme is not None), base)
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "desc_act": False,
            "sym": scheme.symmetric,
            "true_sequential": True,
            "static_groups": False,
            "damp_percent": 0.01,
            "lm_head": False,
            "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
            "meta": {"quantizer": [f"llmpare:{VERSION}"]},
        }
        dense = [linear.name for linear, chosen in schemes.items() if chosen is None]
        if dense:
            config["modules_in_block_to_quantize"] = [[linear.name for linear in schemes if linear.name not in dense]]
            config["dynamic"] = {f"-:.*{re.escape(name)}$": {} for name in dense}
        return config

    def caveats(self, schemes: Mapping[Linear, Scheme | None]) -> Sequence[str]:
        """Only this loader of several initialises what it has packed."""
        return ("the model's own code looks at weights while it is loaded: transformers cannot load it, GPTQModel can",)

    def aliases(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The names that loaders of transformers 4 know for settings that transformers 5 writes under others.

        They would take defaults for what they do not find, and run with a wrong position encoding in silence.
        """
        found: dict[str, Any] = {}
        rope = config.get("rope_parameters")
        if isinstance(rope, Mapping) and "rope_theta" in rope and "rope_theta" not in config:
            rest = {name: value for name, value in rope.items() if name != "rope_theta"}
            found["rope_theta"] = rope["rope_theta"]
            found["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rest
        if "dtype" in config and "torch_dtype" not in config:
            found["torch_dtype"] = config["dtype"]
        return found

    def files(self, schemes: Mapping[Linear, Scheme | None], base: Scheme) -> dict[str, bytes]:
        """auto-gptq looks for its settings in a file of their own."""
        text = json.dumps(self.config(schemes, base, ()), indent=2, sort_keys=True)
        return {"quantize_config.json": text.encode() + b"\n"}

    def notes(self, schemes: Mapping[Linear, Scheme | None]) -> Sequence[str]:
        """Which servers read what."""
        scheme = next((scheme for scheme in schemes.values() if scheme is not None), None)
        if scheme is not None and (scheme.bits not in (4, 8) or not scheme.symmetric):
            return (
                f"vLLM and SGLang load 4 and 8 bit symmetric GPTQ only; {scheme.name} needs GPTQModel or transformers",
            )
        return ()
