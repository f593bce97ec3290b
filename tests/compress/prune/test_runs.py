"""Whole runs that set weights to zero: what is written, what loads it, and whether the report tells the truth."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, LENGTH, load, measured, own_dtype, reported, text, tokens, write
from safetensors.torch import load_file
from torch import Tensor

from llmpare.compress import prune
from llmpare.compress.plan import plan_prune
from llmpare.compress.progress import Silent
from llmpare.compress.prune.plan import MaskPlan
from llmpare.compress.prune.request import MEASURED, MaskRequest, Pattern
from llmpare.compress.report import schema
from llmpare.compress.request import NO_TEXT, Scheme, TextSpec
from llmpare.compress.run import run_prune


@dataclass(frozen=True)
class Run:
    request: MaskRequest
    report: dict[str, Any]

    @property
    def plan(self) -> MaskPlan:
        plan = plan_prune(self.request)
        assert isinstance(plan, MaskPlan)
        return plan

    def before(self) -> dict[str, Tensor]:
        return tensors(Path(self.request.model))

    def after(self) -> dict[str, Tensor]:
        return tensors(self.request.out)


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def request(model: Path, out: Path, **changes: Any) -> MaskRequest:
    values: dict[str, Any] = {
        "options": prune.resolve(changes.get("method", prune.DEFAULT), {}),
        "calibration": TextSpec(str(text(model, "calibration")), nsamples=4, seqlen=LENGTH),
        "evaluation": TextSpec(str(text(model, "evaluation")), nsamples=2, seqlen=LENGTH),
        "device": "cpu",
        "dtype": own_dtype(model),
        **changes,
    }
    return MaskRequest(str(model), out, **values)


def run(model: Path, name: str = "out", **changes: Any) -> Run:
    asked = request(model, model.with_name(name), **changes)
    return Run(asked, run_prune(asked, Silent()))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("masks") / "model", "llama")


# --- every family


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    """Half of every linear is zero, all else is as it was, and plain transformers measures what the report says."""
    found = run(write(tmp_path / "model", family))
    assert schema.validate(found.report) == []
    before, after = found.before(), found.after()
    assert before.keys() == after.keys()
    linears = {linear.weight for linear in found.plan.layout.linears}
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor) != (name in linears), name
        if name in linears:
            assert int((after[name] == 0).sum()) == tensor.numel() // 2
    for path in Path(found.request.model).iterdir():
        if path.is_file() and path.suffix != ".safetensors" and "index" not in path.name:
            assert (found.request.out / path.name).read_bytes() == path.read_bytes()
    again = measured(load(Path(found.request.model)), load(found.request.out), Path(found.request.model))
    assert reported(found.report["fidelity"]) == pytest.approx(again, rel=1e-5, abs=1e-6)
    assert again["kl"] > 1e-4
    assert found.report["mask"]["sparsity"] == 0.5
    assert found.report["fallbacks"] == []


# --- how much


@pytest.mark.parametrize("method", prune.METHODS)
def test_nothing_to_prune_gives_the_input_back(method: str, llama: Path) -> None:
    """Byte for byte, whatever the method."""
    found = run(llama, f"nothing-{method}", sparsity=0.0, method=method)
    for path in llama.glob("*.safetensors"):
        assert tensors(found.request.out).keys() == tensors(llama).keys()
        for name, tensor in tensors(llama).items():
            assert torch.equal(tensors(found.request.out)[name], tensor), path
    assert found.report["fidelity"]["kl"]["mean"] == 0
    assert found.report["mask"]["zeros"] == 0
    assert schema.validate(found.report) == []


@pytest.mark.parametrize("method", prune.METHODS)
@pytest.mark.parametrize("refit", [0.0, 1.0])
def test_methods(method: str, refit: float, llama: Path) -> None:
    options = prune.resolve(method, {"refit": refit})
    found = run(llama, f"{method}-{refit}", sparsity=0.7, method=method, options=options)
    for block in found.report["blocks"]:
        for linear in block["linears"]:
            weights = linear["rows"] * linear["columns"]
            slack = {"sparsegpt": 8}.get(method, 1)
            assert linear["zeros"] == pytest.approx(0.7 * weights, abs=slack)
            before, after = linear["error_removed"], linear["relative_error"]
            if method in ("magnitude", "wanda") and not refit:
                assert after == pytest.approx(before, rel=1e-3)
            else:
                assert after < before


def test_everything_to_prune(llama: Path) -> None:
    found = run(llama, "everything", sparsity=1.0)
    assert not any(found.after()[linear.weight].any() for linear in found.plan.layout.linears)


@pytest.mark.parametrize("method", prune.METHODS)
def test_a_pattern_holds_in_every_group_that_is_written(method: str, llama: Path) -> None:
    found = run(llama, f"pattern-{method}", pattern=Pattern(2, 4), method=method)
    for linear in found.plan.layout.linears:
        groups = found.after()[linear.weight].reshape(-1, 4)
        assert ((groups != 0).sum(1) <= 2).all()
    assert found.report["mask"]["pattern"] == "2:4"
    assert found.report["mask"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert any("torch.sparse.to_sparse_semi_structured" in line for line in found.report["mask"]["saved"])


def test_what_is_stored_transposed_has_its_pattern_along_the_inputs(tmp_path: Path) -> None:
    found = run(write(tmp_path / "model", "gpt2"), pattern=Pattern(4, 8))
    for linear in found.plan.layout.linears:
        assert linear.transposed
        assert ((found.after()[linear.weight].t().reshape(-1, 8) != 0).sum(1) <= 4).all()


def test_linears_that_are_left_alone(llama: Path) -> None:
    found = run(llama, "ignored", ignore=("self_attn", r"1\.mlp"))
    before, after = found.before(), found.after()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert before.keys() - same == {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert len(found.report["kept_dense"]) == 11
    assert found.report["blocks"][1]["linears"] == []


# --- together with quantization


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "dense"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_then_quantized(form: str, symmetric: bool, llama: Path) -> None:
    scheme = Scheme(4, 32, symmetric)
    found = run(llama, f"then-{form}-{symmetric}", pattern=Pattern(2, 4), then=scheme, format=form)
    stored, plan = found.after(), found.plan
    for linear in plan.layout.linears:
        own = {name: tensor for name, tensor in stored.items() if name.startswith(linear.name + ".")}
        weight = plan.format.decode(linear, scheme, own)
        assert ((weight.reshape(-1, 4) != 0).sum(1) <= 2).all()
        values = weight.reshape(linear.rows, -1, 32)
        assert all(len(group.unique()) <= 16 for group in values.flatten(0, 1)[:50])
    assert schema.validate(found.report) == []
    assert (found.report["size"]["linear_bits_per_weight"] < 6) == (form != "dense")
    if form == "compressed-tensors" and symmetric:
        loaded = load(found.request.out)
        loaded(tokens())  # compressed-tensors puts the weights into place only now
        again = measured(load(llama), loaded, llama)
        assert reported(found.report["fidelity"]) == pytest.approx(again, rel=1e-5, abs=1e-6)


# --- as careful as any other run


def test_the_same_command_writes_the_same_bytes(llama: Path) -> None:
    first = run(llama, "once")
    second = replace(first.request, out=llama.with_name("twice"))
    run_prune(second, Silent())
    for path in first.request.out.iterdir():
        if not path.name.startswith("report."):
            assert (second.out / path.name).read_bytes() == path.read_bytes()


def test_a_finished_output_is_verified_and_kept(llama: Path) -> None:
    first = run(llama, "finished")
    written = (first.request.out / "model.safetensors").stat().st_mtime_ns
    assert run_prune(first.request, Silent())["mask"] == first.report["mask"]
    assert (first.request.out / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("then", [None, Scheme(4, 32)], ids=["dense", "W4A16"])
def test_a_run_that_was_cut_short_is_taken_up(then: Scheme | None, llama: Path) -> None:
    class Stop(Exception):
        pass

    class Stopping(Silent):
        def block(self, index: int, total: int, facts: Any) -> None:
            raise Stop

    name = f"resumed-{then is None}"
    undisturbed = run(llama, f"undisturbed-{then is None}", then=then)
    asked = request(llama, llama.with_name(name), then=then)
    with pytest.raises(Stop):
        run_prune(asked, Stopping())
    report = run_prune(asked, Silent())
    assert [block["resumed"] for block in report["blocks"]] == [True, False]
    for path in undisturbed.request.out.iterdir():
        if not path.name.startswith("report."):
            assert (asked.out / path.name).read_bytes() == path.read_bytes()
    assert reported(report["fidelity"]) == reported(undisturbed.report["fidelity"])


def test_without_text(llama: Path) -> None:
    found = run(llama, "no-text", method="magnitude", calibration=TextSpec(NO_TEXT))
    assert found.report["calibration"] is None
    assert found.report["mask"]["sparsity"] == 0.5
    same = run(llama, "with-text", method="magnitude")
    assert all(torch.equal(a, b) for a, b in zip(found.after().values(), same.after().values(), strict=True))


def test_the_page_says_what_a_mask_does_not_save(llama: Path) -> None:
    found = run(llama, "page")
    page = (found.request.out / "report.md").read_text()
    assert "## What the mask saves" in page
    assert "The zeros are stored: the file is no smaller" in page
    assert json.loads((found.request.out / "report.json").read_bytes())["command"] == "prune"


# --- more where it costs less


def test_sparsity_by_measured_cost(llama: Path) -> None:
    """As many zeros in all, in other places; and a resumed run does not measure again."""
    found = run(llama, "measured", allocation=MEASURED)
    shares = {
        linear["name"]: linear["zeros"] / (linear["rows"] * linear["columns"])
        for block in found.report["blocks"]
        for linear in block["linears"]
    }
    assert found.report["mask"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert max(shares.values()) - min(shares.values()) > 0.02
    assert min(shares.values()) > 0.29
    assert max(shares.values()) < 0.71
    for index in (0, 1):
        attention = [shares[f"model.layers.{index}.self_attn.{name}_proj"] for name in "qkv"]
        assert attention == pytest.approx([attention[0]] * 3, abs=1e-3)
    again = measured(load(llama), load(found.request.out), llama)
    assert reported(found.report["fidelity"]) == pytest.approx(again, rel=1e-5, abs=1e-6)


def test_a_resumed_run_does_not_measure_again(llama: Path) -> None:
    class Stop(Exception):
        pass

    class Watching(Silent):
        def __init__(self, *, stop: bool) -> None:
            self.phases: list[str] = []
            self._stop = stop

        def phase(self, name: str) -> None:
            self.phases.append(name)

        def block(self, index: int, total: int, facts: Any) -> None:
            if self._stop:
                raise Stop

    asked = request(llama, llama.with_name("measured-resumed"), allocation=MEASURED)
    first, second = Watching(stop=True), Watching(stop=False)
    with pytest.raises(Stop):
        run_prune(asked, first)
    report = run_prune(asked, second)
    assert ("surveying" in first.phases, "surveying" in second.phases) == (True, False)
    assert [block["resumed"] for block in report["blocks"]] == [True, False]
    undisturbed = replace(asked, out=llama.with_name("measured-undisturbed"))
    run_prune(undisturbed, Silent())
    name = "model.safetensors"
    assert (asked.out / name).read_bytes() == (undisturbed.out / name).read_bytes()
