import math

import pytest
import tiny
import torch
from torch import Tensor

from llmpare.compress.evaluate import fidelity
from llmpare.compress.evaluate.baseline import Identity, Saved, Saver, TopK, score

WINDOWS, POSITIONS, VOCABULARY = 4, 7, 19


def logits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    dense = 3 * torch.randn(WINDOWS, POSITIONS, VOCABULARY)
    return dense, dense + 0.5 * torch.randn_like(dense), torch.randint(0, VOCABULARY, (WINDOWS, POSITIONS))


def kept(dense: Tensor, targets: Tensor, k: int) -> TopK:
    return TopK.of(torch.log_softmax(dense, -1), targets, k)


def bucketed(p: list[float], q: list[float], k: int) -> float:
    """The divergence over the k likeliest of p, and the rest as one, in float64 and one number at a time."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    near = sum(p[i] * (math.log(p[i]) - math.log(q[i])) for i in order[:k])
    a, b = (sum(each[i] for i in order[k:]) for each in (p, q))
    return near + (a * (math.log(a) - math.log(b)) if a else 0.0)


@pytest.mark.parametrize("k", [5, 10, VOCABULARY, 100])
@pytest.mark.parametrize("seed", range(2))
def test_scores_are_those_of_the_textbook(seed: int, k: int) -> None:
    dense, compressed, targets = logits(seed)
    p, q = (torch.softmax(each.double(), -1).tolist() for each in (dense, compressed))
    expected = [[bucketed(a, b, k) for a, b in zip(*rows, strict=True)] for rows in zip(p, q, strict=True)]
    found = score(kept(dense, targets, k), compressed.clone(), targets)
    torch.testing.assert_close(found.kl, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    whole = fidelity.score(dense, compressed, targets)
    for name in ("dense_nll", "compressed_nll", "agree", "top5", "dense_next", "compressed_next"):
        torch.testing.assert_close(vars(found)[name], vars(whole)[name])


@pytest.mark.parametrize("k", [5, 10, 18])
def test_fewer_tokens_never_give_more_divergence(k: int) -> None:
    dense, compressed, targets = logits(3)
    coarse = score(kept(dense, targets, k), compressed.clone(), targets).kl
    finer = score(kept(dense, targets, k + 1), compressed.clone(), targets).kl
    assert bool((coarse <= finer + 1e-6).all())


def test_tokens_that_are_ruled_out_add_nothing() -> None:
    dense, compressed, targets = logits(4)
    dense[..., 3:] = compressed[..., 3:] = -math.inf
    targets = targets.clamp(max=2)
    found = score(kept(dense, targets, 5), compressed.clone(), targets).kl
    torch.testing.assert_close(found, fidelity.score(dense, compressed, targets).kl)


IDENTITY = Identity("model", "Llama", "dense", 1, 2, "a" * 64, VOCABULARY, "b" * 64, "F32")


def test_what_is_saved_is_read_back(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several files, in any cut of windows and positions."""
    monkeypatch.setattr("llmpare.compress.evaluate.baseline.FILE_BYTES", 1000)
    dense, _, targets = logits(5)
    whole = kept(dense, targets, 6)
    saver = Saver(tmp_path / "kept", 6)
    for window in range(WINDOWS):
        saver.add(whole.part(slice(window, window + 1), 0, POSITIONS, torch.device("cpu")))
    saver.finish(IDENTITY)
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) > 1
    saved = Saved(tmp_path / "kept")
    assert (saved.identity, saved.top_k, saved.windows) == (IDENTITY, 6, WINDOWS)
    for windows, start, end in ((range(0, 4), 0, 7), (range(1, 3), 2, 5), (range(3, 4), 6, 7)):
        part = saved.part(windows, start, end, torch.device("cpu"))
        for name, tensor in vars(part).items():
            assert torch.equal(tensor, vars(whole)[name][windows.start : windows.stop, start:end]), name


def test_an_unfinished_baseline_is_none(tmp_path) -> None:
    """A run that dies while it replaces an older one leaves that as it was."""
    dense, _, targets = logits(6)
    with Saver(tmp_path / "kept", 6) as first:
        first.add(kept(dense, targets, 6))
        first.finish(IDENTITY)
    before = tiny.contents(tmp_path / "kept")
    with Saver(tmp_path / "kept", 5) as second:
        second.add(kept(dense, targets, 5))
        second._write()
        assert tiny.contents(tmp_path / "kept").items() > before.items()
    assert tiny.contents(tmp_path / "kept") == before
