"""A checkpoint several times larger than the memory that the process is allowed is compressed all the same."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from llmpare.cli.exits import main
from llmpare.cli.progress import Watcher
from llmpare.compress.checkpoint.write import CheckpointWriter, TensorSpec
from llmpare.compress.estimate import process

MIB = 2**20
LIMIT = 176 * MIB  # of memory that is private to the process, touched or not, beyond what imports reserve
SPARE = 96 * MIB  # of what the estimate allows for the process is not taken by imports: stacks and arenas of threads
BLOCKS, HIDDEN, INNER = 28, 1024, 4096


def shapes(inner: int) -> dict[str, tuple[int, ...]]:
    """Of a block's tensors."""
    return {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (inner, HIDDEN),
        "mlp.up_proj": (inner, HIDDEN),
        "mlp.down_proj": (HIDDEN, inner),
    }


def large_llama(folder: Path, *, blocks: int = BLOCKS, inner: int = INNER) -> int:
    """Writes a Llama whose blocks all hold the same random weights, one tensor at a time. Returns its bytes."""
    folder.mkdir()
    config = tiny.config(
        blocks=blocks, tied=True, dtype="bfloat16", hidden_size=HIDDEN, intermediate_size=inner,
        num_attention_heads=8, num_key_value_heads=2, head_dim=HIDDEN // 8,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.EXAMPLE / name, folder / name)
    specs = [TensorSpec("model.embed_tokens.weight", "BF16", (tiny.VOCABULARY, HIDDEN))]
    for index in range(blocks):
        specs += [TensorSpec(f"model.layers.{index}.{n}.weight", "BF16", shape) for n, shape in shapes(inner).items()]
    specs.append(TensorSpec("model.norm.weight", "BF16", (HIDDEN,)))
    made = {spec.shape: weights(spec.shape) for spec in specs}
    with CheckpointWriter(folder, specs) as writer:
        for spec in specs:
            writer.write(spec.name, made[spec.shape])
        writer.sync()
    return sum(spec.nbytes for spec in specs)


def weights(shape: tuple[int, ...]) -> bytes:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = 1 + 0.1 * values if len(shape) == 1 else values * shape[1] ** -0.5
    return values.bfloat16().view(torch.uint8).numpy().tobytes()


@pytest.mark.slow
def test_a_model_several_times_larger_than_memory(tmp_path: Path) -> None:
    size = large_llama(tmp_path / "model")
    assert size > 4 * LIMIT
    command = [
        "quantize", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--json",
        "--method", "rtn", "--dataset", "none", "--eval-nsamples", "1", "--seqlen", "32",
        "--ignore", "mlp|[qkv]_proj",  # their search takes time, and no memory that o_proj's does not
    ]  # fmt: skip
    done = tiny.limited(command, LIMIT)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert len(report["blocks"]) == BLOCKS
    assert report["size"]["output_bytes"] > 4 * LIMIT  # what was not compressed went through as well
    shutil.rmtree(tmp_path)  # gigabytes that no later test should have to share the disk with


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_max_memory_is_kept_to_and_the_estimate_is_near(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states wait in a file, batches come one at a time, and the process is held to the least that was planned,
    in memory that is private to it and in memory that it really touched. It takes up what another one began.
    """
    large_llama(tmp_path / "model", blocks=3, inner=2048)
    text = tmp_path / "windows.jsonl"
    ids = torch.randint(2, tiny.VOCABULARY, (34, 128), generator=torch.Generator().manual_seed(0)).tolist()
    text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    command = [
        "quantize", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--json", "--dataset", str(text),
        "--nsamples", "32", "--seqlen", "128", "--eval-dataset", str(text), "--eval-nsamples", "2", "--device", "cpu",
        "--rounds", "0", "--ignore", "mlp.(gate|up)|[qkv]_proj",
    ]  # fmt: skip
    assert main([*command, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    least = planned["least_memory_bytes"]
    assert least < planned["memory_bytes"] - 32 * MIB
    monkeypatch.setattr(Watcher, "block", stop)
    assert main(command) == 130
    done = tiny.limited([*command, "--max-memory", str(least)], least - process() + SPARE)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert [block["resumed"] for block in report["blocks"]] == [True, False, False]
    cost = report["cost"]
    assert cost["predicted_memory_bytes"] == least
    assert least / 1.25 < cost["peak_rss_bytes"] <= least
