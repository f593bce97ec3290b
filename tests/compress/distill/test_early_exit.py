"""Exits in training, and drafting with them through stock transformers."""

import math

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llmpare.compress.distill import confidence, drafting, early_exit, losses
from llmpare.compress.distill.early_exit import EarlyExit
from llmpare.compress.distill.forward import Forward
from llmpare.compress.distill.losses import Objective
from llmpare.compress.distill.targets import Batch, Outputs
from llmpare.compress.distill.teachers import LiveTeacher, TextAlone
from llmpare.compress.errors import UnsupportedError, UsageError

SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.3,
}  # fmt: skip
TEXT = Objective(share=1.0)


def model(kind: str = "llama", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, query_pre_attn_scalar=16)),
    }[kind]()
    for parameter in made.parameters():  # nothing is left at its initial value, norms above all
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (3, 9), generator=generator)
    return Batch(ids, torch.rand(3, 8, generator=generator) < 0.7, torch.arange(3))


def loss_of(student: PreTrainedModel, extension: EarlyExit, text: Batch) -> Tensor:
    """What the extension adds for a batch that the student has just read."""
    forward = Forward(student)
    hidden, _ = forward.hidden(text.ids)
    found = extension.extra_loss(Outputs(text.counting(hidden), None, forward, 0.0), text)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_the_loss_of_an_exit_is_that_of_the_model_cut_there(kind: str) -> None:
    """By transformers' own way of cutting it, with its own norm and head; and so are the gradients."""
    student, teacher, text = model(kind), model(kind, 1), batch()
    extension = EarlyExit(LiveTeacher(teacher), Objective(), [3, 1], weight=0.6)
    extension.prepare(student.eval())
    found = loss_of(student, extension, text)
    found.backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    extension.finish(student)

    student.zero_grad()
    expected = torch.zeros((), dtype=torch.float64)
    wanted = teacher(text.ids).logits[:, :-1][text.mask].double().detach()
    for exit_ in (1, 3):
        student.config.num_hidden_layers = exit_
        logits = student(text.ids, use_cache=False).logits[:, :-1][text.mask].double()
        expected = expected + 0.3 * losses.forward_kl(logits, wanted, 1.0).sum()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, parameter in student.named_parameters():
        if parameter.grad is None:
            assert gradients[name] is None or not gradients[name].any()
        else:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_deeper_blocks_are_left_out_more_often() -> None:
    """Window by window, as often as stated, in training only; the first block never."""
    rates = early_exit.rates(4, 0.4)
    assert rates == pytest.approx([0.4 * (2 ** (block / 3) - 1) for block in range(4)])
    assert early_exit.rates(1, 0.4) == [0.0]
    student = model()
    extension = EarlyExit(TextAlone(), TEXT, [2], dropout=0.8)
    extension.prepare(student)
    counts = torch.zeros(4)
    seen: list[Tensor] = []
    blocks = student.model.layers
    for index, block in enumerate(blocks):
        block.register_forward_hook(
            lambda module, args, out, index=index: counts.__setitem__(
                index, counts[index] + (out == args[0]).flatten(1).all(1).sum()
            )
        )
    ids = torch.randint(0, 50, (200, 2))
    with torch.no_grad():
        student.eval()
        seen.append(student(ids).logits)
        assert not counts.any()
        student.train()
        student(ids)
        extension.finish(student)
        share = counts / len(ids)
        student(ids)
        assert torch.equal(share, counts / len(ids))
        assert torch.equal(student(ids).logits, seen[0])
    for found, rate in zip(share.tolist(), early_exit.rates(4, 0.8), strict=True):
        assert abs(found - rate) <= 4 * math.sqrt(max(rate * (1 - rate), 1e-12) / len(ids))


