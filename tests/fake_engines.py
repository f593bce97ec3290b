"""Stand-ins for engines that are not installed, as modules on disk, so that a worker process imports them too."""

import sys
from pathlib import Path

import pytest

# The next token is the last one plus one. A prompt of 32 tokens kills the process, one of 33 is refused.
LLAMA_CPP = """
import ctypes
import os
import signal

VOCABULARY = 10


class Llama:
    def __init__(self, path, n_ctx, n_batch, n_gpu_layers, verbose):
        if "broken" in path:
            raise ValueError("cannot read the file\\nwhatever else there is to say")
        self.model, self.ctx = "model", self
        self.room, self.past, self.last = n_ctx, 0, None

    def reset(self):
        self.past = 0

    def n_vocab(self):
        return VOCABULARY

    def eval(self, tokens):
        if len(tokens) == 32:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(tokens) == 33:
            raise RuntimeError("33 is too many")
        self.past += len(tokens)
        assert self.past <= self.room
        self.last = tokens[-1]


def llama_get_logits_ith(context, index):
    assert index == -1
    logits = (ctypes.c_float * VOCABULARY)()
    logits[(context.last + 1) % VOCABULARY] = 1.0
    context.logits = logits
    return ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))


def llama_supports_gpu_offload():
    return False


def llama_model_n_ctx_train(model):
    return 64


def llama_model_get_vocab(model):
    return "vocabulary"


def llama_vocab_n_tokens(vocabulary):
    return VOCABULARY


def llama_vocab_is_control(vocabulary, token):
    return token < 2


def llama_model_size(model):
    return 1234
"""

# A clock of its own: a request takes a second for its prompt and half a second for each token after the first.
VLLM = """
from dataclasses import dataclass

seconds = 0.0
made = []


class SamplingParams:
    def __init__(self, *, temperature, max_tokens, ignore_eos, detokenize):
        assert temperature == 0
        assert ignore_eos
        assert not detokenize
        self.max_tokens = max_tokens


@dataclass
class Completion:
    token_ids: tuple


@dataclass
class Output:
    outputs: list


class LLM:
    def __init__(self, **settings):
        made.append(settings)

    def generate(self, prompts, params, use_tqdm):
        global seconds
        assert not use_tqdm
        seconds += 1 + 0.5 * (params.max_tokens - 1)
        return [Output([Completion(tuple(prompt["prompt_token_ids"][:1]) * params.max_tokens)]) for prompt in prompts]
"""


def install(folder: Path, name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a module of that name importable, here and in processes that are started from here."""
    (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)
