"""Peak memory and time of the distillation loss: chunked, as llmpare does it, against the whole logits at once.

    python benchmarks/distill_memory.py [--tokens 2048] [--width 1024] [--vocabulary 32000] [--device cpu]

Only the loss: last hidden states of student and teacher, both heads, forward KL, gradients for the student's hidden
states and head. On the CPU the peak is that of the process, each case in one of its own.
"""

import argparse
import multiprocessing
import time
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn

from llmpare.compress import memory
from llmpare.compress.distill import losses
from llmpare.compress.distill.losses import Objective, chunked


class Matrix:
    """A head that is one matrix."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def __call__(self, hidden: Tensor) -> Tensor:
        return (hidden @ self.weight.t()).float()


def case(name: str, tokens: int, width: int, vocabulary: int, device: str, answer: Connection) -> None:
    """Sends (bytes beyond what the inputs take, seconds, the loss)."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    own = torch.randn(tokens, width, device=device)
    head, other = (nn.Parameter(0.02 * torch.randn(vocabulary, width, device=device)) for _ in range(2))
    head.grad, hidden.grad = torch.zeros_like(head), torch.zeros_like(hidden)
    targets = torch.zeros(tokens, dtype=torch.long, device=device)
    objective = Objective()
    on_device = device != "cpu"
    memory.keep_lean()
    if on_device:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = memory.resident()
        memory.forget_peak()
    start = time.perf_counter()
    if name == "chunked":

        def rows_of(logits: Tensor, rows: slice) -> Tensor:
            def views() -> tuple[Tensor, Tensor]:
                with torch.no_grad():
                    return logits, own[rows] @ other.t()

            return objective(logits, targets[rows], views)

        loss = chunked(hidden, Matrix(head), rows_of)
    else:
        with torch.no_grad():
            predicted = own @ other.t()
        loss = losses.forward_kl(hidden @ head.t(), predicted).sum()
    loss.backward()
    if on_device:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if on_device else memory.peak_resident()
    answer.send((peak - before, seconds, float(loss.detach())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    logits = 4 * given.tokens * given.vocabulary
    print(f"{given.tokens} tokens, {given.vocabulary} ids: all logits of one model are {memory.show(logits)}")
    context = multiprocessing.get_context("spawn")
    for name in ("chunked", "whole"):
        receiver, sender = context.Pipe(duplex=False)
        arguments = (name, given.tokens, given.width, given.vocabulary, given.device, sender)
        process = context.Process(target=case, args=arguments)
        process.start()
        peak, seconds, loss = receiver.recv()
        process.join()
        print(f"{name:8} {memory.show(peak):>9} beyond the inputs, {seconds:6.2f} s, loss {loss / given.tokens:.6f}")


if __name__ == "__main__":
    main()
