"""Complete, plausible values that several tests start from."""

from typing import Any


def report() -> dict[str, Any]:
    """A report of a run that passed, with one of everything it can hold."""
    text = {
        "dataset": "bundled",
        "sha256": "a" * 64,
        "windows": 8,
        "seqlen": 512,
        "first_line": "It was a dark night.",
    }
    spec = {"dataset": "bundled", "nsamples": None, "seqlen": None, "chat_template": False}
    return {
        "schema_version": 1,
        "command": "quantize",
        "passed": True,
        "request": {
            "model": "examples/tiny-llama",
            "out": "out/w4",
            "scheme": {"bits": 4, "group_size": 128, "symmetric": True},
            "method": "gptq",
            "options": {"damping": 0.01},
            "format": "compressed-tensors",
            "rules": [{"pattern": "lm_head", "scheme": None}],
            "calibration": spec,
            "evaluation": spec,
            "device": "cpu",
            "dtype": "auto",
            "seed": 0,
            "trust_remote_code": False,
            "allow_nonfinite": False,
        },
        "source": {
            "model": "examples/tiny-llama",
            "architecture": "LlamaForCausalLM",
            "scheme": "dense",
            "config_sha256": "b" * 64,
            "weights_sha256": "c" * 64,
            "bytes": 11_541_504,
            "parameters": 5_770_496,
        },
        "calibration": text | {"part": "calibration", "rows": 12},
        "evaluation": text | {"part": "evaluation", "rows": 5},
        "overlap": 0.0,
        "size": {
            "source_bytes": 11_541_504,
            "output_bytes": 4_537_000,
            "ratio": 0.393,
            "linear_bits_per_weight": 4.126,
            "parameters_total": 5_770_496,
            "parameters_compressed": 4_718_592,
            "share_compressed": 0.8177,
        },
        "fidelity": {
            "tokens": 4088,
            "windows": 8,
            "dtype": "bfloat16",
            "perplexity": {
                "dense": 58.29,
                "compressed": 58.41,
                "increase": 0.00206,
                "increase_stderr": 0.0004,
                "dense_stderr": 0.41,
                "compressed_stderr": 0.42,
            },
            "kl": {
                "mean": 0.00286,
                "stderr": 0.00004,
                "median": 0.0014,
                "p90": 0.0071,
                "p99": 0.021,
                "max": 0.34,
                "histogram": {"edges": [0.0, 0.001, 0.1, 100.0], "counts": [1500, 2580, 8]},
            },
            "agreement": {"top1": 0.9591, "top5": 0.957, "stderr": 0.0009},
            "by_position": [{"start": 0, "end": 511, "kl": 0.00286, "top1": 0.9591}],
            "bits_per_byte": {"dense": 1.89, "compressed": None},
        },
        "blocks": [
            {
                "index": 0,
                "relative_error": 0.0021,
                "seconds": 0.7,
                "resumed": False,
                "linears": [
                    {
                        "name": "model.layers.0.mlp.down_proj",
                        "rows": 256,
                        "columns": 768,
                        "scheme": "W4A16 g128",
                        "method": "gptq",
                        "relative_error": 0.0043,
                    }
                ],
            }
        ],
        "kept_dense": [{"name": "lm_head", "why": "tied to the embedding"}],
        "fallbacks": [
            {
                "name": "model.layers.0.mlp.down_proj",
                "cause": "not positive definite",
                "action": "damping raised to 0.1",
            }
        ],
        "warnings": ["3.0 % of the evaluation text is in the calibration text"],
        "gates": [{"name": "max-kl", "limit": 0.05, "value": 0.00286, "passed": True}],
        "cost": {
            "seconds": {"loading": 0.4, "compressing": 6.2},
            "total_seconds": 7.9,
            "peak_rss_bytes": 640_000_000,
            "peak_device_bytes": None,
            "weights_read_bytes": 11_600_000,
            "weight_files_bytes": 4_544_000,
            "predicted_seconds": 7.2,
            "predicted_memory_bytes": 700_000_000,
            "predicted_weight_files_bytes": 4_544_000,
        },
        "environment": {
            "llmpare": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "python": "3.11.7",
            "device": "cpu",
            "threads": 2,
        },
    }
