"""A teacher on disk: what is stored, what it teaches beside the live one, what is refused, and what a kill leaves."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmpare.compress.clock import Clock
from llmpare.compress.distill import cache, losses
from llmpare.compress.distill.cached import CachedTeacher
from llmpare.compress.distill.losses import Objective
from llmpare.compress.distill.targets import Batch
from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.evaluate.stream import Setup
from llmpare.compress.progress import Silent

WINDOWS, TOKENS = 5, 16
CPU = torch.device("cpu")
SETUP = Setup(torch.float32, CPU, 2, False, Clock(), Silent())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("cache") / "teacher")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, tiny.VOCABULARY, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def logits(teacher: Path, ids: Tensor) -> Tensor:
    """The teacher's, by transformers: [windows, tokens − 1, vocabulary]."""
    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(teacher)(ids).logits[:, :-1]
    return found


def build(teacher: Path, ids: Tensor, out: Path, k: int = 64) -> CachedTeacher:
    """A cache in three files, opened for a student with a vocabulary of its own."""
    cache.build(teacher, ids, out, SETUP, top_k=k, file_tokens=2 * TOKENS)
    return CachedTeacher.open(out, ids, vocabulary=tiny.VOCABULARY + 8, device=CPU)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, teacher: Path, ids: Tensor) -> Path:
    """A finished cache, not to be written to."""
    build(teacher, ids, folder := tmp_path_factory.mktemp("kept") / "kept")
    return folder


def opened(kept: Path, ids: Tensor) -> CachedTeacher:
    return CachedTeacher.open(kept, ids, vocabulary=tiny.VOCABULARY + 8, device=CPU)


@dataclass(frozen=True)
class Head:
    weight: Tensor

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.weight.requires_grad else ()

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.t()


OBJECTIVES = {
    "forward": losses.forward_kl,
    "reverse": losses.reverse_kl,
    "jsd": losses.jsd(0.3),
    "tv": losses.total_variation,
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, teacher: Path, ids: Tensor) -> CachedTeacher:
    """With no token left out."""
    return build(teacher, ids, tmp_path_factory.mktemp("kept") / "kept", tiny.VOCABULARY)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_with_all_tokens_kept_it_teaches_what_the_live_teacher_does(
    everything: CachedTeacher, ids: Tensor, logits: Tensor, name: str
) -> None:
    """Any divergence, in any order of windows, over the positions of the mask and the ids that both have."""
    cached = everything
    chosen = torch.tensor([4, 0, 3])
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(len(chosen), TOKENS - 1, generator=generator) < 0.7
    batch = Batch(ids[chosen], mask, chosen)
    hidden = torch.randn(int(mask.sum()), 32, generator=generator).requires_grad_()
    head = Head(torch.randn(tiny.VOCABULARY + 8, 32, generator=generator).mul_(0.3).requires_grad_())
    found = cached.loss(batch, hidden, head, Objective(OBJECTIVES[name], share=0.25))
    gradients = torch.autograd.grad(found, [hidden, head.weight])

    exact = [each.detach().double().requires_grad_() for each in (hidden, head.weight)]
    student = exact[0] @ exact[1].t()
    target = logits[chosen][mask].double()
    divergence = OBJECTIVES[name](student[:, : tiny.VOCABULARY], target, 1.0)
    expected = (0.75 * divergence + 0.25 * losses.cross_entropy(student, batch.targets)).sum()
    assert found.item() == pytest.approx(expected.item(), rel=2e-4)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        miss = (gradient.double() - wanted).norm() / wanted.norm()
        assert float(miss) < 2e-3  # total variation's jumps where the two are as likely: rounding decides there


def test_with_a_tail_its_gradient_is_within_twice_the_mass_of_it(kept: Path, ids: Tensor, logits: Tensor) -> None:
    """‖∇ live − ∇ cached‖₁ ≤ 2·Σ P over the logits, P the mass of a token's tail; and the loss is never more."""
    cached = opened(kept, ids)
    batch = Batch(ids, torch.ones(WINDOWS, TOKENS - 1, dtype=torch.bool), torch.arange(WINDOWS))
    p = logits.double().log_softmax(-1)[batch.mask]
    mass = 1 - p.exp().topk(64).values.sum(-1)
    student = (p.float() + torch.randn(p.shape, generator=torch.Generator().manual_seed(2))).requires_grad_()
    identity = Head(torch.eye(tiny.VOCABULARY))
    live = losses.forward_kl(student, p.float(), 1.0).sum()
    found = cached.loss(batch, student, identity, Objective())
    a, b = (torch.autograd.grad(loss, student)[0].double() for loss in (live, found))
    rounding = 2**-11 * float((p.exp() * p.abs()).sum())
    assert found.item() <= live.item() + rounding
    assert 0 < float((a - b).abs().sum()) <= 2 * float(mass.sum()) + 2 * rounding


