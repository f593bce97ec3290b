"""Load GPTQ checkpoints with auto-gptq and save their logits.

    python load.py IDS.json MODEL_DIR...

IDS.json holds a list of equally long token-id lists. MODEL_DIR/logits.npy receives float32
logits of shape (batch, sequence, vocabulary). The computation runs in float32 on the CPU, so the
logits differ from those of the dequantized model only by float32 rounding.

Needs the packages of requirements.txt, whose transformers is older than the project's own:
run it with the interpreter of an environment of its own.
"""

import json
import sys

import numpy as np
import torch
from auto_gptq import AutoGPTQForCausalLM


def main(ids_file: str, *model_dirs: str) -> None:
    with open(ids_file) as file:
        ids = torch.tensor(json.load(file))
    for model_dir in model_dirs:
        model = AutoGPTQForCausalLM.from_quantized(
            model_dir,
            device="cpu",
            torch_dtype=torch.float32,
            use_triton=False,
            disable_exllama=True,
            disable_exllamav2=True,
            inject_fused_attention=False,
            inject_fused_mlp=False,
            local_files_only=True,
        )
        with torch.inference_mode():
            logits = model(input_ids=ids).logits
        np.save(f"{model_dir}/logits.npy", logits.float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
