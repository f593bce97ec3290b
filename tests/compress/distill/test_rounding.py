"""--student-scheme through the command line: codes that were trained, in files that servers load."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from llmpare.cli.exits import main
from llmpare.compress.checkpoint.read import Checkpoint
from llmpare.compress.formats.decoded import open_dense

SHAPE = ["--student-scheme", "W2A16", "--group-size", "32"]


def command(model: Path, text: tiny.Text, out: Path, *more: str) -> list[str]:
    return [
        "distill", "--teacher", str(model), "--student", str(model), "-o", str(out), "--dataset", str(text[0]),
        "--eval-dataset", str(text[1]), "--eval-nsamples", "2", "--seqlen", "32", "--tokens", "4096",
        "--batch-tokens", "128", "--lr", "3e-4", "--device", "cpu", "--quiet", *SHAPE, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("rounding") / "model", tied=True)


def test_training_beats_what_it_began_with_in_the_same_format(tmp_path: Path, model: Path) -> None:
    text, out = tiny.texts(tmp_path), tmp_path / "out"
    assert main(command(model, text, out)) == 0
    report = json.loads((out / "report.json").read_bytes())
    untrained, trained = report["distillation"]["quantized_without_training"], report["fidelity"]
    assert trained["kl"]["mean"] < untrained["kl"]["mean"]
    assert main(tiny.quantize(model, tmp_path / "gptq", text, "--bits", "2", "--quiet")) == 0
    with Checkpoint.open(out) as made, Checkpoint.open(tmp_path / "gptq") as alone:
        shapes = [{name: (info.dtype, info.shape) for name, info in each.tensors.items()} for each in (made, alone)]
        configs = [each.config["quantization_config"] for each in (made, alone)]
    assert shapes[0] == shapes[1]
    assert configs[0] == configs[1]
    with open_dense(out) as source:
        assert source.scheme.endswith("W2A16 g32")
        for name in source.packed:
            weight = source.tensor(name, torch.float32)
            assert all(len(row.unique()) <= 4 for row in weight.reshape(-1, 32))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if "partial" in name or "rounded" in name] == []
    assert AutoModelForCausalLM.from_pretrained(out)(torch.arange(8)[None]).logits.isfinite().all()


def test_a_format_without_codes_is_refused_before_anything_runs(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(model, tiny.texts(tmp_path), out, "--format", "dense")) == 2
    assert "keeps no codes" in capsys.readouterr().err
    assert not out.exists()
