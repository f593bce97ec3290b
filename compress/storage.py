"""Plans that leave every shape as it is: linears are stored under a scheme in a format, or dense like all else."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmpare.compress import formats
from llmpare.compress.checkpoint.header import tensor_bytes
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.checkpoint.write import TensorSpec
from llmpare.compress.errors import InputError
from llmpare.compress.model.layout import Layout, Linear, sees
from llmpare.compress.planning import Plan
from llmpare.compress.request import AUTO, GROUP_SIZES, PER_CHANNEL, Scheme

if TYPE_CHECKING:
    from torch import Tensor

# Servers join these into one matrix when they load, so their rows must be stored alike.
FUSED_BY_SERVERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

Schemes = Mapping[Linear, Scheme | None]


@dataclass(frozen=True)
class StoredPlan(Plan):
    """schemes: every linear of every block; None is stored dense. base: the scheme of what no rule singles out."""

    schemes: Schemes
    format: formats.Format
    base: Scheme

    @cached_property
    def quantized(self) -> dict[Linear, Scheme]:
        """The linears that are quantized, with their schemes."""
        return {linear: scheme for linear, scheme in self.schemes.items() if scheme is not None}

    @property
    def compressed(self) -> Sequence[Linear]:
        """See Plan."""
        return tuple(self.quantized)

    @property
    def linear_bytes(self) -> int:
        """See Plan."""
        return sum(self._stored_bytes(linear) for linear in self.compressed)

    @property
    def linear_bits(self) -> float:
        """The same per weight, in bits."""
        return 8 * self.linear_bytes / sum(linear.rows * linear.columns for linear in self.compressed)

    def specs_of(self, index: int) -> dict[str, TensorSpec]:
        """See Plan."""
        names = set(self.layout.blocks[index])
        names |= {
            s.name for n in self.layout.of_block(index) if (c := self.schemes[n]) for s in self.format.specs(n, c)
        }
        return {spec.name: spec for spec in self.specs if spec.name in names}

    def decode(self, linear: Linear, tensors: "Mapping[str, Tensor]") -> "Tensor":
        """The weight [rows, columns] in float32 that a linear's tensors in the output stand for."""
        scheme = self.schemes[linear]
        if scheme is not None:
            return self.format.decode(linear, scheme, tensors)
        weight = tensors[linear.weight].float()
        return weight.t().contiguous() if linear.transposed else weight

    def fate(self, name: str) -> str:
        """See Plan."""
        linear = self._by_weight.get(name)
        if linear is None:
            return "copied"
        scheme = self.schemes[linear]
        return scheme.name if scheme else "dense, as asked"

    def outcome(self) -> str:
        """See Plan."""
        return f"linears {self.linear_bits:.2f} bits per weight"

    def config(self, config: Mapping[str, Any], outside: Sequence[str], eager: bool) -> dict[str, Any] | None:
        """See Plan."""
        if not self.quantized:
            return None
        kept = dict.fromkeys(self.layout.gates)
        added = self.format.config({**self.schemes, **kept}, self.base, outside, eager=eager)
        return None if added is None else {**config, **self.format.aliases(config), "quantization_config": added}

    def caveats(self, eager: bool) -> Sequence[str]:
        """See Plan."""
        return self.format.caveats(self.schemes) if eager and self.quantized else ()

    def files(self) -> dict[str, bytes]:
        """See Plan."""
        return self.format.files(self.schemes, self.base) if self.quantized else {}

    @cached_property
    def _by_weight(self) -> dict[str, Linear]:
        return {linear.tensor: linear for linear in self.layout.linears}

    def _stored_bytes(self, linear: Linear) -> int:
        scheme = self.schemes[linear]
        if scheme is None:
            return tensor_bytes(linear.dtype, (linear.rows, linear.columns))
        return sum(spec.nbytes for spec in self.format.specs(linear, scheme))


def stored_specs(checkpoint: Checkpoint, found: Layout, schemes: Schemes, form: formats.Format) -> Iterator[TensorSpec]:
    """The tensors of the output. Raises InputError for schemes that cannot be stored, or not so that servers load."""
    if sees(checkpoint.config) and not form.beside_vision and any(schemes.values()):
        raise InputError(
            f"architecture {found.architecture} also sees, and loaders do not know this format beside a vision tower",
            "use --format compressed-tensors",
        )
    _refuse_divided(schemes)
    _refuse_odd_groups(schemes, form)
    form.check(schemes)
    by_weight = {
        linear.weight: (linear, scheme) for linear, scheme in schemes.items() if linear.tensor == linear.weight
    }
    for name in (*found.outside, *(name for block in found.blocks for name in block)):
        linear, scheme = by_weight.get(name, (None, None))
        if linear is not None and scheme is not None:
            yield from form.specs(linear, scheme)
        else:
            yield TensorSpec(name, checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape)


def _refuse_divided(schemes: Schemes) -> None:
    by_name = {linear.name: scheme for linear, scheme in schemes.items()}
    for name, scheme in by_name.items():
        parent, _, leaf = name.rpartition(".")
        for family in FUSED_BY_SERVERS:
            siblings = [f"{parent}.{other}" for other in family if leaf in family]
            different = [other for other in siblings if other in by_name and by_name[other] != scheme]
            if different:
                raise InputError(
                    f"{name} and {different[0]} have different schemes, but servers join them into one matrix",
                    f"let one pattern match all of {', '.join(family)}",
                )


def _refuse_odd_groups(schemes: Schemes, form: formats.Format) -> None:
    """With what either way out costs, in bits per weight of all linears."""
    grouped = {linear: s for linear, s in schemes.items() if s is not None and s.group_size != PER_CHANNEL}
    sizes = {linear.columns for linear in grouped}
    odd = [linear for linear, scheme in grouped.items() if linear.columns % scheme.group_size]
    if odd:
        fit = next(
            (size for size in sorted(GROUP_SIZES, reverse=True) if all(c % size == 0 for c in sizes)), PER_CHANNEL
        )
        names = [f"{linear.name} [{linear.rows}, {linear.columns}]" for linear in odd[:5]]
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        regrouped = _bits({**schemes, **{n: replace(s, group_size=fit) for n, s in grouped.items()}}, form)
        fitted = _bits(
            {**schemes, **{n: replace(s, group_size=AUTO).fitted(n.columns) for n, s in grouped.items()}}, form
        )
        left = _bits({**schemes, **dict.fromkeys(odd)}, form)
        raise InputError(
            f"the group size does not divide the columns of {', '.join(names)}{more}",
            f"--group-size {fit} divides all of them, {regrouped:.2f} bits per weight; "
            f"auto takes the largest for each, {fitted:.2f} bits; "
            f"or leave these dense with --ignore, {left:.2f} bits",
        )


def _bits(schemes: Schemes, form: formats.Format) -> float:
    """Bits per weight of all linears, those that stay dense included."""
    size = sum(
        sum(spec.nbytes for spec in form.specs(linear, scheme))
        if scheme
        else tensor_bytes(linear.dtype, (linear.rows, linear.columns))
        for linear, scheme in schemes.items()
    )
    return 8 * size / sum(linear.rows * linear.columns for linear in schemes)
