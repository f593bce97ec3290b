"""ONNX Runtime, through onnxruntime-genai, which brings the cache and the loop; for folders its builder wrote."""

import json
from collections.abc import Sequence

import numpy as np
import onnxruntime_genai as genai

from llmpare.compress.evaluate.speed import prompts as prompting
from llmpare.compress.evaluate.speed.engine import OWN, Case, Job, Memory, Run, Work
from llmpare.compress.evaluate.speed.timing import HostMarks


def load(job: Job) -> "OnnxEngine":
    """The exported model on the CPU or on CUDA."""
    return OnnxEngine(job)


class OnnxEngine:
    """An Engine: see there."""

    weights, attention = "as stored", OWN

    def __init__(self, job: Job) -> None:
        settings = json.loads((job.model / "genai_config.json").read_bytes())["model"]
        self.vocabulary = prompting.ordinary(job.model, settings, settings["vocab_size"])
        self.longest = settings["context_length"]
        self.memory: Memory | None = "resident" if job.device == "cpu" else None  # torch does not see its device memory
        files = [path for path in job.model.iterdir() if path.suffix in (".onnx", ".data")]
        self.work = Work(sum(path.stat().st_size for path in files))
        config = genai.Config(str(job.model))
        config.clear_providers()
        if job.device != "cpu":
            config.append_provider("cuda")
        self._model = genai.Model(config)

    def refuses(self, case: Case) -> str:
        return ""

    def generate(self, case: Case, prompts: Sequence[Sequence[int]]) -> Run:
        length = case.prompt + case.new_tokens
        params = genai.GeneratorParams(self._model)
        # min_length keeps the end-of-sequence token from being chosen.
        params.set_search_options(batch_size=case.batch, max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(self._model, params)
        clock = HostMarks()  # each call returns when its tokens are on the host
        clock.mark()
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        for _ in range(case.new_tokens):
            generator.generate_next_token()
            clock.mark()
        first, *steps = clock.intervals()
        sequences = [generator.get_sequence(index) for index in range(case.batch)]
        return Run(first, steps, sum(steps), [[int(t) for t in each[case.prompt :]] for each in sequences])

    def release(self) -> None:
        return
