"""Pins what the calls of transformers that carry no promise of stability have to do."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, load, read, save, skeleton, tokens, write
from safetensors.torch import load_file, save_file
from torch import nn

from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.errors import InputError
from llmpare.compress.model.layout import layout
from llmpare.compress.model.skeleton import Skeleton


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opened(family: str, tmp_path: Path) -> Iterator[Checkpoint]:
    with Checkpoint.open(write(tmp_path, family)) as checkpoint:
        yield checkpoint


def edit(folder: Path, **changes: Any) -> Path:
    """Changes settings of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def refusal(folder: Path) -> str:
    with Checkpoint.open(folder) as checkpoint, pytest.raises(InputError) as caught:
        skeleton(checkpoint)
    return f"{caught.value} | {caught.value.hint}"


def test_every_tensor_finds_its_parameter(opened: Checkpoint) -> None:
    """Filled with everything, the skeleton is the model that transformers loads."""
    made, reference = skeleton(opened), load(opened.folder)
    assert set(made.names) == set(opened.tensors)
    for index, names in enumerate(layout(opened).blocks):
        assert all(parameter.is_meta for parameter in made.blocks[index].parameters())
        made.place(read(opened, names))
    loaded = dict(reference.named_parameters())
    assert {name for name, _ in made.model.named_parameters()} == set(loaded)
    for name, parameter in made.model.named_parameters():
        assert parameter.dtype == loaded[name].dtype
        assert torch.equal(parameter, loaded[name])
        assert not parameter.requires_grad
    for name, buffer in reference.named_buffers():
        assert torch.equal(made.model.get_buffer(name), buffer)
    ids = tokens()
    assert torch.equal(made.model(ids).logits, reference(ids).logits)
    assert not made.model.training


def test_blocks_come_and_go(opened: Checkpoint) -> None:
    made, found = skeleton(opened), layout(opened)
    for _ in range(2):  # what is computed when the model is built must outlive the first time
        for index, names in enumerate(found.blocks):
            made.place(read(opened, names))
            assert not any(tensor.is_meta for tensor in made.blocks[index].state_dict().values())
            made.unload(index)
            assert all(parameter.is_meta for parameter in made.blocks[index].parameters())
            assert not any(buffer.is_meta for buffer in made.blocks[index].buffers())
    for names in found.blocks:
        made.place(read(opened, names))
    ids = tokens()
    assert torch.equal(made.model(ids).logits, load(opened.folder)(ids).logits)


def test_names_within_a_block(opened: Checkpoint, family: str) -> None:
    made, found = skeleton(opened), layout(opened)
    for index, names in enumerate(found.blocks):
        inside = made.inside(index)
        assert set(inside) == set(names)
        assert sorted(inside.values()) == sorted(name for name, _ in made.blocks[index].named_parameters())
        made.place(read(opened, names))
        for name, tensor in read(opened, names).items():
            assert torch.equal(made.blocks[index].get_parameter(inside[name]), tensor)
        gains = {name for name in names if name.endswith(".weight") and len(opened.tensors[name].shape) == 1}
        assert set(made.norms(index)) == gains
        assert gains
        for linear in found.of_block(index):
            module = made.module(linear.name)
            assert module.weight.shape == opened.tensors[linear.weight].shape
            assert type(module).__name__ == ("Conv1D" if family == "gpt2" else "Linear")


def test_linears_outside_the_blocks(opened: Checkpoint) -> None:
    assert skeleton(opened).outside() == ["lm_head"]


def test_projections_are_outside_too(tmp_path: Path) -> None:
    model = write(tmp_path, "opt", settings={"word_embed_proj_dim": 64})
    with Checkpoint.open(model) as checkpoint:
        assert sorted(skeleton(checkpoint).outside()) == [
            "lm_head",
            "model.decoder.project_in",
            "model.decoder.project_out",
        ]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox"])
def test_a_checkpoint_of_the_bare_decoder(family: str, tmp_path: Path) -> None:
    """Names then lack the prefix of the modules, as those of GPT-2 on the hub do."""
    whole = load(write(tmp_path / "whole", family, tied=True))
    bare = edit(save(whole.base_model, tmp_path / "bare"), architectures=[type(whole).__name__])
    with Checkpoint.open(bare) as checkpoint:
        made, found = skeleton(checkpoint), layout(checkpoint)
        assert set(made.names) == set(checkpoint.tensors)
        assert all(target.endswith(f".{name}") for name, target in made.names.items())
        for names in found.blocks:
            made.place(read(checkpoint, names))
        ids = tokens()
        assert torch.equal(made.model(ids).logits, whole(ids).logits)


def test_names_on_disk_may_differ_from_those_of_modules(tmp_path: Path) -> None:
    with Checkpoint.open(write(tmp_path, "gpt_neox")) as checkpoint:
        assert skeleton(checkpoint).names["embed_out.weight"] == "lm_head.weight"


@pytest.mark.parametrize("family", ["llama"])
def test_tensors_that_no_module_claims_are_left_out(opened: Checkpoint) -> None:
    weights = load_file(opened.folder / "model.safetensors")
    extra = {"model.layers.2.eh_proj.weight": torch.ones(128, 256), "model.layers.0.rotary.inv_freq": torch.ones(16)}
    save_file({**weights, **extra}, opened.folder / "model.safetensors", {"format": "pt"})
    with Checkpoint.open(opened.folder) as checkpoint:
        made = skeleton(checkpoint)
        assert set(made.names) == set(weights)
        made.place(read(checkpoint, extra))
        assert set(made.inside(0)) == set(layout(checkpoint).blocks[0]) - set(extra)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", ["embeddings", "head", "both alike", "both"])
