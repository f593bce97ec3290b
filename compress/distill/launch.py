"""The processes of a run: one, or as many as torchrun or accelerate has started."""

from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from llmpare.compress import devices
from llmpare.compress.errors import UsageError

_PATIENCE = timedelta(days=7)  # the first may carve, quantize and cache for hours; training keeps its own, short, one


class Processes:
    """This process among the others. device: its own. first: whether it is the one that writes and reports."""

    def __init__(self, device: str) -> None:
        """Joins the others, if there are any. Raises UsageError for a device that cannot be had or shared so."""
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        wanted = devices.find(device)
        if wanted.type == "cpu" and parse_flag_from_env("ACCELERATE_USE_FSDP"):
            # accelerate would say nothing and give every process the whole model.
            raise UsageError(
                "FSDP was asked for, and accelerate shards a model over GPUs only",
                "on the CPU use torchrun or accelerate launch without FSDP: every process then holds the whole model",
            )
        if wanted.index:
            raise UsageError(
                f"--device {device}: training takes the devices it is given",
                f"--device cuda, in an environment with CUDA_VISIBLE_DEVICES={wanted.index}",
            )
        state = PartialState(cpu=wanted.type == "cpu")
        self.device: torch.device = torch.device(state.device)
        self.count: int = state.num_processes
        self.first: bool = state.is_main_process
        self._waiting = distributed.new_group(backend="gloo", timeout=_PATIENCE) if self.count > 1 else None

    def told(self, value: Any) -> Any:
        """What the first process has here, in all of them; waits until it comes."""
        if self.count == 1:
            return value
        held = [value]
        distributed.broadcast_object_list(held, group=self._waiting)
        return held[0]
