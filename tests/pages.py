"""Reports that the tests of report.html share."""

from typing import Any

import samples

HOSTILE = "\x1b[2J<script>alert(1)</script><img src=x onerror=y> \"'&amp; $\\alpha$ {{ 7*7 }}\n]]>\u202e"
"""Text that a terminal, HTML, a template, a formula or a writing direction would act on."""


def quantized(blocks: int = 6) -> dict[str, Any]:
    """A report of quantize with several blocks of two linears, the second of the last one left dense."""
    report = samples.report()
    model = report["blocks"][0]
    report["blocks"] = [
        {
            **model,
            "index": index,
            "relative_error": 0.0004 * (index + 1),
            "linears": [
                {
                    **model["linears"][0],
                    "name": f"model.layers.{index}.{kind}",
                    "relative_error": 0.0001 * (index + 1),
                    "scheme": "W8A16 g128" if index == 0 else "W4A16 g128",
                }
                for kind in ("mlp.down_proj", "self_attn.q_proj")[: 2 - (index == blocks - 1)]
            ],
        }
        for index in range(blocks)
    ]
    return report
