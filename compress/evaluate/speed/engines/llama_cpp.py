"""llama.cpp, through llama-cpp-python, one sequence at a time; for GGUF files.

Only its evaluation is used: the binding's own sampling loop would add copies of the logits to every token.
"""

from collections.abc import Sequence

import llama_cpp
import numpy as np

from llmpare.compress.errors import InputError
from llmpare.compress.evaluate.speed.engine import OWN, Case, Job, Memory, Run, Work
from llmpare.compress.evaluate.speed.timing import HostMarks

_ALL = -1  # layers on the GPU


def load(job: Job) -> "LlamaCppEngine":
    """The file's model, on the CPU or, where llama.cpp was built for it, with all layers on the GPU."""
    return LlamaCppEngine(job)


class LlamaCppEngine:
    """An Engine: see there."""

    weights, attention = "as stored", OWN

    def __init__(self, job: Job) -> None:
        path = job.model if job.model.suffix == ".gguf" else next(job.model.glob("*.gguf"))
        on_gpu = job.device != "cpu"
        if on_gpu and not llama_cpp.llama_supports_gpu_offload():
            raise InputError("this llama.cpp was built without CUDA", "build it with GGML_CUDA=on, or use --device cpu")
        self.memory: Memory | None = None if on_gpu else "resident"
        context = max(case.prompt + case.new_tokens for case in job.cases)
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=context, n_batch=context, n_gpu_layers=_ALL if on_gpu else 0, verbose=False
        )
        model = self._llama.model
        self.longest = llama_cpp.llama_model_n_ctx_train(model)
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        self.vocabulary = [
            token
            for token in range(llama_cpp.llama_vocab_n_tokens(vocabulary))
            if not llama_cpp.llama_vocab_is_control(vocabulary, token)
        ]
        self.work = Work(llama_cpp.llama_model_size(model))

    def refuses(self, case: Case) -> str:
        return ""

    def generate(self, case: Case, prompts: Sequence[Sequence[int]]) -> Run:
        (prompt,) = prompts
        llama = self._llama
        llama.reset()
        clock = HostMarks()
        clock.mark()
        tokens: list[int] = []
        pending = list(prompt)
        for _ in range(case.new_tokens):
            llama.eval(pending)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), shape=(llama.n_vocab(),))
            tokens.append(int(logits.argmax()))
            pending = tokens[-1:]
            clock.mark()
        first, *steps = clock.intervals()
        return Run(first, steps, sum(steps), [tokens])

    def release(self) -> None:
        return
