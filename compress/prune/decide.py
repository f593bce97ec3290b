"""What a request for smaller shapes comes to for one model: counts, what stands in the way, what a search may try."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from llmpare.compress.checkpoint.header import tensor_bytes
from llmpare.compress.checkpoint.read import Checkpoint, TensorInfo
from llmpare.compress.errors import InputError, UnsupportedError, UsageError
from llmpare.compress.estimate import Work, needs_of
from llmpare.compress.model.layout import Layout, find, sees
from llmpare.compress.needs import Needs
from llmpare.compress.planning import Subject, opened
from llmpare.compress.prune import structure
from llmpare.compress.prune.cut import Cut, ShrinkRequest, rounded
from llmpare.compress.prune.structure import Units
from llmpare.compress.prune.surgery import ShrinkPlan, Sizes, new_config, parameters
from llmpare.compress.request import NO_TEXT

WORK = Work(weights=6, grams=6, dense_too=True, twin=True)  # copies in float32, besides both models
COARSE = 0.05  # of all there is, that rounding may keep beyond what was asked for without a word
EDGES = (2, 1)  # blocks at the beginning and at the end that are kept unless they are named


def possible_channels(plan: ShrinkPlan) -> list[int]:
    """The numbers of FFN channels, down to half, that a search may keep; the last is all of them."""
    if not plan.ffn:
        return [0]
    count, multiple = plan.ffn[0].count, plan.cut.round_to
    half = rounded(count, 0.5, multiple)
    return sorted({*range(half, count, multiple), count})


def possible_groups(plan: ShrinkPlan) -> list[int]:
    """The same for KV groups: those that config.json can say."""
    if not plan.heads:
        return [0]
    count, per_group = plan.heads[0].count, find(plan.original, *structure.HEADS) // plan.heads[0].count
    if not _explicit_heads(plan.original):
        return [count]
    return [n for n in range(-(-count // 2), count) if plan.sizes.hidden % (per_group * n) == 0] + [count]


def sized(plan: ShrinkPlan, ffn: int, heads: int, depth: int, *, in_bytes: bool) -> int:
    """Parameters, or bytes, of an output with so many FFN channels, KV groups and blocks."""
    smaller = replace(plan, sizes=replace(plan.sizes, ffn=ffn, heads=heads, depth=1, blocks=(0,)))
    specs = smaller.all_specs()
    outside, block = specs[: len(plan.layout.outside)], specs[len(plan.layout.outside) :]
    if in_bytes:
        return sum(s.nbytes for s in outside) + depth * sum(s.nbytes for s in block)
    return parameters(outside) + depth * parameters(block)


def plan_shrink(request: ShrinkRequest, device: str | None = None) -> ShrinkPlan:
    """The plan of structured pruning. Raises for everything that cannot work and can be known now."""
    cut = request.cut
    if request.calibration.dataset == NO_TEXT:
        raise UsageError("structured pruning needs calibration text", "give a --dataset")
    with opened(request, device) as (checkpoint, subject):
        found, config = subject.layout, checkpoint.config
        if sees(config):
            raise UnsupportedError(
                f"architecture {found.architecture} also sees, and the shapes of its decoder must stay as they are",
                "--sparsity and --pattern set weights to zero, and keep all shapes",
            )
        plan = ShrinkPlan(
            **vars(subject),
            request=request,
            specs=(),
            needs=_needs(checkpoint, subject, request),
            cut=cut,
            original=config,
            **_decisions(cut, found, config, checkpoint.tensors),
        )
    plan = replace(plan, specs=plan.all_specs())
    if plan.changes:
        new_config(plan)
    return plan


def _needs(checkpoint: Checkpoint, subject: Subject, request: ShrinkRequest) -> Needs:
    """What the run takes; windows that wait inside a block do so with what its writers put out in the original."""
    need = needs_of(
        checkpoint, subject.layout, request, WORK, dtype=subject.dtype, seqlen=subject.seqlen, device=subject.device
    )
    size, hidden = tensor_bytes(subject.dtype, (1,)), structure.hidden_size(checkpoint.config, subject.layout)
    return replace(need, waiting_per_token=need.waiting_per_token + size * 2 * hidden + 4 * hidden)


def _decisions(cut: Cut, found: Layout, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The fields of a plan that say what remains."""
    blocks = _kept_blocks(cut, found)
    depth = len(blocks) if blocks is not None else cut.layers or len(found.blocks)
    ffn = _units(found, config, tensors, "ffn", needed=cut.ffn is not None or cut.hidden is not None)
    heads = _units(found, config, tensors, "heads", needed=cut.heads is not None or cut.hidden is not None)
    hidden = structure.hidden_size(config, found)
    sizes = Sizes(
        ffn=rounded(ffn[0].count, cut.ffn, cut.round_to) if ffn else 0,
        heads=rounded(heads[0].count, cut.heads, 1) if heads else 0,
        hidden=rounded(hidden, cut.hidden, cut.round_to),
        depth=depth,
        blocks=blocks,
    )
    narrower = sizes.hidden < hidden
    if heads and (sizes.heads < heads[0].count or narrower):
        _check_heads(config, found, sizes, heads[0])
    counts = {"ffn": ffn[0].count if ffn else 0, "heads": heads[0].count if heads else 0, "hidden": hidden}
    remaining = () if narrower else None
    warnings = tuple(_coarse(cut, sizes, counts))
    return {"sizes": sizes, "ffn": ffn, "heads": heads, "remaining": remaining, "warnings": warnings}


