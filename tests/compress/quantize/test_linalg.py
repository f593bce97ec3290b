import pytest
import torch
from torch import Tensor

from llmpare.compress.quantize import linalg


def gram(columns: int, tokens: int, seed: int = 0) -> Tensor:
    """H of correlated inputs of uneven size."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, columns) @ torch.randn(columns, columns) / columns**0.5
    x = x * torch.logspace(-1, 1, columns)[torch.randperm(columns)]
    h = x.t() @ x / tokens
    return (h + h.t()) / 2


@pytest.mark.parametrize("columns", [1, 2, 5, 64, 200])
def test_upper_factor_is_the_inverse_of_the_cholesky_factor_of_the_inverse(columns: int) -> None:
    h = linalg.damp(gram(columns, 2 * columns + 3, columns), 0.01)
    factor = linalg.upper_factor(h)
    assert factor is not None
    expected = torch.linalg.inv(torch.linalg.cholesky(torch.linalg.inv(h.double()), upper=True))
    torch.testing.assert_close(factor.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()


def test_upper_factor_in_float64_is_exact_to_float64() -> None:
    h = linalg.damp(gram(40, 100).double(), 0.01)
    factor = linalg.upper_factor(h)
    assert factor is not None
    torch.testing.assert_close(factor @ factor.t(), h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "broken",
    [
        torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
        torch.tensor([[-1.0]]),
        torch.zeros(3, 3),
        torch.full((2, 2), torch.nan),
        torch.tensor([[torch.inf, 0.0], [0.0, 1.0]]),
        torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]),
    ],
    ids=["indefinite", "negative", "zero", "nan", "infinite", "nan-beside"],
)
def test_what_is_not_positive_definite_has_no_factor(broken: Tensor) -> None:
    assert linalg.upper_factor(broken) is None


def test_damping_is_a_share_of_the_mean_of_living_columns() -> None:
    h = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    before = h.clone()
    assert linalg.damp(h, 0.1).tolist() == [[pytest.approx(4.3), 1.0, 0.0], [1.0, pytest.approx(2.3), 0.0], [0, 0, 1]]
    assert linalg.dead_columns(h).tolist() == [False, False, True]
    assert torch.equal(h, before)


def test_all_columns_dead_is_the_identity() -> None:
    assert torch.equal(linalg.damp(torch.zeros(4, 4), 0.01), torch.eye(4))


def test_a_good_matrix_is_factorised_at_the_damping_asked_for() -> None:
    h = gram(16, 64)
    factor, used = linalg.factorise(h, 0.01)
    assert used == 0.01
    assert factor is not None
    assert torch.equal(factor, linalg.upper_factor(linalg.damp(h, 0.01)))


@pytest.mark.parametrize("damping", [0.0, 1e-12, 1e-8])
def test_damping_is_raised_tenfold_until_a_singular_matrix_can_be_factorised(damping: float) -> None:
    x = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)) * 30
    h = x.t() @ x  # of rank 2
    factor, used = linalg.factorise(h, damping)
    assert factor is not None
    assert damping < used <= 0.01
    assert used in [pytest.approx(10.0**-n) for n in range(2, 13)]
    assert linalg.upper_factor(linalg.damp(h, damping)) is None


def test_there_is_no_factor_where_damping_does_not_help() -> None:
    indefinite = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    assert linalg.factorise(indefinite, 0.01) == (None, linalg.MAX_DAMPING)
    for broken in (torch.nan, torch.inf):
        assert linalg.factorise(torch.eye(3).masked_fill(torch.eye(3) > 0, broken), 0.01) == (None, linalg.MAX_DAMPING)


def test_no_damping_above_the_largest_is_tried() -> None:
    assert linalg.factorise(torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.3)[1] == linalg.MAX_DAMPING == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_full_correction_is_the_least_squares_fit_to_the_original_output(seed: int) -> None:
    """W′ = argmin ‖W·X − W′·X̃‖², solved without ever forming a Gram matrix."""
    torch.manual_seed(seed)
    tokens, columns = 400, 24
    original = torch.randn(tokens, columns).double()
    inputs = original + 0.3 * torch.randn(tokens, columns).double() + 0.2
    weight = torch.randn(7, columns).double()
    fit = torch.linalg.lstsq(inputs, original @ weight.t()).solution.t()
    factor = linalg.upper_factor(inputs.t() @ inputs / tokens)
    assert factor is not None
    drift = (original - inputs).t() @ inputs / tokens
    found = linalg.correct(weight, factor, torch.arange(columns), drift, 1.0)
    torch.testing.assert_close(found, fit, rtol=1e-8, atol=1e-8)
    assert (fit - weight).abs().max() > 0.1


def test_the_correction_does_not_depend_on_the_order_of_the_factor() -> None:
    torch.manual_seed(1)
    h = linalg.damp(gram(30, 100).double(), 0.01)
    weight, drift = torch.randn(5, 30).double(), torch.randn(30, 30).double()
    expected = weight + weight @ drift @ torch.linalg.inv(h)
    for order in (torch.arange(30), torch.randperm(30)):
        factor = linalg.upper_factor(h[order][:, order])
        assert factor is not None
        found = linalg.correct(weight, factor, order, drift, 1.0)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_correction_grows_with_its_strength() -> None:
    torch.manual_seed(2)
    weight, drift, order = torch.randn(4, 9), torch.randn(9, 9), torch.randperm(9)
    factor = torch.randn(9, 9).triu() + 3 * torch.eye(9)
    before = weight.clone()
    full, some = (linalg.correct(weight, factor, order, drift, strength) - weight for strength in (1.0, 0.25))
    torch.testing.assert_close(some, full / 4, rtol=1e-4, atol=1e-4)
    assert torch.equal(linalg.correct(weight, factor, order, drift, 0.0), weight)
    assert torch.equal(linalg.correct(weight, factor, order, torch.zeros(9, 9), 1.0), weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("part", [slice(0, 5), slice(7, 12), slice(11, 12)])
def test_absorbing_moves_columns_to_the_least_squares_solution(part: slice) -> None:
    """Columns before the part are off; the part and all after it may move: the best that they can do, in float64."""
    torch.manual_seed(3)
    h = linalg.damp(gram(12, 50).double(), 0.01)
    weight, errors = torch.randn(4, 12).double(), torch.randn(4, 12).double()
    lines = torch.where(torch.arange(12) < part.start, errors, weight).t().unsqueeze(0)
    factor = linalg.upper_factor(h)
    assert factor is not None
    found, root = linalg.absorb(lines, factor.unsqueeze(0), part)
    before, free = slice(0, part.start), slice(part.start, None)
    moved = torch.linalg.solve(h[free, free], h[free, before] @ errors[:, before].t()).t()
    best = weight[:, free] + moved
    torch.testing.assert_close(found[0].t(), best[:, : part.stop - part.start], rtol=1e-9, atol=1e-9)
    inverse_root = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    torch.testing.assert_close(root[0], inverse_root[part, part], rtol=1e-9, atol=1e-9)
