"""Which scheme every linear gets, and schemes that a format or a server could not hold."""

from pathlib import Path

import pytest
from families import write
from plans import plan, refusal

from llmpare.compress.errors import InputError
from llmpare.compress.request import AUTO, PER_CHANNEL, LayerRule, Scheme

# --- rules


def test_rules_in_their_order(llama: Path) -> None:
    rules = (LayerRule(r"1\.mlp\.down", Scheme(8)), LayerRule("down", None), LayerRule("layers", Scheme(3)))
    schemes = {linear.name: scheme for linear, scheme in plan(llama, rules=rules).schemes.items()}
    assert schemes["model.layers.1.mlp.down_proj"] == Scheme(8)
    assert schemes["model.layers.0.mlp.down_proj"] is None
    assert schemes["model.layers.0.mlp.up_proj"] == Scheme(3)


@pytest.mark.parametrize("pattern", ["lm_head", "norm", "embed_tokens"])
def test_a_pattern_for_what_is_never_quantized_is_no_mistake(pattern: str, llama: Path) -> None:
    assert plan(llama, rules=(LayerRule(pattern, None),)).warnings == ()


def test_nothing_left_to_quantize(llama: Path) -> None:
    assert "no linear is left to quantize" in refusal(InputError, llama, rules=(LayerRule("layers", None),))


@pytest.mark.parametrize(
    ("pattern", "siblings"),
    [("q_proj", "q_proj, k_proj, v_proj"), (r"[qk]_proj", "q_proj, k_proj, v_proj"), ("up_proj", "gate_proj, up_proj")],
)
@pytest.mark.parametrize("scheme", [None, Scheme(8)], ids=["dense", "W8A16"])
def test_what_servers_join_is_not_divided(pattern: str, siblings: str, scheme: Scheme | None, llama: Path) -> None:
    message = refusal(InputError, llama, rules=(LayerRule(pattern, scheme),))
    assert "have different schemes, but servers join them into one matrix" in message
    assert message.endswith(f"let one pattern match all of {siblings}")


def test_joined_matrices_may_differ_from_block_to_block(llama: Path) -> None:
    rules = (LayerRule(r"0\.self_attn\.[qkv]_proj", Scheme(8)), LayerRule(r"1\.mlp\.(gate|up)_proj", None))
    assert set(plan(llama, rules=rules).schemes.values()) == {Scheme(), Scheme(8), None}


# --- groups


@pytest.mark.parametrize(
    ("hidden", "inner", "asked", "fit"), [(128, 192, 128, 64), (128, 96, 64, 32), (128, 96, 128, 32), (72, 144, 32, -1)]
)
def test_groups_that_do_not_divide(hidden: int, inner: int, asked: int, fit: int, tmp_path: Path) -> None:
    settings = {"hidden_size": hidden, "intermediate_size": inner, "head_dim": 32, "num_hidden_layers": 3}
    model = write(tmp_path, "llama", settings=settings)
    message = refusal(InputError, model, scheme=Scheme(4, asked))
    assert f"model.layers.0.mlp.down_proj [{hidden}, {inner}]" in message
    if hidden % asked:
        assert f"model.layers.0.mlp.gate_proj [{inner}, {hidden}]" in message
        assert " and 13 more | " in message  # o_proj has 128 inputs
    assert f"--group-size {fit} divides all of them" in message
    assert "--ignore" in message
    regrouped = plan(model, scheme=Scheme(4, fit))
    assert f"divides all of them, {regrouped.linear_bits:.2f} bits per weight" in message
    ignored = LayerRule("mlp|self_attn.[qkv]" if hidden % asked else "down_proj", None)
    partly = plan(model, scheme=Scheme(4, asked), rules=(ignored,))
    weights = sum(linear.rows * linear.columns for linear in partly.layout.linears)
    packed = sum(linear.rows * linear.columns for linear in partly.quantized)
    bits = (packed * partly.linear_bits + (weights - packed) * 16) / weights
    assert f"with --ignore, {bits:.2f} bits" in message
    fitted = plan(model, scheme=Scheme(4, AUTO))
    assert f"auto takes the largest for each, {fitted.linear_bits:.2f} bits" in message
    for linear, scheme in fitted.quantized.items():
        fits = [size for size in (128, 64, 32) if linear.columns % size == 0]
        assert scheme == Scheme(4, fits[0] if fits else PER_CHANNEL)


def test_fitted_groups_that_a_format_cannot_store(tmp_path: Path) -> None:
    """gptq knows one group size; loaders of compressed-tensors want one for all experts."""
    llama = write(tmp_path / "llama", "llama", settings={"intermediate_size": 192})
    assert "stores one scheme per model" in refusal(InputError, llama, scheme=Scheme(4, AUTO), format="gptq")
    assert plan(tmp_path / "llama", scheme=Scheme(4, AUTO), rules=(LayerRule("down", None),), format="gptq")
    mixture = write(tmp_path / "moe", "qwen3_moe", settings={"moe_intermediate_size": 192})
    assert "here they are W4A16 g128, W4A16 g64" in refusal(InputError, mixture, scheme=Scheme(4, AUTO))


def test_groups_are_looked_at_scheme_by_scheme(tmp_path: Path) -> None:
    model = write(tmp_path, "llama", settings={"intermediate_size": 192})
    assert plan(model, rules=(LayerRule("down_proj", Scheme(4, 64)),))
    assert "down_proj [128, 192]" in refusal(InputError, model, rules=(LayerRule("o_proj", Scheme(8, 64)),))


# --- formats


def test_conv1d_fits_two_of_the_formats(tmp_path: Path) -> None:
    model = write(tmp_path, "gpt2")
    message = refusal(InputError, model)
    assert message.startswith("compressed-tensors cannot store transformer.h.0.attn.c_attn: it is a Conv1D")
    assert message.endswith("use --format gptq or --format dense")
    assert len(plan(model, format="gptq").quantized) == len(plan(model, format="dense").quantized) == 8


def test_gptq_wants_whole_words(tmp_path: Path) -> None:
    model = write(tmp_path, "llama", settings={"hidden_size": 72, "num_hidden_layers": 1})
    message = refusal(InputError, model, format="gptq", scheme=Scheme(4, PER_CHANNEL))
    assert "packs 32 values at a time" in message
    assert "gate_proj [256, 72]" in message


def test_gptq_holds_one_scheme(llama: Path) -> None:
    rules = (LayerRule("down_proj", Scheme(8, 128)),)
    assert "this run asks for W4A16 g128, W8A16 g128" in refusal(InputError, llama, format="gptq", rules=rules)
