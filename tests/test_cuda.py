"""The same path on a GPU: skipped where there is none."""

from pathlib import Path

import pytest
import torch

from llmpare.compress.gram import Gram
from llmpare.compress.progress import Silent
from llmpare.compress.quantize import resolve
from llmpare.compress.request import QuantizeRequest, Scheme, TextSpec
from llmpare.compress.run import run_quantize

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MODEL = Path(__file__).parent.parent / "examples" / "tiny-llama"


def quantize(out: Path, device: str, method: str, options: dict[str, float] | None = None) -> dict:
    request = QuantizeRequest(
        model=str(MODEL),
        out=out,
        scheme=Scheme(bits=3),
        method=method,
        options=resolve(method, options or {}),
        calibration=TextSpec(nsamples=16, seqlen=256),
        evaluation=TextSpec(nsamples=8, seqlen=256),
        device=device,
    )
    return run_quantize(request, Silent())


@pytest.mark.parametrize("columns", [64, 257, 2049])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gram_products_are_exact_in_float32(columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(512, columns, device="cuda", dtype=dtype)
    y = torch.randn(512, columns, device="cuda", dtype=dtype)
    gram = Gram(columns, x.device, with_drift=True)
    gram.add(x[:200], y[:200])
    gram.add(x[200:], y[200:])
    found = gram.statistics()
    textbook = x.double().t() @ x.double() / 512
    assert torch.equal(found.gram, found.gram.t())
    torch.testing.assert_close(found.gram.double(), textbook, rtol=1e-5, atol=1e-5)
    assert found.drift is not None
    drift = (y - x).double().t() @ x.double() / 512
    torch.testing.assert_close(found.drift.double(), drift, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "options"), [("rtn", {}), ("gptq", {}), ("tuned", {"steps": 10})])
def test_cuda_loses_as_little_as_the_cpu(tmp_path: Path, method: str, options: dict[str, float]) -> None:
    on_cpu = quantize(tmp_path / "cpu", "cpu", method, options)
    on_cuda = quantize(tmp_path / "cuda", "cuda", method, options)
    assert on_cuda["cost"]["peak_device_bytes"] > 0
    assert on_cuda["fidelity"]["kl"]["mean"] == pytest.approx(on_cpu["fidelity"]["kl"]["mean"], rel=0.15)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize(tmp_path / name, "cuda", "gptq")
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b
