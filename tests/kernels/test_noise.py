"""Noise by the kernel: words by Random123 and by the oracle, normals beside the reference."""

import math

import pytest
import torch

from vecfl.random import Kind, normal, stream
from vecfl_kernels import add_noise_
from vecfl_kernels.noise.reference import CHUNK

from ..oracles import philox as oracle
from .cases import CPU, both

STREAM = (7, 5 << 10 | 3, 7 << 28)


def noise(
    m: int, at: torch.device, *, std: float = 1.0, seed: int = 9, key: tuple = STREAM
) -> torch.Tensor:
    total = torch.zeros(m, dtype=torch.float64, device=at)
    add_noise_(total, std, seed, key)
    return total.cpu()


@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 5, 127, 128, 5001])
@pytest.mark.parametrize(
    "seed, client", [(0, 0), (1, 1), (2**31 + 7, 2**31), (2**63 - 1, 2**32 - 1)]
)
def test_normals_are_those_of_the_contract(
    m: int, seed: int, client: int, device: torch.device
) -> None:
    key = client, 2**32 - 1, 7 << 28 | 5
    streams = torch.tensor(key)
    right = normal(seed, streams, m)
    for found in both(lambda at: noise(m, at, seed=seed, key=key), device):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


def test_words_of_the_oracle_by_hand(device: torch.device) -> None:
    """Element 6 is the cosine of words 6 and 7, element 7 the sine: block 1, its words 2 and 3."""
    words = oracle.words(2**40 + 3, int(Kind.NOISE), 8, client=7, t=5, occurrence=3).tolist()
    first, second = ((w + 0.5) / 2**32 for w in words[6:])
    radius = math.sqrt(-2 * math.log(first))
    right = [radius * math.cos(2 * math.pi * second), radius * math.sin(2 * math.pi * second)]
    assert stream(Kind.NOISE, client=7, round=5, occurrence=3).tolist() == list(STREAM)
    for found in both(lambda at: noise(8, at, seed=2**40 + 3), device):
        assert found[6:].tolist() == pytest.approx(right, abs=1e-12)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_words_are_the_known_answers_of_random123(
    counter: str, key: str, expected: str, device: torch.device
) -> None:
    from .words import words

    c0, *rest = (int(word, 16) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())
    seed = low | high << 32
    out = torch.zeros(4, dtype=torch.int64, device=device)
    signed = torch.tensor([seed - (seed >> 63 << 64)], device=device)  # seeds have 63 bits, keys 64
    words[(1,)](out, signed, torch.tensor([c0], device=device), *rest)
    assert " ".join(f"{w:08x}" for w in out.tolist()) == expected


@pytest.mark.parametrize("block", [1, 16, 512])
def test_numbers_do_not_depend_on_the_block(
    block: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, before = both(lambda at: noise(131, at), device)
    monkeypatch.setattr("vecfl_kernels.noise.triton.BLOCK", block)
    _, after = both(lambda at: noise(131, at), device)
    assert torch.equal(before, after)


def test_noise_is_added_with_its_standard_deviation(device: torch.device) -> None:
    def run(at: torch.device) -> torch.Tensor:
        total = torch.arange(9, dtype=torch.float64, device=at)
        add_noise_(total, 0.1, 9, STREAM)  # no number of float32
        return total.cpu()

    right = torch.arange(9).double() + 0.1 * noise(9, CPU)
    for found in both(run, device):
        torch.testing.assert_close(found, right, rtol=1e-15, atol=1e-14)


def test_the_reference_goes_on_behind_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = noise(203, CPU)
    monkeypatch.setitem(CHUNK, "cpu", 16)
    assert torch.equal(noise(203, CPU), whole)