def test_a_recomputed_block_is_left_out_for_the_same_windows() -> None:
    """Gradient checkpointing runs every block twice."""
    gradients = []
    for recompute in (False, True):
        student, text = model(), batch()
        if recompute:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        extension = EarlyExit(TextAlone(), TEXT, [1, 2], dropout=0.9)
        extension.prepare(student.train())
        torch.manual_seed(3)
        forward = Forward(student)
        hidden, _ = forward.hidden(text.ids)
        outputs = Outputs(text.counting(hidden), None, forward, 0.0)
        extra = extension.extra_loss(outputs, text)
        assert extra is not None
        (extra + outputs.hidden.square().sum()).backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_exits_there_cannot_be_are_refused() -> None:
    for wrong in (0, 4, 9):
        with pytest.raises(UsageError, match=f"--early-exit {wrong}: the student has 4 blocks"):
            EarlyExit(TextAlone(), TEXT, [2, wrong]).prepare(model())
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=2, n_positions=32))
    with pytest.raises(UnsupportedError, match="it runs all its blocks"):
        EarlyExit(TextAlone(), TEXT, [1]).prepare(gpt2)
    assert gpt2.config.num_hidden_layers == 3


def test_drafts_change_nothing_and_are_counted() -> None:
    """An exit behind which nothing happens drafts as the whole model speaks: all is accepted. One of noise is not."""
    student = model().eval()
    for block in student.model.layers[2:]:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    student.generation_config.eos_token_id = None
    student.generation_config.assistant_confidence_threshold = 0.0
    student.generation_config.num_assistant_tokens = 5
    prompts = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0))[:1]
    poor, good = drafting.measure(student, prompts, [1, 2], 12)
    assert (poor.equal, good.equal) == (1.0, 1.0)
    assert (good.tokens, good.drafted, good.accepted, good.checks) == (12, 10, 10, 2)
    assert poor.tokens == 12
    assert poor.accepted < poor.drafted
    entry = good.to_json()
    assert entry["acceptance"] == 1.0
    assert entry["speedup"] == pytest.approx(good.plain_seconds[0] / good.drafted_seconds[0])
    assert student.config.num_hidden_layers == 4


def idle_behind(student: PreTrainedModel, exit_: int) -> PreTrainedModel:
    """The model, with blocks that do nothing behind the exit, and texts without an end."""
    for block in student.model.layers[exit_:]:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    student.generation_config.eos_token_id = None
    return student.eval()


def test_the_cost_of_drafting_is_told_from_the_text_alone() -> None:
    """An exit that is always right: transformers itself makes as many drafts and checks, whatever the threshold."""
    student = idle_behind(model(), 2)
    prompt = torch.randint(0, 50, (1, 6), generator=torch.Generator().manual_seed(0))
    text = drafting.generate(student, prompt, 60, None)
    guesses = confidence.guess(student, text, 6, 2)
    assert all(guesses.right)
    seen = set()
    for threshold in (0.0, 0.4, 0.8):
        student.generation_config.num_assistant_tokens = confidence.LONGEST
        student.generation_config.num_assistant_tokens_schedule = "constant"
        student.generation_config.assistant_confidence_threshold = threshold
        found = drafting.measure(student, prompt, [2], 60)[0]
        assert confidence.spent(guesses, threshold, 0.0) == found.checks
        assert confidence.spent(guesses, threshold, 1.0) == found.checks + found.drafted
        seen.add(found.checks)
    assert len(seen) > 1
    for share in (0.0, 0.25):
        once = confidence.Guesses([True] * 4, [0.9, 0.3, 0.9, 0.9])
        assert confidence.spent(once, 0.5, share) == 2 + 2 * share
    wrong = confidence.Guesses([True, False, True, True], [0.9, 0.9, 0.1, 0.9])
    assert confidence.spent(wrong, 0.5, 0.25) == pytest.approx(2 + 4 * 0.25)  # three drafted, one stays; one, it stays


def test_an_exit_that_is_often_wrong_has_to_be_surer() -> None:
    student = idle_behind(model(), 2)
    prompts = torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    texts = [drafting.generate(student, prompt, 30, None) for prompt in prompts.split(1)]
    chosen = {exit_: confidence.settings(student, texts, 6, [exit_]) for exit_ in (1, 2)}
    assert chosen[2]["assistant_confidence_threshold"] == 0.0
    assert chosen[1]["assistant_confidence_threshold"] > 0.0
    assert confidence.settings(student, texts, 6, [1, 2]) == chosen[2]  # the best exit decides
    assert student.config.num_hidden_layers == 4