def _coarse(cut: Cut, sizes: Sizes, counts: Mapping[str, int]) -> Iterator[str]:
    """What to say where rounding up keeps much more than was asked for. counts: how many there are of what is cut."""
    for name, count in counts.items():
        share, kept = vars(cut)[name], vars(sizes)[name]
        if share is not None and kept / count - share > COARSE:
            what = "groups of heads" if name == "heads" else "channels"
            finer = "" if name == "heads" else ": --round-to makes finer steps"
            yield f"--{name} {share:g} keeps {kept} of {count} {what}, {kept / count:.0%}{finer}"


def _units(
    found: Layout, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], kind: str, *, needed: bool
) -> tuple[Units, ...]:
    """The units of every block, all alike, since one config describes them. () if they are not and need not be."""
    try:
        units = tuple(structure.of_block(found, index, config, tensors, kind) for index in range(len(found.blocks)))
        for index, other in enumerate(units):
            if (other.count, other.columns) != (units[0].count, units[0].columns):
                raise UnsupportedError(
                    f"architecture {found.architecture} cannot be made narrower: block {index} is not as wide as "
                    "block 0"
                )
    except UnsupportedError:
        if needed:
            raise
        return ()
    return units


def _check_heads(config: Mapping[str, Any], found: Layout, sizes: Sizes, units: Units) -> None:
    """Raises UnsupportedError if the family could not be told how large its heads are, or how many."""
    if not _explicit_heads(config):
        raise UnsupportedError(
            f"architecture {found.architecture} takes the size of heads from the hidden size: neither can change alone",
            "--ffn and --layers work on it",
        )
    per_group = find(config, *structure.HEADS) // units.count
    if sizes.hidden % (per_group * sizes.heads):
        fitting = [n for n in range(1, units.count) if sizes.hidden % (per_group * n) == 0]
        works = ", ".join(f"{n / units.count:.4g}" for n in fitting) or "no number of them does"
        raise InputError(
            f"{per_group * sizes.heads} heads do not divide {sizes.hidden} residual channels, which "
            "transformers asks for",
            f"--heads takes one of: {works}",
        )


def _explicit_heads(config: Mapping[str, Any]) -> bool:
    """Whether the family can be told how large its heads are."""
    return any(name in config for name in ("head_dim", *structure.KV_HEADS))


def _kept_blocks(cut: Cut, found: Layout) -> tuple[int, ...] | None:
    """The blocks that remain, or None if that is still to be found out."""
    total = len(found.blocks)
    if cut.drop_layers:
        beyond = [index for index in cut.drop_layers if not 0 <= index < total]
        if beyond or len(set(cut.drop_layers)) >= total:
            raise UsageError(f"--drop-layers {beyond or 'all'}: the model has blocks 0 to {total - 1}")
        return tuple(index for index in range(total) if index not in cut.drop_layers)
    if cut.layers is None or cut.layers == total:
        return tuple(range(total))
    if not sum(EDGES) < cut.layers < total:
        raise UsageError(
            f"--layers {cut.layers}: the model has {total}, and the first {EDGES[0]} and the last are kept",
            f"--layers takes {sum(EDGES) + 1} to {total}; --drop-layers removes any",
        )
    return None
