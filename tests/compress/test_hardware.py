import json
from pathlib import Path

import pytest
from families import request, write

from llmpare.compress import hardware
from llmpare.compress.errors import UsageError
from llmpare.compress.plan import plan_quantize
from llmpare.compress.progress import Silent
from llmpare.compress.run import run_quantize

SERVER = "avx2 avx512f avx512_bf16 amx_bf16"


def machine(monkeypatch: pytest.MonkeyPatch, flags: str, name: str = "flags", kind: str = "x86_64") -> None:
    text = f"processor\t: 0\nmodel name\t: any\n{name}\t\t: fpu {flags} sse2\nbugs\t: none\n"
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    monkeypatch.setattr(hardware.platform, "machine", lambda: kind)
    hardware._features.cache_clear()
    monkeypatch.setattr(hardware, "_features", hardware._features.__wrapped__)


@pytest.mark.parametrize(
    ("flags", "stored", "expected"),
    [
        (SERVER, "BF16", "BF16"),
        ("avx2 avx512f", "BF16", "F32"),  # bfloat16 would be emulated
        ("avx2", "BF16", "F32"),
        ("avx2", "F16", "F32"),
        (SERVER, "F16", "F32"),
        ("avx512_fp16", "F16", "F16"),
        ("avx2", "F32", "F32"),
    ],
)
def test_processors_run_in_what_they_multiply_in(
    flags: str, stored: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, flags)
    assert hardware.forward_dtype("auto", stored, "cpu") == expected
    assert hardware.forward_dtype("auto", stored, "cuda") == stored


def test_arm_names_its_features_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "asimd bf16", "Features", "aarch64")
    assert [hardware.multiplies(dtype) for dtype in ("BF16", "F16", "F32")] == [True, False, True]


def test_a_processor_is_called_what_the_system_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "avx2")
    assert hardware.processor() == "any"
    monkeypatch.setattr(Path, "read_text", lambda path: "processor\t: 0\nFeatures\t: asimd\n")
    monkeypatch.setattr(hardware.platform, "machine", lambda: "aarch64")
    assert hardware.processor() == "aarch64"


def test_a_system_that_lists_nothing_runs_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(hardware, "_features", hardware._features.__wrapped__)
    assert hardware.forward_dtype("auto", "BF16", "cpu") == "F32"


def test_what_is_asked_for_is_taken_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "avx2")
    assert hardware.forward_dtype("bfloat16", "F32", "cpu") == "BF16"
    assert hardware.forward_dtype("float32", "BF16", "cuda") == "F32"
    with pytest.raises(UsageError, match="unknown dtype 'int8'"):
        hardware.forward_dtype("int8", "BF16", "cpu")


def test_a_device_that_is_named_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [hardware.device_kind(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda"]
    monkeypatch.setattr(hardware, "torch_for_gpus", lambda: False)
    assert hardware.device_kind("auto") == "cpu"
    monkeypatch.setattr(hardware, "torch_for_gpus", lambda: True)
    for found, kind in (([], "cpu"), ([Path("/dev/nvidia0")], "cuda")):
        monkeypatch.setattr(Path, "glob", lambda path, pattern, found=found: iter(found))
        assert hardware.device_kind("auto") == kind


def test_a_run_is_in_the_precision_of_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint in bfloat16 on a processor without it: measured in float32, stored like any other."""
    monkeypatch.setattr(hardware, "multiplies", lambda dtype: dtype == "F32")
    asked = request(write(tmp_path / "model", "llama"), tmp_path / "out", dtype="auto")
    assert plan_quantize(asked).dtype == "F32"
    assert plan_quantize(asked, "cuda").dtype == "BF16"
    assert plan_quantize(asked, "cuda").needs.device == "cuda"
    report = run_quantize(asked, Silent())
    assert report["fidelity"]["dtype"] == "torch.float32"
    dtypes = {name: info["dtype"] for name, info in header(asked.out).items() if name != "__metadata__"}
    assert dtypes["model.norm.weight"] == "BF16"
    assert {dtypes[name] for name in dtypes if name.endswith("weight_scale")} == {"BF16"}


def header(folder: Path) -> dict[str, dict[str, str]]:
    data = (folder / "model.safetensors").read_bytes()
    found: dict[str, dict[str, str]] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found
