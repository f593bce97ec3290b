"""A block that is left out as a whole: nothing in it changes, and the others fare no worse for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import request, write
from safetensors.torch import load_file

from llmpare.compress import quantize
from llmpare.compress.progress import Silent
from llmpare.compress.request import LayerRule, Scheme
from llmpare.compress.run import run_quantize


@pytest.mark.parametrize(
    ("method", "given"), [("gptq", {"correction": 1.0}), ("tuned", {"steps": 60})], ids=["corrected", "tuned"]
)
def test_what_comes_later_aims_at_the_original(method: str, given: dict[str, Any], tmp_path: Path) -> None:
    """Methods that look at the original model's stream take it past the block: they end nearer than one without."""
    model = write(tmp_path / "model", "llama")
    rules = (LayerRule(r"layers\.0\.", None),)
    found = {}
    for out, how, options in ("plain", "gptq", {}), ("aiming", method, given):
        resolved = quantize.resolve(how, options)
        asked = request(model, tmp_path / out, method=how, options=resolved, scheme=Scheme(3, 32), rules=rules)
        found[out] = run_quantize(asked, Silent())["fidelity"]["kl"]["mean"]
        before, after = load_file(model / "model.safetensors"), load_file(asked.out / "model.safetensors")
        inside = [name for name in before if name.startswith("model.layers.0.")]
        assert inside
        assert all(torch.equal(after[name], before[name]) for name in inside)
    assert found["aiming"] < 1.1 * found["plain"]
