"""Between the bytes of a shard and torch tensors, without a copy either way."""

import torch
from torch import Tensor

from llmpare.compress.checkpoint.header import TensorInfo

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def to_tensor(data: bytearray | memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A CPU tensor over the same memory; its bytes, if torch has no such numbers: they can be copied all the same."""
    if dtype not in DTYPES:
        return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    if not data:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(data, dtype=DTYPES[dtype]).view(shape)


def from_info(data: bytearray | memoryview, info: TensorInfo) -> Tensor:
    """The tensor that `info` describes."""
    return to_tensor(data, info.dtype, info.shape)


def to_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in the order safetensors stores them; a copy only when it is not contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