def test_heads_are_tied_as_loaders_tie_them(stored: str, tied: bool, tmp_path: Path) -> None:
    """By the config, unless the file holds two matrices that differ, or only the one that is to be copied."""
    model = write(tmp_path, "llama", tied=True)
    weights = load_file(model / "model.safetensors")
    embeddings = weights.pop("model.embed_tokens.weight")
    head = embeddings.flip(0) if stored == "both" else embeddings.clone()
    if stored != "head":
        weights["model.embed_tokens.weight"] = embeddings
    if stored != "embeddings":
        weights["lm_head.weight"] = head
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    edit(model, tie_word_embeddings=tied)
    if not tied and "both" not in stored:
        missing = "lm_head.weight" if stored == "embeddings" else "model.embed_tokens.weight"
        assert f"the checkpoint lacks {missing} | download it again" in refusal(model)
        return
    reference = load(model)
    with Checkpoint.open(model) as checkpoint:
        whole = skeleton(checkpoint)
        made = whole.model
        assert torch.equal(made.get_output_embeddings().weight, reference.get_output_embeddings().weight)
        assert torch.equal(made.get_input_embeddings().weight, reference.get_input_embeddings().weight)
        whole.unload_outside()
        assert made.get_output_embeddings().weight.is_meta
        whole.place_head(read(checkpoint, whole.head()))
    assert torch.equal(made.get_output_embeddings().weight, head)


def test_the_working_precision(tmp_path: Path) -> None:
    with Checkpoint.open(write(tmp_path, "llama")) as checkpoint:
        found = layout(checkpoint)
        made = Skeleton(checkpoint, found, torch.float32, torch.device("cpu"), trust=False)
        made.place_outside(read(checkpoint, found.outside))
        for names in found.blocks:
            made.place(read(checkpoint, names))
    theirs = load(tmp_path, dtype=torch.float32).state_dict()
    narrow = {"model.embed_tokens.weight", "lm_head.weight"} | {linear.weight for linear in found.linears}
    for name, ours in made.model.state_dict().items():
        assert ours.dtype == (torch.bfloat16 if name in narrow else torch.float32), name
        assert torch.equal(ours.float(), theirs[name]), name


# --- what is refused


def test_an_architecture_transformers_does_not_know(tmp_path: Path) -> None:
    edit(write(tmp_path, "llama"), architectures=["NovelForCausalLM"], model_type="novel")
    message = refusal(tmp_path)
    assert message.startswith("architecture NovelForCausalLM is not supported: transformers cannot build it")
    assert "supported: Llama" in message


def test_a_config_of_another_shape(tmp_path: Path) -> None:
    edit(write(tmp_path, "llama"), intermediate_size=512)
    message = refusal(tmp_path)
    assert "mlp.down_proj.weight has shape [128, 256], config.json implies [128, 512]" in message
    assert "do not belong together" in message


def test_a_config_of_another_family(tmp_path: Path) -> None:
    edit(write(tmp_path, "llama"), architectures=["OPTForCausalLM"], model_type="opt", word_embed_proj_dim=128)
    assert refusal(tmp_path).startswith("architecture OPTForCausalLM is not supported: no module claims model.layers.0")


@pytest.mark.parametrize(
    "missing",
    [
        "model.norm.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.input_layernorm.weight",
    ],
)
def test_a_missing_tensor(missing: str, tmp_path: Path) -> None:
    model = write(tmp_path, "llama")
    weights = load_file(model / "model.safetensors")
    del weights[missing]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert f"the checkpoint lacks {missing} | download it again" in refusal(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_looks_like_a_linear_and_is_none(opened: Checkpoint, family: str) -> None:
    """A wrong guess of the layout must not reach the maths."""
    found = layout(opened)
    turned = tuple(replace(linear, transposed=not linear.transposed) for linear in found.linears)
    norm = "model.layers.0.input_layernorm" if family == "llama" else "transformer.h.0.ln_1"
    for linears in (turned, (*found.linears, replace(found.linears[0], name=norm))):
        with pytest.raises(
            InputError, match=rf"{found.architecture} is not supported: .* is a \w+ of .*, not a linear"
        ):
            Skeleton(opened, replace(found, linears=linears), torch.float32, torch.device("cpu"), trust=False)


def test_a_model_without_a_list_of_blocks(tmp_path: Path) -> None:
    with Checkpoint.open(write(tmp_path, "llama")) as checkpoint:
        found = layout(checkpoint)
        three = replace(found, blocks=(*found.blocks, ()), linears=())
        with pytest.raises(InputError, match="it has no list of 3 blocks"):
            Skeleton(checkpoint, three, torch.float32, torch.device("cpu"), trust=False)


def test_nothing_of_the_blocks_is_allocated(tmp_path: Path) -> None:
    with Checkpoint.open(write(tmp_path, "llama")) as checkpoint:
        made = skeleton(checkpoint)
    real = {name for name, parameter in made.model.named_parameters() if not parameter.is_meta}
    assert real == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert isinstance(made.blocks, nn.ModuleList)
