"""What feeds what, found in headers of every shape that families have."""

from pathlib import Path
from typing import Any

import pytest

from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.errors import UnsupportedError
from llmpare.compress.model.layout import layout
from llmpare.compress.prune import structure
from llmpare.compress.prune.structure import Run, Units
from tests import families


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def units(folder: Path, family: str, kind: str, **settings: Any) -> Units:
    model = families.write(folder / f"{family}-{kind}-{len(settings)}", family, settings=settings)
    with Checkpoint.open(model) as checkpoint:
        return structure.of_block(layout(checkpoint), 1, checkpoint.config, checkpoint.tensors, kind)


def short(found: Units) -> dict[str, tuple[Run, ...]]:
    """The rows by the end of the tensor's name."""
    return {name.split(".1.")[1]: runs for name, runs in found.rows.items()}


def test_gate_and_up_are_two_linears_or_one(folder: Path) -> None:
    llama, phi = units(folder, "llama", "ffn"), units(folder, "phi3", "ffn")
    assert llama.writer.name.endswith("mlp.down_proj")
    assert short(llama) == {"mlp.gate_proj.weight": (Run(0, 1),), "mlp.up_proj.weight": (Run(0, 1),)}
    assert short(phi) == {"mlp.gate_up_proj.weight": (Run(0, 1), Run(256, 1))}
    assert phi.kept_rows("model.layers.1.mlp.gate_up_proj.weight", [0, 3]) == [0, 3, 256, 259]
    assert (llama.count, llama.columns) == (phi.count, phi.columns) == (256, 1)


def test_biases_go_with_the_rows(folder: Path) -> None:
    assert short(units(folder, "opt", "ffn")) == {"fc1.weight": (Run(0, 1),), "fc1.bias": (Run(0, 1),)}
    assert set(short(units(folder, "gpt2", "ffn"))) == {"mlp.c_fc.weight", "mlp.c_fc.bias"}


def test_query_heads_go_with_the_keys_they_share(folder: Path) -> None:
    found = units(folder, "qwen3", "heads")
    assert short(found) == {
        "self_attn.q_proj.weight": (Run(0, 64),),
        "self_attn.k_proj.weight": (Run(0, 32),),
        "self_attn.v_proj.weight": (Run(0, 32),),
    }  # the norms of queries and keys are as wide as one head, and stay
    assert (found.count, found.columns) == (2, 64)
    assert found.kept_columns([1]) == list(range(64, 128))


def test_fused_attention_lies_head_by_head_or_one_after_the_other(folder: Path) -> None:
    assert short(units(folder, "phi3", "heads")) == {
        "self_attn.qkv_proj.weight": (Run(0, 64), Run(128, 32), Run(192, 32))
    }
    assert set(short(units(folder, "gpt_neox", "heads")).values()) == {(Run(0, 96),)}


def test_what_is_square_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM .*down_proj \[128, 128\]"):
        units(folder, "llama", "ffn", intermediate_size=128)
