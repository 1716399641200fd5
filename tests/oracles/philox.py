"""The draws of docs/design.md in plain numpy: Philox4x32-10 and what is read out of its words."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

COHORT, SUBSET, SHUFFLE, DROPOUT, AUGMENT = range(5)
CODEC, NOISE = 6, 7
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 (Salmon et al., SC 2011): counters [n, 4] and a two-word key give words [n, 4].

    All words are 32 bits wide and kept in uint64, so that a product of two of them is exact.
    """
    c0, c1, c2, c3 = counter.astype(np.uint64).T
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> HALF) ^ c1 ^ np.uint64(k0),
            product1 & LOW,
            (product0 >> HALF) ^ c3 ^ np.uint64(k1),
            product0 & LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3], axis=1)


def words(
    seed: int,
    kind: int,
    count: int,
    *,
    client: int = 0,
    occurrence: int = 0,
    t: int = 0,
    step: int = 0,
    layer: int = 0,
) -> Words:
    """The first `count` words of a stream in round t; e is word e mod 4 of block e div 4."""
    assert 0 <= seed < 2**63 and 0 <= t < 2**22 and 0 <= step < 2**20 and 0 <= layer < 2**8
    assert 0 <= occurrence < 2**10
    counter = np.empty((-(-count // 4), 4), np.uint64)
    counter[:, 0] = np.arange(len(counter))
    counter[:, 1] = client
    counter[:, 2] = t << 10 | occurrence
    counter[:, 3] = kind << 28 | layer << 20 | step
    return philox(counter, (seed % 2**32, seed >> 32)).reshape(-1)[:count]


def cohort(sample_seed: int, t: int, population: int, size: int) -> Ints:
    """The clients of round t: those with the smallest (word, client), in that order."""
    return np.argsort(words(sample_seed, COHORT, population, t=t), kind="stable")[:size]


def subset(seed: int, t: int, client: int, n: int, cap: int | None, occurrence: int = 0) -> Ints:
    """The examples that a client keeps: all n, or the `cap` with the smallest (word, example)."""
    if cap is None or n <= cap:
        return np.arange(n)
    key = words(seed, SUBSET, n, client=client, occurrence=occurrence, t=t)
    return np.argsort(key, kind="stable")[:cap]


def amount(
    seed: int, t: int, client: int, low: int, high: int, share: float, occurrence: int = 0
) -> int:
    """How many epochs a client does: `low` to `high` with probability `share`, else `high`."""
    drawn = words(seed, COHORT, 2, client=client, occurrence=occurrence, t=t, step=5)
    u, straggles = ((int(word) + 0.5) / 2**32 for word in drawn)
    return low + int(u * (high - low + 1)) if straggles < share else high


def delay(
    seed: int, t: int, client: int, probabilities: tuple[float, ...], occurrence: int = 0
) -> int:
    """How many rounds a message is late, 0, 1, ... with these probabilities."""
    (word,) = words(seed, COHORT, 1, client=client, occurrence=occurrence, t=t, step=6)
    bounds = np.cumsum(probabilities)[:-1] * 2.0**32
    return sum(int(word) >= int(bound) for bound in bounds)


def token_prefix(
    seed: int, t: int, client: int, tokens: list[int], cap: int, occurrence: int = 0
) -> int:
    """How many examples, in the order of their words, have at most `cap` tokens; one at least."""
    if sum(tokens) <= cap:
        return len(tokens)
    key = words(seed, SUBSET, len(tokens), client=client, occurrence=occurrence, t=t)
    kept, total = 0, 0
    for e in np.argsort(key, kind="stable"):
        total += tokens[e]
        if total > cap:
            break
        kept += 1
    return max(kept, 1)


def shuffle(seed: int, t: int, client: int, epoch: int, n: int, occurrence: int = 0) -> Ints:
    """The order [n] in which an epoch visits the kept examples."""
    key = words(seed, SHUFFLE, n, client=client, occurrence=occurrence, t=t, step=epoch)
    return np.argsort(key, kind="stable")


def normals(seed: int, count: int, **at: int) -> NDArray[np.float64]:
    """Noise [count] of a stream: Box-Muller, on pairs of words."""
    u, v = ((words(seed, NOISE, count + count % 2, **at) + 0.5) / 2.0**32).reshape(-1, 2).T
    length, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * v
    return np.stack([length * np.cos(angle), length * np.sin(angle)], 1).reshape(-1)[:count]


def draw_bits(p: float) -> int:
    """How many bits of a word the draw of one element takes."""
    for bits in (1, 2, 4, 8):
        if (p * 2**bits).is_integer():
            return bits
    return 16


def dropout_mask(
    seed: int,
    t: int,
    client: int,
    step: int,
    layer: int,
    p: float,
    shape: tuple[int, ...],
    occurrence: int = 0,
) -> NDArray[np.float64]:
    """What an activation of this shape is multiplied by: 0, or the scale of a kept element."""
    bits = draw_bits(float(p))
    element = np.arange(int(np.prod(shape)), dtype=np.uint64)
    word, lane = np.divmod(element, np.uint64(32 // bits))
    count = -(-len(element) * bits // 32)
    at = {"client": client, "occurrence": occurrence, "t": t, "step": step, "layer": layer}
    drawn = words(seed, DROPOUT, count, **at)
    draw = (drawn[word] >> lane * np.uint64(bits)) % np.uint64(2**bits)
    q = round((1 - p) * 2**bits)
    scale = 2**bits / q if q else 0.0
    return np.where(draw < q, scale, 0.0).reshape(shape)
