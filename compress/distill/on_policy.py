"""On-policy distillation: some of the text to learn from is written by the student itself, and judged by the teacher.

A student that learns from given text alone never sees what it writes after its own first mistake (Agarwal et al.,
2024, arXiv:2306.13649). After a warm-up, a share of the batches keep the beginning of every window and let the
student go on from there, sampled at temperature 1; what counts is what it wrote.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmpare.compress.distill.targets import Batch
from llmpare.compress.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARMUP = 0.25  # share of the training before the student writes anything: noise teaches nothing
PROMPT = 0.5  # share of a window that is given: half is enough to stay on a subject


class OnPolicy:
    """A Rewrite (see targets). share: of the batches after the warm-up, 0…1."""

    def __init__(self, share: float) -> None:
        if not 0 < share <= 1:
            raise UsageError(f"--on-policy {share:g} is not a share between 0 and 1", "0.25 is a quarter of the text")
        self.share = share

    def __call__(self, batch: Batch, student: "PreTrainedModel", done: float) -> Batch:
        """The batch as it is, or with windows that the student ends; see Rewrite.

        Whether it is this batch's turn, and what is sampled, comes from torch's generator: a run that is resumed
        goes on as it would have.
        """
        if done < WARMUP or float(torch.rand(())) >= self.share:
            return batch
        windows, tokens = batch.ids.shape
        given = max(1, round(tokens * PROMPT))
        if given == tokens:
            return batch
        ids = write(student, batch.ids[:, :given], tokens)
        mask = torch.zeros_like(batch.mask)
        mask[:, given - 1 :] = True
        return Batch(ids, mask, None)


@torch.no_grad()
def write(student: "PreTrainedModel", prompts: Tensor, tokens: int) -> Tensor:
    """Prompts [windows, given], and what the student samples after them: [windows, tokens].

    Sampled from all of its distribution, whatever its generation_config prefers, and past any end of text: windows
    of a packed text go on after one, too.
    """
    training = student.training
    student.eval()  # with dropout, and blocks left out, another model would speak
    try:
        ids, past = prompts, None
        for _ in range(tokens - prompts.shape[1]):
            out = student(input_ids=ids if past is None else ids[:, -1:], past_key_values=past, use_cache=True)
            past = out.past_key_values
            odds = out.logits[:, -1].float().softmax(-1)
            ids = torch.cat([ids, torch.multinomial(odds, 1)], 1)
    finally:
        student.train(training)
    return ids
