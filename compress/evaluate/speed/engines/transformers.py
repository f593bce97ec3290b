"""The transformers library, eager or with torch.compile, under a greedy loop of our own.

Not `generate`: a loop of ten lines shows what is timed, and leaves out what servers do not do.
"""

import inspect
import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousMixin

from llmpare.compress import memory
from llmpare.compress.checkpoint.read import quantization_of
from llmpare.compress.errors import InputError, MemoryLimitError
from llmpare.compress.evaluate.speed import prompts as prompting
from llmpare.compress.evaluate.speed import roofline
from llmpare.compress.evaluate.speed.engine import OWN, Case, Job, Memory, Run, Work
from llmpare.compress.evaluate.speed.timing import HostMarks, marks
from llmpare.compress.formats import decoded
from llmpare.compress.model import whole
from llmpare.compress.model.layout import sees

STORED = "as stored"
DENSE = "decoded to dense"
# Stored formats and the packages with which transformers multiplies by the codes themselves.
_KERNELS = {"gptq": ("optimum", "gptqmodel"), "awq": ("gptqmodel",)}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# transformers turns compressed-tensors weights into dense ones before the first token.
_ALWAYS_DENSE = ("compressed-tensors",)
_PAGE = 256  # tokens that a block of the continuous cache holds by default


def load(job: Job) -> "TransformersEngine":
    """The whole model on the device; quantized weights are decoded where no package runs them as they are.

    Raises MemoryLimitError when the weights alone are more than the job allows.
    """
    config = json.loads((job.model / "config.json").read_bytes())
    method = (quantization_of(config) or {}).get("quant_method")
    device, dtype = torch.device(job.device), DTYPES[job.dtype]
    if _runs(method):
        family = AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM
        model = family.from_pretrained(
            job.model, dtype=dtype, device_map={"": device}, local_files_only=True, trust_remote_code=job.trust
        )
        kept = "quantization_config" in model.config.to_dict()  # some it decodes, on devices without kernels for them
        return TransformersEngine(job, model.eval(), STORED if kept else DENSE)
    with decoded.open_dense(job.model) as source:
        needed = source.parameters * dtype.itemsize
        if job.max_memory is not None and needed > job.max_memory:
            raise MemoryLimitError(
                f"its weights take {memory.show(needed)} of the {memory.show(job.max_memory)} allowed",
                "allow more with --max-memory: speed is measured with the whole model in memory",
            )
        return TransformersEngine(job, whole.load(source, dtype, device, trust=job.trust), DENSE if method else STORED)


def _runs(method: str | None) -> bool:
    """Whether transformers, with what is installed, may compute with weights stored that way as they are."""
    if method in (None, *_ALWAYS_DENSE):
        return False
    return all(find_spec(package) is not None for package in _KERNELS.get(str(method), ()))


