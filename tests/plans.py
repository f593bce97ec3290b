"""Plans to quantize a model, and what is said where there is none."""

from pathlib import Path
from typing import Any

import pytest
from families import request

from llmpare.compress.errors import LlmpareError
from llmpare.compress.plan import Plan, plan_quantize

GIB = 2**30


def plan(model: Path, out: Path = Path("out"), **changes: Any) -> Plan:
    return plan_quantize(request(model, out, **changes))


def refusal(error: type[LlmpareError], model: Path, out: Path = Path("out"), **changes: Any) -> str:
    with pytest.raises(error) as caught:
        plan(model, out, **changes)
    return f"{caught.value} | {caught.value.hint}"