def test_it_takes_no_more_room_than_stated(kept: Path) -> None:
    files = sorted(kept.glob("*.safetensors"))
    assert len(files) == 3
    data = sum(path.stat().st_size - int.from_bytes(path.read_bytes()[:8], "little") - 8 for path in files)
    assert data == WINDOWS * (TOKENS - 1) * 260


def test_a_build_that_is_cut_short_goes_on(
    tmp_path: Path, teacher: Path, ids: Tensor, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any file: what is done is not done again, and the bytes are those of an uninterrupted one."""
    passes: list[int] = []
    predictions, write_file = cache._predictions, cache.write_file

    def counted(*arguments: object) -> object:
        passes.append(1)
        return predictions(*arguments)  # type: ignore[arg-type]

    def failing(path: Path, data: bytes) -> None:
        write_file(path, data)
        if path.name == cache.file_name(1):
            raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_predictions", counted)
    with monkeypatch.context() as context:
        context.setattr(cache, "write_file", failing)
        with pytest.raises(KeyboardInterrupt):
            build(teacher, ids, tmp_path / "kept")
    with pytest.raises(InputError, match="no finished|unfinished|no cache") as refused:
        CachedTeacher.open(tmp_path / "kept", ids, vocabulary=tiny.VOCABULARY, device=CPU)
    assert "unfinished" in refused.value.hint
    assert len(passes) == 2
    build(teacher, ids, tmp_path / "kept")
    assert len(passes) == 4  # the second file was written, but not journalled
    assert tiny.contents(tmp_path / "kept") == tiny.contents(kept)
    build(teacher, ids, tmp_path / "kept")
    assert len(passes) == 4


def other_weights(tmp_path: Path) -> Path:
    return tiny.llama(tmp_path / "other", changes={"model.norm.weight": lambda gain: gain + 1})


def test_a_cache_of_something_else_is_refused_by_name(tmp_path: Path, teacher: Path, ids: Tensor, kept: Path) -> None:
    there = tiny.contents(kept)
    text = ids.clone()
    text[2, 3] += 1
    attempts: list[tuple[Callable[[], object], str]] = [
        (lambda: build(other_weights(tmp_path), ids, kept), "another teacher"),
        (lambda: build(teacher, text, kept), "another text"),
        (lambda: build(teacher, ids, kept, 32), "top_k 64, this run has 32"),
        (lambda: CachedTeacher.open(kept, text, vocabulary=5000, device=CPU), "another text"),
        (lambda: CachedTeacher.open(kept, ids[:3], vocabulary=5000, device=CPU), "this run has 3 of 16"),
        (lambda: CachedTeacher.open(kept, ids, vocabulary=100, device=CPU), "over 4096 tokens, the student has 100"),
        (
            lambda: CachedTeacher.open(kept, ids, vocabulary=5000, device=CPU, weights_sha256="f" * 64),
            "another teacher",
        ),
        (lambda: CachedTeacher.open(teacher, ids, vocabulary=5000, device=CPU), "no cache of a teacher"),
    ]
    for attempt, words in attempts:
        with pytest.raises(InputError, match=words):
            attempt()
    assert tiny.contents(kept) == there


def test_a_damaged_file_is_found_before_it_teaches(tmp_path: Path, ids: Tensor, kept: Path) -> None:
    shutil.copytree(kept, tmp_path / "kept")
    path = tmp_path / "kept" / cache.file_name(2)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    cached = opened(tmp_path / "kept", ids)
    head, hidden = Head(torch.zeros(tiny.VOCABULARY, 4)), torch.zeros(TOKENS - 1, 4)
    everywhere = torch.ones(1, TOKENS - 1, dtype=torch.bool)
    cached.loss(Batch(ids[:1], everywhere, torch.tensor([0])), hidden, head, Objective())
    with pytest.raises(InputError, match="damaged"):
        cached.loss(Batch(ids[4:], everywhere, torch.tensor([4])), hidden, head, Objective())


def test_what_it_cannot_score_is_refused(kept: Path, ids: Tensor) -> None:
    cached = opened(kept, ids)
    head, hidden = Head(torch.zeros(tiny.VOCABULARY, 4)), torch.zeros(TOKENS - 1, 4)
    everywhere = torch.ones(1, TOKENS - 1, dtype=torch.bool)
    with pytest.raises(InputError, match="made during training"):
        cached.loss(Batch(ids[:1], everywhere, None), hidden, head, Objective())
    with pytest.raises(UsageError, match="temperature 1, and 2"):
        cached.loss(Batch(ids[:1], everywhere, torch.tensor([0])), hidden, head, Objective(temperature=2))


def test_a_teacher_that_gives_no_numbers_is_refused_and_leaves_nothing(tmp_path: Path, ids: Tensor) -> None:
    broken = tiny.llama(tmp_path / "broken", changes={"model.layers.0.mlp.up_proj.weight": lambda w: w * 1e38})
    with pytest.raises(InputError, match="block 0 are NaN or infinite in float32"):
        build(broken, ids, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
