"""The gptq format in the library it comes from, which knows nothing of this project and runs on a CPU.

auto-gptq needs a transformers too old for the project, so it gets an environment of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from families import load, request, tokens, write
from safetensors.torch import load_file

from llmpare.compress import formats
from llmpare.compress.plan import plan_quantize
from llmpare.compress.progress import Silent
from llmpare.compress.request import BITS, PER_CHANNEL, QuantizeRequest, Scheme
from llmpare.compress.run import run_quantize

LOADER = Path(__file__).parents[1] / "autogptq"
SCHEMES = [*(Scheme(bits, 128) for bits in BITS), Scheme(4, 32), Scheme(4, PER_CHANNEL), Scheme(3, PER_CHANNEL)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.version_info[:2] != (3, 11), reason="auto-gptq 0.7.1 and what it needs have wheels for Python 3.11 only"
    ),
]


def checked(*command: str | Path, **variables: str) -> None:
    """Runs a command without the settings that are meant for this process; fails with what it printed."""
    hidden = ("PIP_CONSTRAINT", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Llama whose rope_theta is not the one an old transformers falls back to."""
    settings = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    folder = tmp_path_factory.mktemp("autogptq") / "model"
    return write(folder, "llama", dtype=torch.float16, tied=False, settings=settings)


@pytest.fixture(scope="module")
def quantized(model: Path) -> Mapping[Scheme, QuantizeRequest]:
    """The model in every scheme, each with logits.npy beside it: what auto-gptq predicts, in float32."""
    made = {s: request(model, model.parent / s.name.replace(" ", "-"), scheme=s, format="gptq") for s in SCHEMES}
    for asked in made.values():
        run_quantize(asked, Silent())
    checked(sys.executable, "-m", "venv", model.parent / "environment")
    python = model.parent / "environment" / "bin" / "python"
    install = ("-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check")
    checked(python, *install, "-r", LOADER / "requirements.txt", BUILD_CUDA_EXT="0")
    ids = model.parent / "ids.json"
    ids.write_text(json.dumps(tokens().tolist()))
    checked(python, LOADER / "load.py", ids, *(asked.out for asked in made.values()), HF_HUB_OFFLINE="1")
    return made


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_the_logits_of_the_dequantized_model(
    scheme: Scheme, model: Path, quantized: Mapping[Scheme, QuantizeRequest]
) -> None:
    asked = quantized[scheme]
    stored = load_file(asked.out / "model.safetensors")
    dense = load(model, dtype=torch.float32)
    form = formats.find("gptq")
    weights = {n.weight: form.decode(n, s, stored) for n, s in plan_quantize(asked).quantized.items()}
    with torch.no_grad():
        original = dense(tokens()).logits
        dense.load_state_dict({**dense.state_dict(), **weights})
        ours = dense(tokens()).logits
    theirs = torch.from_numpy(np.load(asked.out / "logits.npy"))
    assert (theirs - ours).abs().max() < 1e-4
    assert (theirs - original).abs().max() > 1e-1
