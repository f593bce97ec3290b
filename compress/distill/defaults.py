"""What a training is like when nobody says otherwise: every number with its reason, for small runs and large ones."""

import math
from dataclasses import dataclass

TOKENS = 1_000_000  # of a run: minutes on two cores for a model of a few million parameters, a smoke test for others
SEQLEN = 512  # tokens of a window: most of what there is to learn from a teacher shows within a few hundred
WARMUP = 0.05  # share of the steps: Adam's second moments are known after some tens of steps
BETAS = (0.9, 0.95)  # of Adam: the second forgets within a short run, as common for language models
WEIGHT_DECAY = 0.0  # the student begins with weights that are worth something
CLIP = 1.0  # norm of the gradient: what a single odd window can do
SAVE_SECONDS = 600.0  # between checkpoints: at most so much work is lost
LOGGED = 100  # points of the curve
HEALING = 0.3  # of the learning rate of a new model, for one that has been trained
ROUNDED = 0.1  # the same for one that is rounded while it learns: larger steps move more codes than they mend
LORA_RANK = 16  # of the adapters, when only they are trained
_SMALLEST_RATE, _LARGEST_RATE = 2e-5, 1e-3
_MICRO_TOKENS = {"cpu": 4096, "cuda": 16384}  # that pass through the student at once, if there are so many in a step


@dataclass(frozen=True)
class Pace:
    """How a run is cut into steps. windows: of a step, on all devices together. micro: of them at a time on one."""

    steps: int
    windows: int
    micro: int


def rate(parameters: int, *, healing: bool, rounded: bool = False) -> float:
    """The highest learning rate: larger models want smaller ones (Kaplan et al. 2020, equation D.1, within bounds), and
    a student that knows something already a fraction of what a new one wants, or it forgets first. rounded: trained for
    low-bit codes, from those of quantization."""
    fresh = min(_LARGEST_RATE, max(_SMALLEST_RATE, 0.003239 - 0.0001395 * math.log(max(parameters, 2))))
    if rounded:
        return fresh * ROUNDED
    return fresh * HEALING if healing else fresh


def batch_tokens(tokens: int) -> int:
    """Tokens of a step. It grows with the root of the run, so that its steps become both more and less noisy:
    250 steps of 4,000 for 1 M tokens, 2,500 of 40,000 for 100 M, 25,000 of 400,000 for 10 G."""
    return max(1, round(4 * math.sqrt(tokens)))


def warmup(steps: int) -> int:
    """Steps in which the learning rate rises."""
    return min(round(WARMUP * steps), 1000)


def pace(tokens: int, seqlen: int, batch: int | None, processes: int, device: str) -> Pace:
    """batch: tokens of a step, if they were asked for. Every process gets as many windows of a step as any other."""
    wanted = batch_tokens(tokens) if batch is None else batch
    each = max(1, round(wanted / (seqlen * processes)))
    limit = max(1, _MICRO_TOKENS.get(device, _MICRO_TOKENS["cpu"]) // seqlen)
    micro = next(count for count in range(min(each, limit), 0, -1) if each % count == 0)
    windows = each * processes
    return Pace(max(1, round(tokens / (windows * seqlen))), windows, micro)
