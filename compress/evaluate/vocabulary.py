"""Whether the predictions of two models are about the same tokens."""

from typing import Any

from llmpare.compress.checkpoint.files import shown
from llmpare.compress.errors import InputError

SAMPLE = "The  quick brown fox, 1234567890 — naïve «日本語» \n\n\tdef f(x): return x**2  # 🦊\n"


def require_same(baseline: Any, candidate: Any, first: str, second: str) -> None:
    """Raises InputError, with the first difference, unless two tokenizers give the same ids the same meaning.

    first, second: what the models are called.

    Tokens that only one of them has are no difference: vocabularies are padded, and grow at their end.
    """
    if _content(baseline) == _content(candidate):
        return
    ours, theirs = baseline.get_vocab(), candidate.get_vocab()
    by_id = {number: token for token, number in ours.items()}
    conflicts = [
        (number, token)
        for token, number in theirs.items()
        if ours.get(token, number) != number or by_id.get(number, token) != token
    ]
    if conflicts:
        number, token = min(conflicts)
        before = shown(by_id[number]) if number in by_id else "no token"
        how = f"id {number} is {before} in one and {shown(token)} in the other, {len(conflicts)} ids differ"
        raise _differ(first, second, how)
    a, b = (each(SAMPLE, add_special_tokens=False, verbose=False)["input_ids"] for each in (baseline, candidate))
    if a != b:
        raise _differ(first, second, "they cut the same text into different tokens")


def _content(tokenizer: Any) -> object:
    return tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer


def _differ(first: str, second: str, how: str) -> InputError:
    return InputError(
        f"{shown(first)} and {shown(second)} have different vocabularies: {how}",
        "models with one tokenizer compare token by token; across tokenizers, compare bits per byte of separate runs",
    )
