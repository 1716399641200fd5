"""Stochastic rounding by the kernels has the bits of the codecs on the same rows."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import vecfl
from vecfl.layout import Entry, Layout
from vecfl.transforms.codec import Senders, encode
from vecfl_kernels import Levels, Multiples, round_to_levels, round_to_multiples, words_of
from vecfl_kernels.rounding.reference import CHUNK

from .cases import CPU, TYPES, both, hard, normals, same, strided

SEED = 2**40 + 3


def streams(k: int) -> Tensor:
    """Each word of a row is another than in the row before."""
    row = torch.arange(k)
    return torch.stack((row + 2**31, row + (5 << 10), row + (6 << 28)), 1)


def rounded(rows: Tensor, bits: int, first: int, at: torch.device) -> tuple[Tensor, Tensor]:
    """By both operations."""
    here, keys = rows.to(at), streams(len(rows)).to(at)
    half = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    norm = (rows / half).norm(dim=1, keepdim=True) * half  # the same for both
    on_levels = round_to_levels(here, Levels.of(here, bits), SEED, keys, first)
    multiples = Multiples(norm.to(at), 2**bits - 1)
    return on_levels.cpu(), round_to_multiples(here, multiples, SEED, keys, first).cpu()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (2, 3), (2, 127), (2, 128), (1, 5001)], ids=str)
def test_bits_of_rows_anywhere_in_memory(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    for first, rows in enumerate(strided(normals(1, *shape).to(dtype)).values()):
        right, found = both(lambda at, r=rows, f=first: rounded(r, 8, f, at), device)
        same(right[0], found[0])
        same(right[1], found[1])


def test_many_rows(device: torch.device) -> None:
    right, found = both(lambda at: rounded(normals(1, 37, 5).float(), 4, 2, at), device)
    same(right[0], found[0])
    same(right[1], found[1])


@pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 15])
def test_numbers_that_are_hard(bits: int, dtype: torch.dtype, device: torch.device) -> None:
    rows = hard(dtype)[:4]
    rows[2] /= 4  # the norm of the row is a number
    right, found = both(lambda at: rounded(rows, bits, 0, at), device)
    same(right[0], found[0])
    same(right[1], found[1])
    assert right[0].isfinite().all() and right[1].isfinite().all()
    assert torch.equal(right[0][0], torch.zeros(5, dtype=dtype))


def test_by_hand(device: torch.device) -> None:
    """Between 0 and 4 one bit has the levels 0 and 4: 1 is up where its draw is below 1/4. As
    multiples of |x| / 1 = 5, -3 is down to -5 where its draw is below 3/5."""
    draws = (words_of(SEED, streams(1), 0, 8)[0] >> 8) / 2**24
    levels = torch.tensor([[0.0, 4.0, 1, 1, 1, 1, 1, 1]])
    low, high = levels.new_tensor([[0.0]]), levels.new_tensor([[4.0]])
    by_levels = [0.0, 4.0] + [4.0 * bool(d < 0.25) for d in draws[2:]]
    rows, norm = torch.full((1, 8), -3.0), torch.tensor([[5.0]])
    by_norm = [
        -5.0 * bool(d < torch.tensor(3.0) / 4 * (1 / (torch.tensor(5.0) / 4))) for d in draws
    ]

    def run(at: torch.device) -> tuple[list[float], list[float]]:
        ends, key = Levels(low.to(at), high.to(at), 1), streams(1).to(at)
        first = round_to_levels(levels.to(at), ends, SEED, key)
        second = round_to_multiples(rows.to(at), Multiples(norm.to(at), 1), SEED, key)
        return first[0].tolist(), second[0].tolist()

    assert {0.0, 4.0} == set(by_levels[2:]) and {-5.0, 0.0} == set(by_norm)
    for found in both(run, device):
        assert found == (by_levels, by_norm)


@pytest.mark.parametrize("block", [1, 16, 512])
def test_numbers_do_not_depend_on_the_block(
    block: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = normals(2, 2, 33).float()
    _, before = both(lambda at: rounded(rows, 4, 5, at), device)
    monkeypatch.setattr("vecfl_kernels.rounding.triton.BLOCK", block)
    _, after = both(lambda at: rounded(rows, 4, 5, at), device)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.parametrize("per", ["tensor", "message"])
@pytest.mark.parametrize("make", [vecfl.stochastic_quantizer, vecfl.qsgd])
def test_what_a_codec_says_arrives(make, per, device: torch.device) -> None:  # noqa: ANN001
    """Tensors begin at numbers 0, 1, 8 and 11 of a message; so do their words."""
    sizes, k = (1, 7, 3, 200), 4
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    entries = zip(sizes, starts, strict=True)
    layout = Layout(tuple(Entry(str(at), (n,), at, torch.float32) for n, at in entries))
    rows, who = normals(3, k, sum(sizes)).float(), torch.arange(k)
    codec = make(4, per=per).codec(0)

    def run(at: torch.device) -> tuple[Tensor, Tensor]:
        senders = Senders(SEED, 3, who.to(at), torch.zeros_like(who).to(at), layout)
        found, size = encode(codec, rows.to(at), senders)
        return found.cpu(), size.cpu()

    (right, size), (found, size2) = both(run, device)
    same(right, found)
    assert torch.equal(size, size2)
    senders = Senders(SEED, 3, who, torch.zeros_like(who), layout)
    plain, _ = encode(replace(codec, fused=None), rows, senders)
    same(plain, right)


def test_words_begin_anywhere() -> None:
    whole = words_of(SEED, streams(3), 0, 40)
    for first, n in ((0, 1), (1, 5), (3, 1), (7, 20), (8, 0)):
        assert torch.equal(words_of(SEED, streams(3), first, n), whole[:, first : first + n])


def test_the_reference_has_the_bits_of_the_codec_alone() -> None:
    rows = normals(4, 5, 50).float()
    levels, words = Levels.of(rows, 8), words_of(SEED, streams(5), 3, 50)
    right = levels.values(levels.rounded(rows, words))
    same(round_to_levels(rows, levels, SEED, streams(5), 3), right)
    assert rounded(rows, 8, 3, CPU)[0].equal(right)


@pytest.mark.parametrize("chunk", [8, 60])  # less than a row, and a row with some of the next
def test_the_reference_goes_on_behind_a_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = normals(5, 5, 41).float()
    right = rounded(rows, 4, 3, CPU)
    monkeypatch.setitem(CHUNK, "cpu", chunk)
    found = rounded(rows, 4, 3, CPU)
    same(right[0], found[0])
    same(right[1], found[1])


@pytest.mark.parametrize("dtype, bits", [(torch.float32, 24), (torch.float64, 32)], ids=str)
def test_a_number_is_up_where_its_draw_is_below_it(
    dtype: torch.dtype, bits: int, device: torch.device
) -> None:
    """The highest bits of the word are the draw: it is not below itself, but below the next."""
    draws = words_of(SEED, streams(1), 0, 64) >> (32 - bits)
    zero, one = torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    for above in (0, 1):
        x = (draws + above).to(dtype) / 2**bits

        def run(at: torch.device, x: Tensor = x) -> list[float]:
            ends, key = Levels(zero.to(at), one.to(at), 1), streams(1).to(at)
            first = round_to_levels(x.to(at), ends, SEED, key)
            second = round_to_multiples(x.to(at), Multiples(one.to(at), 1), SEED, key)
            return first[0].tolist() + second[0].tolist()

        for found in both(run, device):
            assert found == [above] * 128
