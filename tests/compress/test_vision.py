"""Models that look at images: their decoder is compressed, and all else stays as it was, to the byte."""

import json
from pathlib import Path

import pytest
import torch
from families import request, text, tokens
from seeing import SEEING, load, picture, write
from torch import Tensor, nn

from llmpare.cli.exits import main
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.checkpoint.tensors import from_info
from llmpare.compress.model.layout import layout
from llmpare.compress.model.replay import Replay
from llmpare.compress.model.skeleton import Skeleton
from llmpare.compress.progress import Silent
from llmpare.compress.report import html
from llmpare.compress.request import NO_TEXT, LayerRule, Scheme, TextSpec
from llmpare.compress.run import run_quantize


@pytest.fixture(autouse=True)
def without_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page takes longer than the run; tests/compress/report look at it."""
    monkeypatch.setattr(html, "render", lambda report: "")


def tensors(folder: Path) -> dict[str, Tensor]:
    with Checkpoint.open(folder) as source:
        return {name: from_info(source.read(name), info) for name, info in source.tensors.items()}


def features(model: nn.Module, name: str) -> Tensor:
    """What the vision tower and its projector make of a picture."""
    seen = {key: value for key, value in picture(name).items() if key in ("pixel_values", "image_grid_thw")}
    found = model.get_image_features(**seen)
    found = found.pooler_output if not isinstance(found, Tensor) else found
    return torch.cat(list(found)) if not isinstance(found, Tensor) else found


@pytest.mark.parametrize("name", SEEING)
@torch.no_grad()
def test_the_decoder_is_compressed_and_the_rest_is_not_touched(name: str, tmp_path: Path) -> None:
    model = write(tmp_path / "model", name)
    original = load(model)
    made = {}
    for form in ("compressed-tensors", "dense"):
        asked = request(model, tmp_path / form, format=form, method="rtn", scheme=Scheme(4, 32))
        report = run_quantize(asked, Silent())
        made[form] = load(asked.out)
        assert (asked.out / "preprocessor_config.json").read_bytes() == b'{"do_resize": true}\n'
    quantized = {linear["name"] for block in report["blocks"] for linear in block["linears"]}
    assert len(quantized) == 14
    before, after = tensors(model), tensors(tmp_path / "dense")
    for key, value in before.items():
        assert torch.equal(after[key], value) != (key.removesuffix(".weight") in quantized), key
    decoder = original.model.language_model.layers
    assert len(quantized) == sum(isinstance(module, nn.Linear) for module in decoder.modules())

    packed, dense = made["compressed-tensors"], made["dense"]
    ids = tokens(1, 16)[:, :16] % 3900
    assert torch.equal(packed(input_ids=ids).logits, dense(input_ids=ids).logits)
    assert torch.equal(packed(**picture(name)).logits, dense(**picture(name)).logits)
    assert not torch.equal(packed(**picture(name)).logits, original(**picture(name)).logits)
    assert torch.equal(features(packed, name), features(original, name))


@pytest.mark.parametrize("name", SEEING)
@torch.no_grad()
def test_what_is_left_out_and_schemes_of_their_own_are_found_again(name: str, tmp_path: Path) -> None:
    """Loaders give a decoder inside of another model other names than the file, and a tower may use them as well."""
    model = write(tmp_path / "model", name)
    rules = (LayerRule(r"layers\.0\.self_attn", None), LayerRule("self_attn", Scheme(8, 32)))
    made = {}
    for form in ("compressed-tensors", "dense"):
        asked = request(model, tmp_path / form, format=form, method="rtn", scheme=Scheme(4, 32), rules=rules)
        run_quantize(asked, Silent())
        made[form] = load(asked.out)
    packed, dense, original = made["compressed-tensors"], made["dense"], load(model)
    ids = tokens(1, 16)[:, :16] % 3900
    assert torch.equal(packed(input_ids=ids).logits, dense(input_ids=ids).logits)
    assert torch.equal(features(packed, name), features(original, name))
    left, kept = (each.model.language_model.layers[0].self_attn.o_proj.weight for each in (packed, original))
    assert torch.equal(left, kept)


@pytest.mark.parametrize("name", SEEING)
@torch.no_grad()
def test_block_by_block_is_the_whole_model(name: str, tmp_path: Path) -> None:
    """To the last bit, as in test_replay."""
    reference, ids = load(write(tmp_path, name)), tokens() % 3900
    expected: list[Tensor] = []
    blocks = reference.model.language_model.layers
    for block in blocks:
        block.register_forward_hook(lambda module, args, out: expected.append(out))
    reference(input_ids=ids, use_cache=False)
    with Checkpoint.open(tmp_path) as source:
        found = layout(source)
        skeleton = Skeleton(source, found, torch.bfloat16, torch.device("cpu"), trust=False)
        values = {key: from_info(source.read(key), info) for key, info in source.tensors.items()}
        skeleton.place_outside({key: values[key] for key in found.outside})
        skeleton.place({key: values[key] for names in found.blocks for key in names})
    replay = Replay(skeleton)
    hidden = replay.embed(ids)
    for index, theirs in enumerate(expected):
        hidden = replay.run(index, hidden)
        assert torch.equal(hidden, theirs)
    assert len(skeleton.blocks) == len(expected) == 2


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """plan says what is copied; evaluate reads the text; a mask keeps all shapes, and nothing else may change them."""
    model, out = write(tmp_path / "model", "llava"), tmp_path / "out"
    assert main(["plan", str(model)]) == 0
    shown = capsys.readouterr().out
    assert "LlavaForConditionalGeneration, 2 blocks" in shown
    assert "vision_tower.encoder.layers.*.mlp.fc1.weight" in shown
    spec = ["--eval-dataset", str(text(model, "evaluation")), "--eval-nsamples", "2", "--seqlen", "32"]
    common = ["--quiet", "--device", "cpu"]
    command = ["prune", str(model), "-o", str(out), "--sparsity", "0.5", "--method", "magnitude", "--no-refit"]
    assert main([*command, "--dataset", "none", *spec, *common]) == 0
    capsys.readouterr()
    measure = ["evaluate", str(out), "--baseline", str(model), "--text", str(text(model, "evaluation"))]
    assert main([*measure, "--nsamples", "2", "--seqlen", "32", "--json", *common]) == 0
    fidelity = json.loads(capsys.readouterr().out)["candidates"][0]["fidelity"]
    assert fidelity["kl"]["mean"] > 1e-3
    for refused, said in (
        (["prune", "--ffn", "0.5"], "LlavaForConditionalGeneration also sees, and the shapes of its decoder must stay"),
        (["quantize", "--format", "gptq"], "loaders do not know this format beside a vision tower"),
    ):
        assert main([refused[0], str(model), "-o", str(tmp_path / "no"), *refused[1:], *common]) == 3
        assert said in capsys.readouterr().err


def test_without_text(tmp_path: Path) -> None:
    asked = request(
        write(tmp_path / "model", "qwen3_vl"), tmp_path / "out", method="rtn", calibration=TextSpec(NO_TEXT)
    )
    ignored = run_quantize(asked, Silent()) and json.loads((asked.out / "config.json").read_text())
    names = ignored["quantization_config"]["ignore"]
    assert {"lm_head", "model.visual.blocks.1.attn.qkv", "model.visual.merger.linear_fc1"} <= set(names)
    assert not [name for name in names if "language_model" in name]
