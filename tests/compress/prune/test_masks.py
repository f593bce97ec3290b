import pytest
import torch

from llmpare.compress.prune.masks import Quota, largest, n_of_m


def scores(rows: int = 6, columns: int = 16) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows * columns))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 0.99, 1.0])
def test_exactly_so_many_of_the_largest_stay(share: float) -> None:
    score = scores()
    mask = largest(score, share)
    count = round(share * score.numel())
    assert int(mask.sum()) == count
    assert set(score[mask].tolist()) == set(sorted(score.flatten().tolist(), reverse=True)[:count])


def test_of_equal_scores_the_first_stay() -> None:
    score = torch.tensor([[2.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    assert largest(score, 0.5).tolist() == [[True, True, True], [False, False, False]]
    assert int(largest(torch.zeros(5, 7), 0.4).sum()) == 14


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 4), (1, 1), (16, 16), (5, 16)])
def test_n_of_m_in_every_group(n: int, m: int) -> None:
    score = scores()
    mask = n_of_m(score, n, m)
    groups, kept = score.reshape(-1, m), mask.reshape(-1, m)
    assert (kept.sum(1) == n).all()
    for values, stay in zip(groups, kept, strict=True):
        assert values[stay].sum() == pytest.approx(sum(sorted(values.tolist())[m - n :]))


def test_n_of_m_with_ties() -> None:
    assert (n_of_m(torch.zeros(3, 8), 2, 4).reshape(-1, 4).sum(1) == 2).all()


def test_every_linear_of_a_stack_has_its_own_share() -> None:
    score = scores(12, 10)
    mask = Quota((4, 6, 2), (0.5, 0.0, 1.0)).keep(score)
    assert [int(part.sum()) for part in mask.split([4, 6, 2])] == [20, 60, 0]
    assert torch.equal(mask[:4], largest(score[:4], 0.5))


def test_blocks_hold_whole_groups() -> None:
    assert Quota((1,), (0.5,)).block(32) == 32
    assert Quota((1,), (0.5,), (2, 4)).block(32) == 32
    assert Quota((1,), (0.5,), (3, 24)).block(32) == 48
