"""How much is worked on at once, by the kind of device; no torch."""

_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}  # enough to keep the device busy, little enough to stay small
_LOGIT_TOKENS = {"cpu": 512, "cuda": 4096}
_MIXING_AT_ONCE = {"cpu": 1 << 29, "cuda": 1 << 33}  # bytes, for what mixes tokens without a fused kernel
_GRAMS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}  # numbers in the statistics of experts that are solved together
_WEIGHTS_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 28}  # a solver holds several copies of them


def batch_tokens(device: str) -> int:
    """Tokens that pass through a block at once."""
    return _BATCH_TOKENS.get(device, _BATCH_TOKENS["cpu"])


def mixing_at_once(device: str) -> int:
    """Bytes that mixing tokens may take in all windows that pass through a block at once, unless one takes more."""
    return _MIXING_AT_ONCE.get(device, _MIXING_AT_ONCE["cpu"])


def experts_at_once(columns: int, device: str) -> int:
    """Experts whose linears, with so many inputs, are solved in one loop."""
    return max(1, _GRAMS_AT_ONCE.get(device, _GRAMS_AT_ONCE["cpu"]) // columns**2)


def weights_at_once(device: str) -> int:
    """Weights of a matrix that are solved together, in whole rows."""
    return _WEIGHTS_AT_ONCE.get(device, _WEIGHTS_AT_ONCE["cpu"])


def logit_tokens(device: str) -> int:
    """Positions whose logits exist at once."""
    return _LOGIT_TOKENS.get(device, _LOGIT_TOKENS["cpu"])
