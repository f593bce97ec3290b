"""A second attempt on a device that ran out of memory."""

import weakref

import pytest
import torch

from llmpare.compress import devices
from llmpare.compress.errors import LlmpareError, MemoryLimitError
from llmpare.compress.progress import Silent


def failure(batch: int, error: Exception) -> LlmpareError:
    return MemoryLimitError(f"{batch}: {error}")


def test_nothing_of_the_first_attempt_is_left_when_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is being handled holds on to the tensors of every function it came through."""
    held: list[weakref.ref[torch.Tensor]] = []
    seen: list[object] = []

    def work(batch: int) -> int:
        if batch == 8:
            activations = torch.zeros(1000)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError
        return batch

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append(held[0]()))
    assert devices.fitting(work, 8, Silent(), failure) == 4
    assert seen == [None]


def test_there_is_one_more_attempt_and_no_third() -> None:
    tried: list[int] = []

    def work(batch: int) -> int:
        tried.append(batch)
        raise torch.OutOfMemoryError("full")

    with pytest.raises(MemoryLimitError, match="2: full"):
        devices.fitting(work, 5, Silent(), failure)
    assert tried == [5, 2]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnSpotrf`"),
        RuntimeError("CUDA error: out of memory"),
    ],
    ids=["cuBLAS", "cuSOLVER", "driver"],
)
def test_libraries_that_are_refused_memory_have_no_type_for_it(error: RuntimeError) -> None:
    def work(batch: int) -> int:
        if batch > 1:
            raise error
        return batch

    assert devices.fitting(work, 2, Silent(), failure) == 1


def test_a_single_window_is_not_halved_and_other_errors_pass() -> None:
    tried: list[int] = []

    def work(batch: int) -> int:
        tried.append(batch)
        raise torch.OutOfMemoryError("full") if batch == 1 else RuntimeError("sizes must match")

    with pytest.raises(MemoryLimitError, match="1: full"):
        devices.fitting(work, 1, Silent(), failure)
    with pytest.raises(RuntimeError, match="sizes must match"):
        devices.fitting(work, 4, Silent(), failure)
    assert tried == [1, 4]
