import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import text, write

from llmpare.compress import prune
from llmpare.compress.errors import InputError, LlmpareError, UsageError
from llmpare.compress.plan import plan_prune
from llmpare.compress.planning import Plan
from llmpare.compress.prune.request import MEASURED, MaskRequest, Pattern, parse_pattern
from llmpare.compress.request import NO_TEXT, Scheme, TextSpec


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plan") / "llama", "llama")


def asked(model: Path, **changes: Any) -> MaskRequest:
    options = prune.resolve(changes.get("method", prune.DEFAULT), changes.pop("options", {}))
    spec = TextSpec(str(text(model, "calibration")), nsamples=4, seqlen=64)
    return MaskRequest(str(model), Path("out"), **{"options": options, "calibration": spec, **changes})


def plan(model: Path, **changes: Any) -> Plan:
    return plan_prune(asked(model, **changes))


def refusal(error: type[LlmpareError], model: Path, **changes: Any) -> str:
    with pytest.raises(error) as caught:
        plan(model, **changes)
    return f"{caught.value} | {caught.value.hint}"


def fates(planned: Plan) -> dict[str, set[str]]:
    """What becomes of tensors, by the last part of their linear's name."""
    found: dict[str, set[str]] = {}
    for each in planned.to_json()["tensors"]:
        found.setdefault(each["name"].split(".")[-2], set()).add(each["fate"])
    return found


def test_every_tensor_has_a_fate(llama: Path) -> None:
    planned = plan(llama, sparsity=0.25, ignore=("down_proj",))
    found = fates(planned)
    assert found["q_proj"] == {"25% zeros"}
    assert found["down_proj"] == {"dense, as asked"}
    assert found["embed_tokens"] == found["norm"] == {"copied"}
    assert planned.output_bytes == planned.source_bytes
    assert fates(plan(llama, pattern=Pattern(2, 4), then=Scheme(4, 64)))["q_proj"] == {"2:4 sparse, W4A16 g64"}


def test_lines_say_what_a_mask_does_not_save(llama: Path) -> None:
    lines = "\n".join(plan(llama).lines())
    assert "50% of the weights in linears zero" in lines
    assert "the file is no smaller" in lines
    assert "scattered" in lines
    pattern = "\n".join(plan(llama, pattern=Pattern(2, 4)).lines())
    assert "torch.sparse.to_sparse_semi_structured" in pattern
    assert "hardware knows only 2:4" in "\n".join(plan(llama, pattern=Pattern(4, 8)).lines())
    packed = plan(llama, then=Scheme(4, 64))
    assert "linears 4.2" in packed.outcome()
    assert packed.output_bytes < packed.source_bytes


def test_patterns_that_do_not_divide(tmp_path: Path) -> None:
    model = write(tmp_path, "llama", settings={"intermediate_size": 132})
    message = refusal(InputError, model, pattern=Pattern(4, 8))
    assert "pattern 4:8 does not divide the columns of model.layers.0.mlp.down_proj [128, 132]" in message
    assert plan(model, pattern=Pattern(4, 8), ignore=("down_proj",))
    assert plan(model, pattern=Pattern(2, 4))


def test_what_cannot_be_asked_for(llama: Path) -> None:
    assert "no linear is left to prune" in refusal(InputError, llama, ignore=("layers",))
    assert "needs calibration text" in refusal(UsageError, llama, calibration=TextSpec(NO_TEXT))
    nothing = {"calibration": TextSpec(NO_TEXT), "method": "magnitude"}
    assert plan(llama, **nothing)
    assert "needs calibration text" in refusal(UsageError, llama, **nothing, options={"refit": 1.0})
    assert "needs calibration text" in refusal(UsageError, llama, **nothing, then=Scheme(4, 64))
    assert "needs calibration text" in refusal(UsageError, llama, **nothing, allocation=MEASURED)
    assert "pattern 'nowhere' matches no linear" in plan(llama, ignore=("nowhere",)).warnings
    assert "the group size does not divide" in refusal(
        InputError, write(llama.with_name("odd"), "llama", settings={"intermediate_size": 132}), then=Scheme(4, 64)
    )


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_shares_are_shares(wrong: float, llama: Path) -> None:
    with pytest.raises(UsageError, match="is not between 0 and 1"):
        asked(llama, sparsity=wrong)


def test_patterns() -> None:
    assert parse_pattern("2:4") == Pattern(2, 4)
    assert (parse_pattern("1:4").sparsity, parse_pattern("4:8").name) == (0.75, "4:8")
    for wrong in ("2", "2:", "a:b", "-1:4", "2:4:8"):
        with pytest.raises(UsageError, match="is not N:M"):
            parse_pattern(wrong)
    for impossible in ("0:4", "5:4", "2:65"):
        with pytest.raises(UsageError, match="is not possible"):
            parse_pattern(impossible)


def test_a_pattern_leaves_nothing_to_allocate(llama: Path) -> None:
    with pytest.raises(UsageError, match="leaves nothing to allocate"):
        asked(llama, pattern=Pattern(2, 4), allocation=MEASURED)
    with pytest.raises(UsageError, match="unknown allocation"):
        asked(llama, allocation="owl")


def test_options_of_methods() -> None:
    assert dict(prune.resolve("alps", {"iterations": 40})) == {"damping": 0.01, "iterations": 40, "refit": 1.0}
    with pytest.raises(UsageError, match="method wanda has no option --iterations"):
        prune.resolve("wanda", {"iterations": 3})
    with pytest.raises(UsageError, match="unknown method 'sparsgpt'") as caught:
        prune.find("sparsgpt")
    assert "did you mean sparsegpt?" in caught.value.hint


def test_planning_needs_no_torch(llama: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from llmpare.compress.plan import plan_prune;"
        "from llmpare.compress import prune; from llmpare.compress.prune.request import MaskRequest;"
        "plan_prune(MaskRequest(sys.argv[1], Path('out'), options=prune.resolve('alps', {}))).lines();"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(llama)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