class TransformersEngine:
    """An Engine: see there."""

    def __init__(self, job: Job, model: PreTrainedModel, weights: str) -> None:
        self.model, self.weights = model, weights
        self.device = torch.device(job.device)
        self.attention: str = model.config._attn_implementation
        self.memory: Memory = "device" if self.device.type == "cuda" else "resident"
        text = model.config.get_text_config(decoder=True)
        self.work = _work(model)
        self.vocabulary = prompting.ordinary(job.model, text.to_dict(), text.vocab_size)
        self.longest = text.to_dict().get("max_position_embeddings") or 2**31
        takes = inspect.signature(model.forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._cache: Cache | None = None
        self._compiled: Any = None

    def refuses(self, case: Case) -> str:
        if case.attention == self.attention:
            return "all other cases run with it: it is the model's own"
        if case.attention != "flash_attention_2":
            return ""
        if self.device.type != "cuda":
            return "flash attention needs CUDA"
        return "" if find_spec("flash_attn") else "not installed: pip install flash-attn"

    @torch.no_grad()
    def generate(self, case: Case, prompts: Sequence[Sequence[int]]) -> Run:
        self._attend(case)
        if case.continuous:
            return self._serve(case, prompts)
        ids = torch.tensor(prompts, device=self.device)  # [batch, prompt]
        cache = self._fresh(case)
        step = self._decoder(case)
        clock = marks(self.device)
        clock.mark()
        tokens = [self._next(ids, cache)]
        clock.mark()
        for _ in range(case.new_tokens - 1):
            if cache is None:
                ids = torch.cat([ids, tokens[-1]], 1)
                tokens.append(self._next(ids, None))
            else:
                tokens.append(step(tokens[-1], cache))
            clock.mark()
        first, *steps = clock.intervals()
        return Run(first, steps, sum(steps), torch.cat(tokens, 1).tolist())

    def _serve(self, case: Case, prompts: Sequence[Sequence[int]]) -> Run:
        """Requests that come and go, through transformers' own manager."""
        greedy = GenerationConfig(max_new_tokens=case.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        blocks = sum(-(-(len(prompt) + case.new_tokens) // _PAGE) + 1 for prompt in prompts)
        # Prompts come again in every repetition: blocks must not be shared, or they would be computed only once.
        settings = ContinuousBatchingConfig(num_blocks=blocks, allow_block_sharing=False)
        assert isinstance(self.model, ContinuousMixin)
        with self.model.continuous_batching_context_manager(greedy, continuous_batching_config=settings) as manager:
            clock = HostMarks()  # requests run on a thread of their own; the host sees them finished
            clock.mark()
            names = manager.add_requests([list(prompt) for prompt in prompts], max_new_tokens=case.new_tokens)
            done: dict[str, list[int]] = {}
            while len(done) < len(prompts):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise InputError("continuous batching ended before its requests did")
                if result is not None and result.error is not None:
                    raise InputError(f"continuous batching failed: {result.error}")
                if result is not None and result.is_finished():
                    done[result.request_id] = result.generated_tokens
            clock.mark()
        return Run(0.0, [], clock.intervals()[0], [done[name] for name in names])

    def release(self) -> None:
        self._cache = self._compiled = None
        torch.compiler.reset()

    def _next(self, ids: Tensor, cache: Cache | None) -> Tensor:
        """The most likely token after each sequence, [batch, 1]."""
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, **self._last)
        best: Tensor = out.logits[:, -1].argmax(-1, keepdim=True)
        return best

    def _decoder(self, case: Case) -> Any:
        if not case.compiled:
            return self._next
        if self._compiled is None:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self._compiled = torch.compile(self._next, dynamic=False, mode=mode)
        compiled = self._compiled
        return lambda token, cache: compiled(token, cache).clone()  # a replayed graph writes over its last result

    def _fresh(self, case: Case) -> Cache | None:
        """An empty cache. A static one is kept from run to run, as compiled code holds on to its addresses."""
        if case.cache == "off":
            return None
        if case.cache == "dynamic":
            return DynamicCache(config=self.model.config)
        if self._cache is None:
            self._cache = StaticCache(config=self.model.config, max_cache_len=case.prompt + case.new_tokens)
        self._cache.reset()
        return self._cache

    def _attend(self, case: Case) -> None:
        wanted = self.attention if case.attention == OWN else case.attention
        if self.model.config._attn_implementation != wanted:
            self.model.set_attn_implementation(wanted)
            if self.model.config._attn_implementation != wanted:
                raise InputError(f"the model runs with {self.attention} attention only")


def _work(model: PreTrainedModel) -> Work:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    embedding, output = _weight(model.get_input_embeddings()), _weight(model.get_output_embeddings())
    return roofline.work(
        model.config.get_text_config(decoder=True).to_dict(),
        total=sum(tensor.nbytes for tensor in tensors.values()),
        matrices=sum(parameter.numel() for parameter in model.parameters() if parameter.ndim >= 2),
        embedding=(embedding.numel(), embedding.nbytes),
        head=None if output is embedding else output.numel(),
        cache_bytes=embedding.element_size(),
    )


def _weight(module: nn.Module | None) -> Tensor:
    """A causal language model has an embedding and a head, and each of them one weight."""
    if module is None:
        raise InputError("the model has no output head", "only causal language models can be timed")
    return module.get_parameter("weight")
