"""Tiny random models that look at images beside reading text, as transformers writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from families import LLAMA, SLIDING, VOCABULARY, fill, save
from torch import Tensor, nn

IMAGE = 4000  # the token that stands for a part of an image
TEXT: dict[str, Any] = {**LLAMA, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0}}
VISION: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
QWEN: dict[str, Any] = {**VISION, "depth": 2, "num_heads": 2, "out_hidden_size": 128, "patch_size": 4}
TOWER: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 4001,
    "vision_start_token_id": 4002,
    "vision_end_token_id": 4003,
    "tie_word_embeddings": False,
}


def _qwen2_5_vl() -> nn.Module:
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, **MROPE},
        vision_config={**QWEN, "fullatt_block_indexes": [1], "window_size": 16},
        **QWEN_TOKENS,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> nn.Module:
    vision = {**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    config = transformers.Qwen3VLConfig(text_config={**TEXT, **MROPE}, vision_config=vision, **QWEN_TOKENS)
    return transformers.Qwen3VLForConditionalGeneration(config)


def _gemma3() -> nn.Module:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": SLIDING}
    config = transformers.Gemma3Config(
        text_config={**TEXT, **layers, "query_pre_attn_scalar": 32},
        vision_config={**VISION, **TOWER},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=4001,
        eoi_token_index=4002,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _llava() -> nn.Module:
    """Its tower has as many blocks as its decoder, and larger ones."""
    tower = {**TOWER, "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "projection_dim": 64}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**tower),
        image_token_index=IMAGE,
    )
    return transformers.LlavaForConditionalGeneration(config)


SEEING: dict[str, Callable[[], nn.Module]] = {
    "gemma3": _gemma3,
    "llava": _llava,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
}


def write(folder: Path, name: str) -> Path:
    """Writes a random model of that kind in bfloat16, with a tokenizer and the settings of an image processor."""
    save(fill(SEEING[name]()).to(torch.bfloat16), folder)
    (folder / "preprocessor_config.json").write_text('{"do_resize": true}\n')
    return folder


def load(folder: Path) -> nn.Module:
    """What any user of transformers would run."""
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True).eval()


def picture(name: str) -> dict[str, Tensor]:
    """The inputs of a forward on an image and some text."""
    generator = torch.Generator().manual_seed(2)
    parts = 16 if name == "llava" else 4
    ids = torch.randint(10, IMAGE, (1, 24), generator=generator)
    ids[0, 3 : 3 + parts] = IMAGE
    kinds = (ids == IMAGE).long()
    if name.startswith("qwen"):
        pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=generator).bfloat16()
        grid = torch.tensor([[1, 4, 4]])
        return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    pixels = torch.randn(1, 3, 16, 16, generator=generator).bfloat16()
    more = {"token_type_ids": kinds} if name == "gemma3" else {}
    return {"input_ids": ids, "pixel_values": pixels, **more}
