"""Codecs from their papers, one row of float64 at a time, with the bits that each one takes."""

import math

import numpy as np
from numpy.typing import NDArray

from . import philox

Row = NDArray[np.float64]
NUMBER = 64  # bits


def encode(codec: tuple, row: Row, sizes: list[int], parts: int, *key: int) -> tuple[Row, int]:
    """What arrives of a row of tensors of `sizes`, `parts` equal ones behind each other; its bytes.
    key: seed, round, client, occurrence.

    codec: ("top_k", k) | ("random_k", k, scaled) | ("sign", per) | ("qsgd", levels, per) |
    ("stochastic", bits, per) | ("flute", bits, threshold, anneal, per)
    """
    name, *how = codec
    seed, t, client, occurrence = key
    drawn = philox.words(seed, philox.CODEC, len(row), client=client, occurrence=occurrence, t=t)
    whole = [len(row) // parts] * parts
    cuts = np.cumsum(sizes if how[-1] == "tensor" else whole)[:-1]
    if name == "flute":
        bits, threshold, anneal, _ = how
        share = None if threshold is None else min(1.0, threshold * anneal ** (t + 1))
        how = [bits, share]
    pairs = zip(np.split(row, cuts), np.split(drawn, cuts), strict=True)
    found = [PARTS[name](x, words, *how) for x, words in pairs if len(x)]
    return np.concatenate([x for x, _ in found]), math.ceil(sum(bits for _, bits in found) / 8)


def count(k: float, n: int) -> int:
    return k if isinstance(k, int) else max(1, round(k * n))


def position_bits(n: int, k: int) -> int:
    """A list of positions or a mask, as is shorter; neither where all are there."""
    return 0 if k == n else min(n, k * math.ceil(math.log2(n)))


def top_k(x: Row, words: philox.Words, k: float) -> tuple[Row, int]:
    k = count(k, len(x))
    kept = sorted(range(len(x)), key=lambda i: (-abs(x[i]), i))[:k]
    return only(x, kept), position_bits(len(x), k) + NUMBER * k


def random_k(x: Row, words: philox.Words, k: float, scaled: bool) -> tuple[Row, int]:
    k = count(k, len(x))
    kept = sorted(range(len(x)), key=lambda i: (int(words[i]), i))[:k]
    return only(x, kept) * (len(x) / k if scaled else 1), NUMBER * k


def only(x: Row, kept: list[int]) -> Row:
    found = np.zeros_like(x)
    found[kept] = x[kept]
    return found


def sign(x: Row, words: philox.Words, per: str) -> tuple[Row, int]:
    return np.where(x >= 0, 1, -1) * np.abs(x).mean(), NUMBER + len(x)


def qsgd(x: Row, words: philox.Words, levels: int, per: str) -> tuple[Row, int]:
    bits = NUMBER + len(x) * math.ceil(math.log2(2 * levels + 1))
    norm = math.sqrt(sum(v * v for v in x))
    if not norm:
        return x * 0, bits
    place = np.abs(x) / norm * levels
    level = np.floor(place) + (words / 2**32 < place - np.floor(place))
    return norm * np.sign(x) * level / levels, bits


def stochastic(x: Row, words: philox.Words, bits: int, per: str) -> tuple[Row, int]:
    low, high, size = x.min(), x.max(), 2 * NUMBER + len(x) * bits
    if low == high:
        return x, size
    width = (high - low) / (2**bits - 1)
    place = (x - low) / width
    return low + width * (np.floor(place) + (words / 2**32 < place - np.floor(place))), size


def flute(x: Row, words: philox.Words, bits: int, share: float | None) -> tuple[Row, int]:
    levels = np.linspace(x.min(), x.max(), 2**bits)
    half = (x.max() - x.min()) / (2**bits - 1) / 2
    found = levels[np.searchsorted(levels, x - half)]
    if share is None:
        return found, 2 * NUMBER + len(x) * bits
    kept = np.abs(x) > np.quantile(np.abs(x), share)
    number = int(kept.sum())
    size = 32 + 2 * NUMBER + position_bits(len(x), number) + number * bits
    return np.where(kept, found, 0), size


PARTS = {
    "top_k": top_k,
    "random_k": random_k,
    "sign": sign,
    "qsgd": qsgd,
    "stochastic": stochastic,
    "flute": flute,
}
