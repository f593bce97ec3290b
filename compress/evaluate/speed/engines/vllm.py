"""vLLM, through its offline interface: paged cache, compiled, batches put together continuously.

It hands over tokens only when a request is complete, so a prompt is timed by asking for one token, and decoding by
the time that more tokens take on top. Its prefix cache is off: prompts come again in every repetition.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm import LLM, SamplingParams

from llmpare.compress.errors import InputError, UsageError
from llmpare.compress.evaluate.speed import prompts as prompting
from llmpare.compress.evaluate.speed import roofline
from llmpare.compress.evaluate.speed.engine import OWN, Case, Job, Memory, Run, Work
from llmpare.compress.formats import decoded

_SHARE = 0.9  # of the device's memory, which vLLM takes in advance: its own default
_OF_FREE = 0.95  # it refuses to start with less free than its share, and its processes hold some besides


def load(job: Job) -> "VllmEngine":
    """The model in vLLM's own process or processes."""
    return VllmEngine(job)


class VllmEngine:
    """An Engine: see there."""

    weights, attention = "as stored", OWN
    memory: Memory | None = None  # it fills what it is given with cache blocks

    def __init__(self, job: Job) -> None:
        if not job.device.startswith("cuda"):
            raise UsageError("vLLM needs CUDA here", "leave it out of --engines, or use --device cuda")
        config = json.loads((job.model / "config.json").read_bytes())
        text = config.get("text_config", config)
        self.vocabulary = prompting.ordinary(job.model, text, text["vocab_size"])
        self.longest = text.get("max_position_embeddings") or 2**31
        self.work = _work(job, text)
        fitting = [case for case in job.cases if case.prompt + case.new_tokens <= self.longest]
        free, total = torch.cuda.mem_get_info(job.device)
        room = _OF_FREE * free if job.max_memory is None else min(_OF_FREE * free, job.max_memory)
        self._llm = LLM(
            model=str(job.model),
            skip_tokenizer_init=True,
            dtype=job.dtype,
            trust_remote_code=job.trust,
            seed=prompting.SEED,
            max_model_len=max((case.prompt + case.new_tokens for case in fitting), default=self.longest),
            enable_prefix_caching=False,
            gpu_memory_utilization=min(_SHARE, room / total),
        )

    def refuses(self, case: Case) -> str:
        return ""

    def generate(self, case: Case, prompts: Sequence[Sequence[int]]) -> Run:
        whole, tokens = self._timed(prompts, case.new_tokens)
        if case.continuous:
            return Run(0.0, [], whole, tokens)
        first, _ = self._timed(prompts, 1)
        decode = max(whole - first, 1e-9)  # two measurements: noise can make the difference of short ones negative
        return Run(first, [decode / (case.new_tokens - 1)], decode, tokens)

    def release(self) -> None:
        return  # it keeps its memory as long as it lives

    def _timed(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds until all requests are complete, and their tokens."""
        greedy = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        start = time.perf_counter()
        outputs = self._llm.generate(requests, greedy, use_tqdm=False)
        return time.perf_counter() - start, [list(output.outputs[0].token_ids) for output in outputs]


def _work(job: Job, config: Mapping[str, Any]) -> Work:
    """By the headers, as vLLM keeps weights the way they are stored."""
    files = sum(path.stat().st_size for path in job.model.glob("*.safetensors"))
    try:
        with decoded.open_dense(job.model) as source:
            shapes = {name: info.shape for name, info in source.tensors.items()}
            total = source.weight_bytes
    except InputError:  # stored in a way that vLLM can read and we cannot
        return Work(files)
    table = config["vocab_size"] * config.get("hidden_size", 0)
    return roofline.work(
        config,
        total=total,
        matrices=sum(math.prod(shape) for shape in shapes.values() if len(shape) >= 2),
        embedding=(table, 2 * table),
        head=table if "lm_head.weight" in shapes else None,
        cache_bytes=2,  # its cache and its embeddings are of 16 bits
    )
