"""What a run is asked to do: frozen dataclasses that are parsed once and never change.

A request holds names and numbers only, no paths opened and no tensors, so that it can be printed, compared and
hashed. `spec()` is the part of it that decides the bytes of the output; two runs with the same spec on the same
machine write the same bytes.
"""

import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmpare.compress.errors import UsageError

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)
PER_CHANNEL = -1
AUTO = 0  # the largest group size that divides a linear's columns, linear by linear
BUNDLED = "bundled"
NO_TEXT = "none"  # no calibration text at all, for methods that can do without


@dataclass(frozen=True)
class Scheme:
    """How the weights of one linear are stored: integers of `bits`, one scale per row and group of columns.

    group_size: columns per scale, PER_CHANNEL (-1) for one scale per row, or AUTO (0) until `fitted` has decided.
    symmetric: zero point fixed in the middle of the range, otherwise one zero point per scale.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"{self.bits} bits are not supported", f"--bits takes one of {', '.join(map(str, BITS))}")
        if self.group_size not in (*GROUP_SIZES, PER_CHANNEL, AUTO):
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise UsageError(
                f"group size {self.group_size} is not supported",
                f"--group-size takes {sizes}, -1 (per channel) or auto",
            )

    @property
    def name(self) -> str:
        """The field's name for it, with what the name leaves open: 'W4A16 g128', 'W3A16_ASYM channel'."""
        group = {PER_CHANNEL: "channel", AUTO: "auto"}.get(self.group_size, f"g{self.group_size}")
        return f"W{self.bits}A16{'' if self.symmetric else '_ASYM'} {group}"

    def groups(self, columns: int) -> int:
        """Number of scales per row for a linear with that many input columns."""
        return 1 if self.group_size == PER_CHANNEL else columns // self.group_size

    def fitted(self, columns: int) -> "Scheme":
        """The scheme for a linear with that many input columns: AUTO decided, if no group divides them per channel."""
        if self.group_size != AUTO:
            return self
        sizes = (size for size in sorted(GROUP_SIZES, reverse=True) if columns % size == 0)
        return replace(self, group_size=next(sizes, PER_CHANNEL))


def parse_scheme(
    name: str | None, *, bits: int | None = None, group_size: int | None = None, symmetric: bool | None = None
) -> Scheme:
    """The scheme called `name` ('W4A16', 'W3A16_ASYM', any case), with the explicit settings in place of its own.

    Raises UsageError for an unknown name and for settings that contradict it.
    """
    scheme = Scheme()
    if name is not None:
        match = re.fullmatch(r"W([2348])A16(_ASYM)?", name.upper())
        if match is None:
            raise UsageError(
                f"unknown scheme {name!r}", "--scheme takes W2A16, W3A16, W4A16 or W8A16, each also with _ASYM"
            )
        scheme = Scheme(bits=int(match[1]), symmetric=match[2] is None)
        if bits not in (None, scheme.bits):
            raise UsageError(f"--bits {bits} contradicts --scheme {name}", "give one of the two")
        if match[2] and symmetric:
            raise UsageError(f"--sym contradicts --scheme {name}", "give one of the two")
    return replace(
        scheme,
        bits=scheme.bits if bits is None else bits,
        group_size=scheme.group_size if group_size is None else group_size,
        symmetric=scheme.symmetric if symmetric is None else symmetric,
    )


@dataclass(frozen=True)
class TextSpec:
    """Which text, and how it becomes windows of tokens.

    dataset: 'bundled', a preset name, a hub data set, a local .txt, .jsonl or .parquet file, or 'none'.
    nsamples: number of windows; None takes the default number, or as many as the text holds if that is fewer.
    seqlen: tokens per window; None takes 2048 or the longest the model allows, whichever is shorter.
    chat_template: rows with roles go through the model's own template instead of plain 'role: text' lines.
    """

    dataset: str = BUNDLED
    nsamples: int | None = None
    seqlen: int | None = None
    chat_template: bool = False


@dataclass(frozen=True)
class Gates:
    """Limits that turn the report into an exit code. None: not checked."""

    max_kl: float | None = None  # nats per token
    max_perplexity_increase: float | None = None  # fraction of the dense perplexity: 0.02 is 2 %
    min_agreement: float | None = None  # share of positions with the same most likely token, 0…1
    max_size: int | None = None  # bytes of the output's weights
    min_recovery: float | None = None  # lowest share of a baseline's task score that is kept, 0…1
    min_tokens_per_second: float | None = None  # highest throughput of generation


@dataclass(frozen=True)
class LayerRule:
    """Scheme for the linears whose name matches `pattern` (re.search); None leaves them dense."""

    pattern: str
    scheme: Scheme | None


@dataclass(frozen=True)
class RunRequest:
    """What every command that makes a checkpoint needs to know."""

    model: str
    out: Path
    calibration: TextSpec = field(default_factory=TextSpec)
    evaluation: TextSpec = field(default_factory=TextSpec)
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    max_memory: int | None = None  # bytes
    revision: str | None = None
    trust_remote_code: bool = False
    allow_nonfinite: bool = False
    route_all: bool = False  # experts learn from all tokens, not only from those that are routed to them
    gates: Gates = field(default_factory=Gates)
    strict: bool = False
    force: bool = False
    restart: bool = False

    def spec(self) -> dict[str, Any]:
        """The request as plain JSON values, without places, limits, gates and what becomes of an output that exists."""
        fields = asdict(self)
        for name in ("model", "out", "revision", "max_memory", "gates", "strict", "force", "restart"):
            del fields[name]
        return fields


@dataclass(frozen=True)
class QuantizeRequest(RunRequest):
    """Everything `llmpare quantize` needs to know."""

    scheme: Scheme = field(default_factory=Scheme)
    method: str = "gptq"
    options: tuple[tuple[str, float], ...] = ()  # the method's own, by name; validated against its registry line
    format: str = "compressed-tensors"
    rules: tuple[LayerRule, ...] = ()  # first match wins; --ignore comes first

    def spec(self) -> dict[str, Any]:
        """See RunRequest; the options by name."""
        return {**super().spec(), "options": dict(self.options)}
