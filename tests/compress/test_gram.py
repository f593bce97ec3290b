import pytest
import torch
from torch import Tensor, nn

from llmpare.compress.gram import Gram, shared_inputs, watched

CPU = torch.device("cpu")


def textbook(x: Tensor) -> Tensor:
    """XᵀX / tokens in float64, token by token."""
    total = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
    for token in x.reshape(-1, x.shape[-1]).double():
        total += torch.outer(token, token)
    return total / x[..., 0].numel()


def gram(*batches: Tensor) -> Tensor:
    sums = Gram(batches[0].shape[-1], CPU, with_drift=False)
    for batch in batches:
        sums.add(batch)
    return sums.statistics().gram


@pytest.mark.parametrize("columns", [1, 7, 255, 256, 257, 512, 513])
def test_float32_is_the_textbook_product_at_every_width_of_strip(columns: int) -> None:
    torch.manual_seed(columns)
    x = torch.randn(3, 10, columns) + 0.5
    found = gram(x)
    torch.testing.assert_close(found.double(), textbook(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.t())


@pytest.mark.parametrize("columns", [2048, 2049])
def test_wide_inputs_are_computed_in_eight_strips(columns: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(11, columns)
    found = gram(x)
    torch.testing.assert_close(found.double(), x.t().double() @ x.double() / 11, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.t())


def test_batches_add_up_to_the_mean_over_all_tokens() -> None:
    torch.manual_seed(1)
    x = torch.randn(17, 300)
    torch.testing.assert_close(gram(x[:5], x[5:6], x[6:]), gram(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [33, 300])
def test_half_precision_is_multiplied_and_summed_without_further_rounding(columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    batches = [(torch.randn(2, 512, columns) + 1).to(dtype) for _ in range(3)]
    found = gram(*batches)
    assert found.dtype == torch.float32
    x = torch.cat([batch.flatten(0, 1) for batch in batches]).double()
    miss = (found.double() - x.t() @ x / len(x)).abs()
    assert (miss <= 2**-18 * (x.abs().t() @ x.abs() / len(x))).all()
    assert torch.equal(found, found.t())


def test_few_tokens_in_bfloat16_give_a_gram_without_negative_eigenvalues() -> None:
    """Rounded to bfloat16, H of 40 tokens and a large mean would have some of a thousandth of the largest."""
    torch.manual_seed(3)
    eigenvalues = torch.linalg.eigvalsh(gram((torch.randn(40, 300) + 5).bfloat16()).double())
    assert eigenvalues[0] > -1e-6 * eigenvalues[-1]


def test_float16_sums_may_pass_the_end_of_its_range() -> None:
    """4096 tokens of 10 sum to 409600, far above 65504."""
    x = torch.full((4096, 260), 10.0, dtype=torch.float16)
    assert torch.equal(gram(x), torch.full((260, 260), 100.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_drift_is_what_separates_the_two_inputs(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    original = torch.randn(4, 30, 270).to(dtype)
    inputs = (original.float() + 0.5 * torch.randn(4, 30, 270)).to(dtype)
    sums = Gram(270, CPU, with_drift=True)
    sums.add(inputs[:1], original[:1])
    sums.add(inputs[1:], original[1:])
    drift = sums.statistics().drift
    assert drift is not None
    x, y = inputs.flatten(0, 1).double(), original.flatten(0, 1).double()
    expected = (y - x).t() @ x / 120
    assert (drift.double() - expected).abs().max() <= 1e-6
    assert (drift - drift.t()).abs().max() > 0.1  # so that a transposed result could not pass


def test_no_drift_where_the_streams_have_not_parted() -> None:
    torch.manual_seed(5)
    x, y = torch.randn(8, 3), torch.randn(8, 3)
    sums = Gram(3, CPU, with_drift=True)
    sums.add(x)  # both streams are one tensor there: tokens count, drift does not
    sums.add(x, y)
    drift = sums.statistics().drift
    assert drift is not None
    torch.testing.assert_close(drift, (y - x).t() @ x / 16)
    without = Gram(3, CPU, with_drift=False)
    without.add(x, y)
    assert without.statistics().drift is None


def test_inputs_are_left_alone_and_may_have_any_layout() -> None:
    torch.manual_seed(6)
    x = torch.randn(2, 9, 40)
    before = x.clone()
    expected = gram(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(gram(x.transpose(0, 1)), expected)
    torch.testing.assert_close(gram(x.flatten(0, 1).t().contiguous().t()), expected)


def test_the_same_inputs_give_the_same_bits_and_statistics_are_asked_for_once() -> None:
    torch.manual_seed(7)
    x = torch.randn(64, 300)
    assert torch.equal(gram(x), gram(x))
    sums = Gram(300, CPU, with_drift=False)
    sums.add(x)
    assert sums.statistics().gram.data_ptr() == sums.gram.data_ptr()  # not a second matrix
    with pytest.raises(ValueError, match="asked for twice"):
        sums.statistics()


def test_a_column_that_is_always_zero_has_an_exactly_zero_row() -> None:
    torch.manual_seed(8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(32, 290).to(dtype)
        x[:, 280] = 0
        assert torch.equal(gram(x)[280], torch.zeros(290))


class Attention(nn.Module):
    """q, k and v of one tensor; o of another; a probe that reads an equal copy, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.copy, self.idle = (nn.Linear(4, 4, bias=False) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.k(x) + self.q(x) + self.v(x)
        return self.o(mixed) + self.copy(x.clone())


def linears(block: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def test_linears_that_read_the_same_tensor_share_a_group() -> None:
    block = Attention()
    assert shared_inputs(linears(block), lambda: block(torch.randn(5, 4))) == [["k", "q", "v"], ["o"], ["copy"]]


def test_memory_that_is_used_again_is_not_taken_for_the_same_tensor() -> None:
    """A freed input's address is likely to be given to the next one: inputs are kept until the forward ends."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            for step in self.steps:
                x = step(x * 1.0)
            return x

    block = Chain()
    with torch.no_grad():
        groups = shared_inputs(linears(block), lambda: block(torch.randn(64, 64)))
    assert groups == [[f"steps.{i}"] for i in range(8)]


def test_every_unique_input_is_shown_once_per_forward() -> None:
    torch.manual_seed(9)
    block = Attention()
    groups = shared_inputs(linears(block), lambda: block(torch.randn(5, 4)))
    for x in torch.randn(3, 5, 4):
        seen: dict[int, Tensor] = {}
        with torch.no_grad(), watched(linears(block), groups, seen.__setitem__):
            block(x)
        assert list(seen) == [0, 1, 2]
        assert seen[0] is x
        with torch.no_grad():
            torch.testing.assert_close(seen[1], block.k(x) + block.q(x) + block.v(x))
        assert torch.equal(seen[2], x)


def test_an_input_is_shown_before_anything_reads_it() -> None:
    """…so that statistics can be summed without keeping every input of the block alive."""
    block = Attention()
    groups = shared_inputs(linears(block), lambda: block(torch.randn(5, 4)))
    order: list[str] = []
    hooks = [
        module.register_forward_hook(lambda module, args, out, name=name: order.append(name))
        for name, module in linears(block).items()
    ]
    with watched(linears(block), groups, lambda group, _: order.append(f"saw {group}")):
        block(torch.randn(5, 4))
    for hook in hooks:
        hook.remove()
    assert order == ["saw 0", "k", "q", "v", "saw 1", "o", "saw 2", "copy"]


def test_no_groups_is_nothing_to_watch() -> None:
    block = Attention()
    with watched(linears(block), (), lambda *_: pytest.fail("nobody asked")):
        block(torch.randn(5, 4))


def test_no_hook_outlives_its_context() -> None:
    block = Attention()
    seen: list[int] = []
    groups = shared_inputs(linears(block), lambda: block(torch.randn(5, 4)))
    with pytest.raises(ZeroDivisionError):
        shared_inputs(linears(block), lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError), watched(linears(block), groups, lambda group, _: seen.append(group)):
        raise ZeroDivisionError
    block(torch.randn(2, 4))
    assert seen == []
    assert not any(module._forward_pre_hooks for module in block.modules())
