"""Which blocks leave, on models small enough to try everything."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from llmpare.compress.prune import depth

HIDDEN = 6


class Blocks:
    """x + strength · x·M for every block; counts how often each one ran."""

    def __init__(self, strengths: Sequence[float]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.mixes = [s * torch.randn(HIDDEN, HIDDEN, generator=generator) for s in strengths]
        self.loaded: int | None = None
        self.walks = 0

    def walk(self) -> Iterator[int]:
        self.walks += 1
        for index in range(len(self.mixes)):
            self.loaded = index
            yield index

    def run(self, index: int, hidden: Tensor) -> Tensor:
        assert index == self.loaded
        return hidden + hidden @ self.mixes[index]

    def through(self, hidden: Sequence[Tensor], without: Sequence[int] = ()) -> list[Tensor]:
        for index, mix in enumerate(self.mixes):
            if index not in without:
                hidden = [x + x @ mix for x in hidden]
        return list(hidden)


def distance(dense: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return float(sum((a - b).square().sum() for a, b in zip(dense, other, strict=True)))


@pytest.fixture
def entered() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, HIDDEN, generator=generator) for _ in range(2)]


def test_influence_is_one_minus_the_mean_cosine() -> None:
    a = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    b = torch.tensor([[[0.0, 2.0], [3.0, 3.0]]])
    assert depth.influence([a], [b]) == pytest.approx(0.5)
    assert depth.influence([a], [2 * a]) == pytest.approx(0.0)


def test_each_step_takes_the_block_that_is_missed_least(entered: list[Tensor]) -> None:
    blocks = Blocks([0.5, 0.1, 0.3, 0.05, 0.2, 0.4])
    found = depth.remove(blocks.walk, blocks.run, distance, entered, 3, range(1, 5))
    dense, gone = blocks.through(entered), []
    for _ in range(3):
        left = [index for index in range(1, 5) if index not in gone]
        losses = {index: distance(dense, blocks.through(entered, [*gone, index])) for index in left}
        gone.append(min(losses, key=lambda index: losses[index]))
        if len(gone) == 1:
            assert found.tried == pytest.approx(losses)
        assert found.steps[len(gone) - 1] == (gone[-1], pytest.approx(losses[gone[-1]]))
    assert found.gone == gone
    assert blocks.walks == 4  # one to look, one per block that leaves


def test_influence_of_all_blocks_is_told_and_shortlists(entered: list[Tensor]) -> None:
    blocks = Blocks([0.3] * 4 + [0.02 * i for i in range(1, 13)])
    found = depth.remove(blocks.walk, blocks.run, distance, entered, 1, range(16))
    hidden = entered
    for index in range(16):
        blocks.loaded = index
        out = [blocks.run(index, x) for x in hidden]
        assert found.influence[index] == pytest.approx(depth.influence(hidden, out))
        hidden = out
    lowest = sorted(range(16), key=lambda index: found.influence[index])[: 2 + depth.SPARE]
    assert set(found.tried) == set(lowest)


def test_a_block_that_does_nothing_leaves_first_and_costs_nothing(entered: list[Tensor]) -> None:
    blocks = Blocks([0.3, 0.2, 0.0, 0.2])
    found = depth.remove(blocks.walk, blocks.run, distance, entered, 1, [1, 2, 3])
    assert found.steps == [(2, 0.0)]
