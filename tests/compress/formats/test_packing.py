import pytest
import torch
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32

from llmpare.compress.formats.packing import pack, unpack, words

BITS = (2, 3, 4, 8)


def codes(rows: int, count: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(2**bits, (rows, count), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 10, 31, 32, 33, 96, 100])
def test_a_row_is_one_number_with_the_first_code_in_its_lowest_bits(bits: int, count: int) -> None:
    given = codes(3, count, bits)
    packed = pack(given, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, words(count, bits)) == (3, -(-count * bits // 32))
    for row, stored in zip(given.tolist(), packed.tolist(), strict=True):
        number = sum(code << (i * bits) for i, code in enumerate(row))
        assert [word % 2**32 for word in stored] == [number >> (32 * i) & 0xFFFFFFFF for i in range(len(stored))]
    assert torch.equal(unpack(packed, bits, count), given)


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_codes_fill_every_bit(bits: int) -> None:
    full = torch.full((2, 64), 2**bits - 1, dtype=torch.uint8)
    assert (pack(full, bits) == -1).all()
    assert torch.equal(unpack(pack(full, bits), bits, 64), full)


@pytest.mark.parametrize("bits", BITS)
def test_the_same_words_as_compressed_tensors(bits: int) -> None:
    given = codes(5, 96, bits)
    signed = (given.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(given, bits), pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(pack(given, bits), bits, signed.shape), signed)
