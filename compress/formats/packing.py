"""Codes as a dense stream of bits in 32-bit words.

One rule for every width: value i of a row occupies bits i·b … i·b + b − 1 of the row's stream, least significant bit
first; 32 values fill exactly b words. A value may straddle two words (3 bits).
"""

import torch
from torch import Tensor


def words(count: int, bits: int) -> int:
    """Number of 32-bit words that hold `count` values."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes [rows, n] of 0 … 2^bits − 1 → int32 [rows, ceil(n · bits / 32)]."""
    rows, count = codes.shape
    padding = -count % 32
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    runs = codes.reshape(rows, -1, 32)
    packed = torch.zeros(rows, runs.shape[1], bits, dtype=torch.int32, device=codes.device)
    for i in range(32):
        value = runs[:, :, i].to(torch.int32)
        word, offset = divmod(i * bits, 32)
        packed[:, :, word] |= value << offset  # bits past the 32nd fall off and are written below
        if offset + bits > 32:
            packed[:, :, word + 1] |= value >> (32 - offset)
    return packed.reshape(rows, -1)[:, : words(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of pack: int32 [rows, words] → uint8 [rows, count]."""
    if 8 % bits == 0:  # no value straddles two bytes: several times faster
        octets = packed.contiguous().view(torch.uint8)
        codes = octets.new_empty(*octets.shape, 8 // bits)
        for i in range(8 // bits):
            codes[:, :, i] = (octets >> (i * bits)) & (2**bits - 1)
        return codes.flatten(1)[:, :count]
    rows = packed.shape[0]
    padding = words(-(-count // 32) * 32, bits) - packed.shape[1]
    runs = torch.nn.functional.pad(packed, (0, padding)).reshape(rows, -1, bits)
    codes = torch.empty(rows, runs.shape[1], 32, dtype=torch.uint8, device=packed.device)
    mask = 2**bits - 1
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        value = (runs[:, :, word] >> offset) & (mask if offset + bits <= 32 else 2 ** (32 - offset) - 1)
        if offset + bits > 32:
            value |= (runs[:, :, word + 1] << (32 - offset)) & mask
        codes[:, :, i] = value.to(torch.uint8)
    return codes.reshape(rows, -1)[:, :count]
