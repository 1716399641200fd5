"""Philox and what is read out of it: known answers, laws, and counters that no two streams share.

Statistical tests have a fixed seed. The false-alarm probability that they state is over seeds.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import permutations
from math import cos, log, pi, sin, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vecfl
from vecfl.errors import InputError
from vecfl.random import (
    AT_A_TIME,
    Kind,
    blocks,
    check_seed,
    normal,
    permutation,
    philox,
    ragged_permutation,
    ragged_words,
    stream,
    uniform,
    with_kind,
    with_layer,
    words,
)

from .oracles import philox as oracle

SEED = 2**40 + 3
BITS = {"client": 32, "round": 22, "occurrence": 10, "layer": 8, "step": 20}
Purpose = tuple[int, ...]  # kind, the fields of BITS in their order, block of elements


def clients(n: int) -> Tensor:
    """n streams, one a client."""
    return stream(Kind.SHUFFLE, client=torch.arange(n), round=1)


def planted(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Tensor], Tensor]) -> None:
    """Let Philox answer with a function of the counter, masked to 32 bits."""
    monkeypatch.setattr("vecfl.random.philox", lambda counter, seed: answer(counter) & 0xFFFFFFFF)


# Philox and words


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    low, high = (int(word, 16) for word in key.split())
    given_counter = torch.tensor([int(word, 16) for word in counter.split()])
    before = given_counter.clone()
    out = philox(given_counter, low | high << 32)
    assert " ".join(f"{word:08x}" for word in out.tolist()) == expected
    assert torch.equal(given_counter, before)


def test_philox_is_elementwise_over_leading_axes() -> None:
    counter = torch.arange(2 * 3 * 4).view(2, 3, 4)
    out = philox(counter, SEED)
    assert out.shape == (2, 3, 4) and out.dtype == torch.int64
    for i in range(2):
        for j in range(3):
            assert torch.equal(out[i, j], philox(counter[i, j], SEED))


@given(
    st.integers(0, 2**63 - 1),
    st.sampled_from(Kind),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**22 - 1),
    st.integers(0, 2**8 - 1),
    st.integers(0, 2**20 - 1),
    st.integers(0, 13),
)
@settings(deadline=None)
def test_words_are_those_of_the_oracle(
    seed: int, kind: Kind, client: int, t: int, layer: int, step: int, n: int
) -> None:
    ours = words(seed, stream(kind, client=client, round=t, layer=layer, step=step), n)
    theirs = oracle.words(seed, kind, n, client=client, t=t, step=step, layer=layer)
    assert ours.tolist() == theirs.tolist()


def test_element_e_is_word_e_mod_4_of_block_e_div_4() -> None:
    one = stream(Kind.SUBSET, client=7, round=5, step=0)
    expected = [int(blocks(SEED, one, torch.tensor(e // 4))[e % 4]) for e in range(11)]
    assert words(SEED, one, 11).tolist() == expected
    # The counter of the last element, by hand: block 2, client 7, 5 << 10 = 5120, 1 << 28.
    assert expected[10] == int(philox(torch.tensor([2, 7, 5120, 268435456]), SEED)[2])


def test_streams_have_leading_axes() -> None:
    many = stream(Kind.SHUFFLE, client=torch.tensor([[3], [8]]), step=torch.arange(5))
    assert many.shape == (2, 5, 3) and many.dtype == torch.int64
    drawn = words(SEED, many, 6)
    assert drawn.shape == (2, 5, 6)
    for i, client in enumerate((3, 8)):
        for step in range(5):
            alone = words(SEED, stream(Kind.SHUFFLE, client=client, step=step), 6)
            assert torch.equal(drawn[i, step], alone)


@given(st.lists(st.integers(0, 11), max_size=8), st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_ragged_draws_are_the_plain_ones_side_by_side(sizes: list[int], seed: int) -> None:
    streams = clients(len(sizes))
    for ragged, plain in ((ragged_words, words), (ragged_permutation, permutation)):
        expected = [plain(seed, one, n).tolist() for one, n in zip(streams, sizes, strict=True)]
        drawn = ragged(seed, streams, torch.tensor(sizes, dtype=torch.int64))
        assert drawn.dtype == torch.int64 and drawn.tolist() == sum(expected, [])


# Counters


def meaning(counter: list[int]) -> Purpose:
    """What a counter is for, by the table of docs/design.md."""
    block, client, w2, w3 = counter
    return (w3 >> 28, client, w2 >> 10, w2 % 2**10, (w3 >> 20) % 2**8, w3 % 2**20, block)


def counter_of(purpose: Purpose) -> list[int]:
    """The counter that vecfl hands to Philox for a purpose."""
    kind, *fields, block = purpose
    with pytest.MonkeyPatch.context() as patch:
        planted(patch, lambda counter: counter)
        one = stream(Kind(kind), **dict(zip(BITS, fields, strict=True)))
        return blocks(0, one, torch.tensor(block)).tolist()


def field(bits: int) -> st.SearchStrategy[int]:
    edges = st.sampled_from([0, 1, 2 ** (bits - 1), 2**bits - 2, 2**bits - 1])
    return edges | st.integers(0, bits - 1).map(lambda i: 1 << i) | st.integers(0, 2**bits - 1)


PURPOSES = st.tuples(st.sampled_from(Kind), *map(field, BITS.values()), field(32))


@given(PURPOSES)
@settings(deadline=None, max_examples=200)
def test_a_counter_tells_what_it_is_for(purpose: Purpose) -> None:
    counter = counter_of(purpose)
    assert all(0 <= word < 2**32 for word in counter)
    assert meaning(counter) == purpose


@given(PURPOSES, PURPOSES, st.lists(st.booleans(), min_size=7, max_size=7))
@settings(deadline=None, max_examples=200)
def test_two_purposes_never_share_a_counter(one: Purpose, other: Purpose, swap: list[bool]) -> None:
    mixed = tuple(b if s else a for a, b, s in zip(one, other, swap, strict=True))
    assume(mixed != one)
    assert counter_of(mixed) != counter_of(one)


@given(st.integers(0, 255), PURPOSES)
@settings(deadline=None)
def test_a_stream_moves_to_a_layer(layer: int, purpose: Purpose) -> None:
    kind, client, t, occurrence, _, step, _ = purpose
    base = {"client": client, "round": t, "occurrence": occurrence, "step": step}
    moved = with_layer(stream(Kind(kind), **base), layer)
    assert torch.equal(moved, stream(Kind(kind), **base, layer=layer))


@given(st.sampled_from(Kind), PURPOSES)
@settings(deadline=None)
def test_a_stream_moves_to_a_kind(other: Kind, purpose: Purpose) -> None:
    kind, *fields, _ = purpose
    place = dict(zip(BITS, fields, strict=True))
    assert torch.equal(with_kind(stream(Kind(kind), **place), other), stream(other, **place))


@pytest.mark.parametrize("name", BITS)
def test_a_value_outside_of_its_field_is_refused(name: str) -> None:
    top = 2 ** BITS[name] - 1
    for bad in (top + 1, -1, 2**62):
        message = (
            f"^{name} {bad} has no random stream of its own: "
            f"the counter holds 0 to 2\\^{BITS[name]} - 1$"
        )
        with pytest.raises(InputError, match=message):
            stream(Kind.SHUFFLE, **{name: bad})
        with pytest.raises(InputError, match=message):  # one of many
            stream(Kind.SHUFFLE, **{name: torch.tensor([0, bad, top])})
    assert stream(Kind.SHUFFLE, **{name: torch.tensor([0, top])}).shape == (2, 3)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 0.0, 1.5, "7", None])
def test_a_seed_out_of_range_is_refused(seed: Any) -> None:
    message = f"sample_seed must be an integer in [0, 2^63), not {seed!r}"
    with pytest.raises(InputError) as error:
        check_seed("sample_seed", seed)
    assert str(error.value) == message


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_a_seed_in_range_is_kept(seed: int) -> None:
    assert check_seed("seed", seed) == seed


# No two streams of a run share a counter

SIZES = (5, 0, 1, 13, 2, 3, 7, 4, 9, 3)
COHORT, CAP, EPOCHS, BATCH, HIDDEN, ROUNDS = 7, 6, 2, 3, 8, 3
DROPOUTS = {0.5: 128, 0.3: 8}  # lanes of a block: 2 * 0.5 is an integer, 256 * 0.3 is none


def simulation(backend: str, sample_seed: int | None) -> vecfl.Simulation:
    first, second = map(nn.Dropout, DROPOUTS)
    module = nn.Sequential(nn.Linear(3, HIDDEN), first, nn.Linear(HIDDEN, HIDDEN), second)
    n = sum(SIZES)
    offsets = torch.tensor([0, *SIZES]).cumsum(0)
    columns = {"x": torch.linspace(-1, 1, 3 * n).view(n, 3), "y": torch.arange(n) % HIDDEN}
    data = vecfl.FederatedDataset(columns, offsets)
    batches = vecfl.Batches(BATCH, epochs=EPOCHS, max_examples=CAP)
    return vecfl.Simulation(
        vecfl.Task(module, vecfl.cross_entropy, example=data.examples(2)),
        data,
        vecfl.fedavg(lr=0.1, batches=batches),
        vecfl.uniform(COHORT),
        backend=backend,
        slots=3,
        seed=SEED,
        sample_seed=sample_seed,
    )


def purposes(sample_seed: int, padded: bool) -> Iterator[tuple[int, Purpose]]:
    """(seed, purpose) of every block that a run has to draw, counted out from docs/design.md.

    Masks are drawn for BATCH examples at every step, or for those that are valid.
    """
    for t in range(ROUNDS):
        for block in range(-(-len(SIZES) // 4)):
            yield sample_seed, (0, 0, t, 0, 0, 0, block)
        for k in oracle.cohort(sample_seed, t, len(SIZES), COHORT).tolist():
            n, short = min(SIZES[k], CAP), min(SIZES[k], CAP) % BATCH
            if SIZES[k] > CAP:
                for block in range(-(-SIZES[k] // 4)):
                    yield SEED, (1, k, t, 0, 0, 0, block)
            valid = [BATCH] * (n // BATCH) + [short] * (short > 0)
            for epoch in range(EPOCHS):
                for block in range(-(-n // 4)):
                    yield SEED, (2, k, t, 0, 0, epoch, block)
            for step, b in enumerate(valid * EPOCHS):
                rows = BATCH if padded else b
                for layer, lanes in enumerate(DROPOUTS.values()):
                    for block in range(-(-rows * HIDDEN // lanes)):
                        yield SEED, (3, k, t, 0, layer, step, block)


@pytest.mark.parametrize("window", [1, 50, 1 << 19])
@pytest.mark.parametrize("sample_seed", [None, 77])
@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_no_counter_of_a_run_serves_two_purposes(
    backend: str, sample_seed: int | None, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A shuffle or a subset is drawn again when another window of steps needs it, and an idle slot
    # repeats the first step of a busy one under vmap: the same counter for the same purpose. So
    # what is compared are the distinct counters. They are read by `meaning`, which gives one
    # purpose to a counter: if the purposes read are all of those due, no two of them share one.
    # The loop draws some steps ahead, for at most BATCH examples each.
    drawn: Counter[tuple[int, Purpose]] = Counter()

    def record(counter: Tensor, seed: int) -> Tensor:
        drawn.update((seed, meaning(row)) for row in counter.reshape(-1, 4).tolist())
        return philox(counter, seed)

    sim = simulation(backend, sample_seed)
    monkeypatch.setattr("vecfl.tape.WINDOW", window)
    monkeypatch.setattr("vecfl.random.philox", record)
    state = sim.start()
    for _ in range(ROUNDS):
        state, _ = sim.round(state)
    key = SEED if sample_seed is None else sample_seed
    due, padded = list(purposes(key, False)), list(purposes(key, True))
    assert len(padded) == len(set(padded)) and {kind for _, (kind, *_) in due} == {0, 1, 2, 3}
    assert len(due) < len(padded) and set(due) <= drawn.keys() <= set(padded)
    assert backend == "loop" or drawn.keys() == set(padded)
    assert {times for (_, (kind, *_)), times in drawn.items() if kind == 0} == {1}


# Laws

N = 1 << 20


def mean_is(values: Tensor, mean: float, variance: float) -> bool:
    """Whether the mean of [N] values of this law is within 6 standard errors: p = 2e-9 if it is."""
    return abs(float(values.mean()) - mean) < 6 * sqrt(variance / len(values))


def test_uniform_moments() -> None:
    # u - 1/2 has mean 0 and variance 1/12, its square variance 1/80 - 1/144 = 1/180; products of
    # independent neighbours, in a stream or across streams, have variance 1/144. False alarm:
    # 5 * 2e-9 = 1e-8.
    drawn = uniform(SEED, clients(N // 256), 256)
    assert drawn.dtype == torch.float64 and drawn.shape == (N // 256, 256)
    assert drawn.min() > 0 and drawn.max() < 1
    u = drawn - 0.5
    assert mean_is(u.flatten(), 0, 1 / 12)
    assert mean_is(u.flatten() ** 2, 1 / 12, 1 / 180)
    assert mean_is((u[:, 1:] * u[:, :-1]).flatten(), 0, 1 / 144)
    assert mean_is((u[:, 4:] * u[:, :-4]).flatten(), 0, 1 / 144)
    assert mean_is((u[1:] * u[:-1]).flatten(), 0, 1 / 144)


def test_uniform_fills_its_cells_evenly() -> None:
    # Chi-square over 64 cells of 2^14 expected draws: 63 degrees of freedom exceed 131.4 with
    # p = 1e-6 over seeds.
    cells = (uniform(SEED, stream(Kind.DROPOUT, step=9), N) * 64).long().bincount(minlength=64)
    assert len(cells) == 64
    assert ((cells - 2**14) ** 2 / 2**14).sum() < 131.4


def test_uniform_never_reaches_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    # The extreme words 0 and 2^32 - 1 give 1/2 * 2^-32 and 1 - 1/2 * 2^-32, exact in float64.
    planted(monkeypatch, lambda counter: torch.tensor([0, -1, 1, 2**31]).expand_as(counter))
    assert uniform(0, stream(Kind.COHORT), 4).tolist() == [
        2.0**-33,
        1 - 2.0**-33,
        3 * 2.0**-33,
        0.5 + 2.0**-33,
    ]


def test_normal_is_box_muller(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, lambda counter: torch.tensor([0, 2**29, 2**30, 2**31]).expand_as(counter))
    u0, u1, u2, u3 = ((word + 0.5) / 2**32 for word in (0, 2**29, 2**30, 2**31))
    r, s = sqrt(-2 * log(u0)), sqrt(-2 * log(u2))
    expected = [r * cos(2 * pi * u1), r * sin(2 * pi * u1)]
    expected += [s * cos(2 * pi * u3), s * sin(2 * pi * u3)]
    assert normal(0, stream(Kind.COHORT), 4).tolist() == pytest.approx(expected, rel=1e-12)
    # The largest radius is finite: sqrt(2 * 33 log 2) = 6.76; at an eighth of a turn, over sqrt 2.
    assert expected[0] == pytest.approx(6.76366 / sqrt(2), rel=1e-5)


def test_draws_are_prefixes_of_longer_ones() -> None:
    many = clients(3)
    for draw in (words, uniform, normal):
        longest = draw(SEED, many, 9)
        for n in range(9):
            assert torch.equal(draw(SEED, many, n), longest[:, :n]), (draw, n)


def test_normal_moments_and_tails() -> None:
    # z has E z^k = 0, 1, 0, 3, 0, 15, 0, 105 for k = 1..8, hence the variances E z^2k - (E z^k)^2:
    # 1, 2, 15, 96. The two halves of a pair are independent, and so are their squares (variance
    # 2 * 2). |z| > 3 with p = 2.6998e-3, |z| > 4 with p = 6.3342e-5 (66 expected draws).
    # False alarm: 8 * 2e-9 by the normal law, 2.4e-8 for the last by the binomial: 4e-8 in all.
    z = normal(SEED, clients(N // 256), 256).flatten()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert mean_is(z**power, mean, variance), power
    first, second = z.view(-1, 2).unbind(1)
    assert mean_is(first * second, 0, 1)
    assert mean_is((first**2 - 1) * (second**2 - 1), 0, 4)
    assert mean_is(first[1:] * second[:-1], 0, 1)
    for limit, p in ((3, 2.6998e-3), (4, 6.3342e-5)):
        assert mean_is((z.abs() > limit).double(), p, p * (1 - p)), limit


@given(st.integers(0, 40), st.integers(0, 2**63 - 1), st.integers(0, 2**20 - 1))
@settings(deadline=None)
def test_a_permutation_is_one(n: int, seed: int, step: int) -> None:
    drawn = permutation(seed, stream(Kind.SHUFFLE, client=3, step=step), n)
    assert drawn.dtype == torch.int64 and sorted(drawn.tolist()) == list(range(n))
    assert drawn.tolist() == oracle.shuffle(seed, 0, 3, step, n).tolist()


@pytest.mark.parametrize(("n", "limit"), [(3, 35.9), (4, 70.6)])
def test_every_permutation_is_equally_likely(n: int, limit: float) -> None:
    # Chi-square over n! orders of 2,000 expected draws: 5 (23) degrees of freedom exceed 35.9
    # (70.6) with p = 1e-6 over seeds.
    orders = list(permutations(range(n)))
    drawn = Counter(map(tuple, permutation(SEED, clients(2000 * len(orders)), n).tolist()))
    assert drawn.keys() == set(orders)
    assert sum((times - 2000) ** 2 / 2000 for times in drawn.values()) < limit


def test_equal_words_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two values for all words: a sort that is not stable would mix 5,000 elements.
    planted(monkeypatch, lambda counter: (counter[..., :1] + torch.arange(4)) % 2)
    n = 5000
    drawn = words(0, clients(1)[0], n).numpy()
    assert np.bincount(drawn).tolist() == [n // 2, n // 2]
    expected = np.argsort(drawn, kind="stable").tolist()
    assert permutation(0, clients(1)[0], n).tolist() == expected
    assert ragged_permutation(0, clients(2), torch.tensor([n, n])).tolist() == 2 * expected


def test_many_words_are_those_of_their_blocks() -> None:
    """A long stream is drawn in parts; word e is word e mod 4 of block e div 4."""
    streams, n = stream(Kind.COHORT, client=torch.tensor([3, 4]), round=5), 4 * AT_A_TIME + 7
    block = torch.arange(-(-n // 4)).expand(2, -1)
    right = blocks(9, streams[:, None], block).flatten(1)[:, :n]
    assert torch.equal(words(9, streams, n), right)
