"""Text that the student writes itself: when, how much, and from which distribution."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmpare.compress.distill import on_policy
from llmpare.compress.distill.on_policy import OnPolicy
from llmpare.compress.distill.targets import Batch
from llmpare.compress.errors import UsageError


def student(vocabulary: int = 5) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.5, attention_dropout=0.5, eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def batch(windows: int = 3, tokens: int = 8) -> Batch:
    ids = torch.randint(0, 5, (windows, tokens), generator=torch.Generator().manual_seed(1))
    return Batch(ids, torch.ones(windows, tokens - 1, dtype=torch.bool), torch.arange(windows))


def test_what_the_student_writes_counts_and_nothing_else() -> None:
    text, model = batch(), student()
    torch.manual_seed(2)
    found = OnPolicy(1.0)(text, model, 0.5)
    assert found.indices is None
    assert torch.equal(found.ids[:, :4], text.ids[:, :4])
    assert not torch.equal(found.ids, text.ids)
    assert found.mask.tolist() == [[False] * 3 + [True] * 4] * 3
    assert torch.equal(found.targets, found.ids[:, 4:].flatten())
    assert model.training


def test_it_begins_after_the_warm_up_and_takes_its_share() -> None:
    text, model, rewrite = batch(1, 2), student(), OnPolicy(0.25)
    torch.manual_seed(3)
    assert all(rewrite(text, model, done) is text for done in (0.0, on_policy.WARMUP - 1e-6) for _ in range(30))
    turns = sum(rewrite(text, model, done) is not text for done in (on_policy.WARMUP, 1.0) for _ in range(200))
    assert 0.25 * 400 - 35 <= turns <= 0.25 * 400 + 35  # four standard deviations


def test_tokens_come_from_the_whole_distribution_of_the_student_at_rest() -> None:
    """One token after each of many equal prompts, as often as the student without dropout finds it likely."""
    model, count = student(), 4000
    model.generation_config.top_k = 1  # whoever serves it may want that
    prompts = torch.tensor([[3, 1, 2]]).repeat(count, 1)
    torch.manual_seed(4)
    with torch.no_grad():
        expected = model.eval()(prompts[:1]).logits[0, -1].softmax(-1)
    found = on_policy.write(model.train(), prompts, 4)[:, 3].bincount(minlength=5) / count
    spread = (expected * (1 - expected) / count).sqrt()
    assert bool(((found - expected).abs() <= 4 * spread).all())


def test_the_cache_of_keys_changes_nothing() -> None:
    """Greedily, that is with odds of 0 and 1, what is written is what a forward without a cache finds."""
    model = student()
    model.lm_head.weight.data *= 1e4
    prompts = batch().ids[:, :3]
    found = on_policy.write(model, prompts, 8)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(found, use_cache=False).logits.argmax(-1)[:, 2:-1], found[:, 3:])


def test_the_same_generator_writes_the_same_text() -> None:
    """What a resumed run needs."""
    texts = []
    for _ in range(2):
        torch.manual_seed(5)
        texts.append(OnPolicy(1.0)(batch(), student(), 1.0).ids)
    assert torch.equal(*texts)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="--on-policy"):
        OnPolicy(share)
