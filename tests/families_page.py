"""docs/families.md, written from the families that are tested: `python tests/families_page.py > docs/families.md`."""

from families import MATRIX, MIXTURES
from seeing import SEEING

PAGE = """# Model families

llmpare has no list of models: blocks, linears and what flows into them are found by looking at the checkpoint and at
the model that transformers builds from it. These are the families on which the tests show, with random models in one
file and in several, that

- running block by block gives the hidden states of the model's own forward, bit for bit;
- W4A16 by GPTQ and W8A16 by rounding compress every linear of every block;
- plain transformers loads the result, with logits equal to those of the model that was measured, bit for bit.

| `model_type` | what sets it apart | formats |
|---|---|---|
{families}

Embeddings, norms, heads, convolutions and extra prediction heads stay as they are, byte for byte.

The own code of some families (Falcon, GPT-BigCode) looks at weights while it is loaded. For these
compressed-tensors needs transformers 5.23: `config.json` then says `"dequantize": true`, and the report says so.

## Mixtures of experts

{mixtures}:
every expert's linears are compressed, by statistics of their own; routers and the gates of shared experts stay as they
are. What is written loads in plain transformers, with the logits that were measured.

## Models that also look at images

{seeing}: the decoder is compressed, calibrated and measured on text; vision tower, projector and the
files of processors reach the output byte for byte, and `AutoModelForImageTextToText` loads the whole, with the image
features of the original. `quantization_config` names every linear outside the decoder as dense. `--format gptq` and
pruning of shapes are refused.

## Models published in low precision

Models published in FP8, as DeepSeek's blocks or by compressed-tensors, or in MXFP4 are decoded tensor by tensor when
they are read, and compressed anew; so that the output has one precision, what stays dense is stored decoded, too.

## Refused, by name

| what | why |
|---|---|
{refused}
"""

REFUSED = {
    "models that hear: an `audio_config`": "not built yet",
    "models already quantized to integers: GPTQ, AWQ, W4A16": "a second rounding would hide what the first one lost",
    "encoder-decoders: T5, BART, Whisper": "their decoders also read what an encoder puts out",
    "Gemma 3n": "its blocks take arguments that depend on the tokens",
    "RecurrentGemma": "their blocks hold matrices that belong to no linear",
    "`--format gptq` for mixtures": "transformers fills their experts with random numbers",
    "`compressed-tensors` for experts in one tensor: Granite, gpt-oss": "no loader unpacks them: `--ignore experts`",
    "experts with zero points or under several schemes": "transformers loads them wrong, some without a word",
    "`--method tuned` and `--correction` for mixtures": "a compressed model sends tokens to other experts",
    "`compressed-tensors` for GPT-2": "it knows no Conv1D",
    "several schemes in `gptq`": "most of its loaders know one per model",
}


def page() -> str:
    """The page as it must be."""
    families = (
        f"| `{name}` | {family.odd or 'nothing'} | {'gptq, dense' if name == 'gpt2' else 'all'} |"
        for name, family in sorted(MATRIX.items())
    )
    refused = (f"| {what} | {why} |" for what, why in REFUSED.items())
    seeing = ", ".join(f"`{name}`" for name in SEEING)
    mixtures = ", ".join(f"`{name}`" for name in sorted(MIXTURES))
    return PAGE.format(mixtures=mixtures, seeing=seeing, families="\n".join(families), refused="\n".join(refused))


if __name__ == "__main__":
    print(page(), end="")
