"""Cohorts: drawn with the promised law, as functions of (eligible, seed, round).

Statistical tests have a fixed seed. The false-alarm probability that they state is over seeds:
counts are held to 6 standard errors, which a normal leaves with p = 2e-9.
"""

from collections import Counter
from itertools import combinations
from math import comb, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vecfl import distinct
from vecfl.errors import InputError
from vecfl.sampling import (
    Sampler,
    cyclic,
    everyone,
    fraction,
    poisson,
    uniform,
    uniform_between,
    weighted,
    with_replacement,
)

from .oracles import philox

SEED = 2**40 + 3
SAMPLERS: dict[str, Sampler] = {
    "everyone": everyone(),
    "uniform": uniform(5),
    "fraction": fraction(0.4),
    "uniform_between": uniform_between(2, 6),
    "poisson": poisson(0.4),
    "poisson at capacity": poisson(0.4, 4),
    "with_replacement": with_replacement(5),
    "with_replacement by weights": with_replacement(5, torch.arange(12)),
    "weighted": weighted(5, torch.arange(12)),
    "cyclic": cyclic(5),
}
every = pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)


def all_of(population: int) -> Tensor:
    return torch.ones(population, dtype=torch.bool)


def taken(sample: Sampler, population: int, rounds: int) -> Tensor:
    """How often each client is in the cohort of each round, [rounds, population]."""
    cohorts = (sample(all_of(population), SEED, t) for t in range(rounds))
    return torch.stack([cohort.bincount(minlength=population) for cohort in cohorts])


def fits(times: Tensor | int, trials: int, p: float) -> bool:
    """Whether a binomial count is within 6 standard errors."""
    return abs(int(times) - trials * p) < 6 * sqrt(trials * p * (1 - p))


@given(st.data(), st.integers(1, 40), st.integers(0, 2**63 - 1), st.integers(0, 2**22 - 1))
@settings(deadline=None)
def test_uniform_draws_the_clients_with_the_smallest_words(
    data: st.DataObject, population: int, seed: int, t: int
) -> None:
    size = data.draw(st.integers(1, population))
    drawn = uniform(size)(all_of(population), seed, t)
    assert drawn.dtype == torch.int64
    assert len(set(drawn.tolist())) == size and drawn.min() >= 0 and drawn.max() < population
    assert drawn.tolist() == philox.cohort(seed, t, population, size).tolist()


def test_equal_words_go_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    # All odd clients get the word 0 and all even ones the largest word.
    def words(counter: Tensor, seed: int) -> Tensor:
        return torch.tensor([2**32 - 1, 0, 2**32 - 1, 0]).expand_as(counter)

    monkeypatch.setattr("vecfl.random.philox", words)
    drawn = uniform(1500)(all_of(2000), 0, 0).tolist()
    assert drawn == [*range(1, 2000, 2), *range(0, 1000, 2)]


@given(st.integers(1, 40), st.integers(0, 2**63 - 1), st.integers(0, 2**22 - 1), st.data())
@settings(deadline=None)
def test_the_other_samplers_read_the_draws_of_the_contract(
    population: int, seed: int, t: int, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, population))
    all_ = all_of(population)
    word = philox.words(seed, philox.COHORT, max(population, size), t=t)
    order, u = np.argsort(word[:population], kind="stable"), (word + 0.5) / 2**32

    high = data.draw(st.integers(size, population))
    first = (float(philox.words(seed, philox.COHORT, 1, t=t, step=1)[0]) + 0.5) / 2**32
    several = order[: size + int(first * (high - size + 1))]
    assert uniform_between(size, high)(all_, seed, t).tolist() == several.tolist()

    some = [k for k in range(population) if word[k] < int(0.3 * 2**32)]
    assert poisson(0.3)(all_, seed, t).tolist() == some
    fewer = sorted(sorted(some, key=lambda k: (word[k], k))[:size])
    assert poisson(0.3, size)(all_, seed, t).tolist() == fewer

    assert with_replacement(size)(all_, seed, t).tolist() == [int(x * population) for x in u[:size]]

    number, turn = divmod(t, -(-population // size))
    shuffled = np.argsort(philox.words(seed, philox.COHORT, population, t=number, step=2))
    mine = shuffled[turn * size : (turn + 1) * size]
    assert cyclic(size)(all_, seed, t).tolist() == mine.tolist()


def test_every_client_and_every_pair_is_drawn_equally_often() -> None:
    # 5 of 12 clients in 4,000 rounds: a client takes part with p = 5/12, two of them with
    # p = 5/12 * 4/11, and the first of the cohort is a given client with p = 1/12. 12 + 66 + 12
    # counts raise a false alarm with p = 90 * 2e-9 = 1.8e-7.
    check_equally_often(uniform(5), 12, one=5 / 12, two=5 / 12 * 4 / 11)


def check_equally_often(sample: Sampler, population: int, one: float, two: float) -> None:
    """In 4,000 rounds: each client, each two of them, and each as the first of the cohort."""
    rounds = 4000
    drawn = torch.stack([sample(all_of(population), SEED, t) for t in range(rounds)])
    part = torch.zeros(rounds, population, dtype=torch.int64).scatter_(1, drawn, 1)
    for i in range(population):
        assert fits(part[:, i].sum(), rounds, one), i
        assert fits((drawn[:, 0] == i).sum(), rounds, 1 / population), i
    for i, j in combinations(range(population), 2):
        assert fits((part[:, i] * part[:, j]).sum(), rounds, two), (i, j)


# Of 12 clients: how likely is one in a cohort, and how likely are two of them together?
# fraction: 0.4 * 12 = 4.8, so 5 clients. between: 2 to 6 with 1/5 each, so 20/5 / 12 = 1/3 and
# (2*1 + 3*2 + 4*3 + 5*4 + 6*5) / 5 / (12 * 11). poisson: independent. with replacement, in 5 draws:
# 1 - (11/12)^5, and 1 - 2 (11/12)^5 + (10/12)^5.
INCLUSION = {
    "fraction": (fraction(0.4), 5 / 12, 5 / 12 * 4 / 11),
    "uniform_between": (uniform_between(2, 6), 1 / 3, 70 / 5 / 132),
    "poisson": (poisson(0.3), 0.3, 0.09),
    "with_replacement": (
        with_replacement(5),
        1 - (11 / 12) ** 5,
        1 - 2 * (11 / 12) ** 5 + (10 / 12) ** 5,
    ),
}


@pytest.mark.parametrize("sample, one, two", INCLUSION.values(), ids=INCLUSION)
def test_inclusion(sample: Sampler, one: float, two: float) -> None:
    # 12 + 66 counts: false alarm with p = 78 * 2e-9 = 1.6e-7.
    part = (taken(sample, 12, 4000) > 0).long()
    for i in range(12):
        assert fits(part[:, i].sum(), 4000, one), i
    for i, j in combinations(range(12), 2):
        assert fits((part[:, i] * part[:, j]).sum(), 4000, two), (i, j)


@every
def test_rounds_are_drawn_independently(sample: Sampler, request: pytest.FixtureRequest) -> None:
    # A client's place in round t says nothing about its place in round t + 1: the count of (both)
    # has the mean of a product. Standard errors by the rounds themselves (products of neighbours
    # are almost uncorrelated); 12 clients: false alarm with p = 12 * 2e-9. Everyone and cyclic
    # passes are not independent: a client of the first cohort of a pass is not in the second.
    part = (taken(sample, 12, 3000) > 0).double()
    away = part - part.mean(0)
    products = away[1:] * away[:-1]
    error = products.std(0) / sqrt(len(products))
    z = (products.mean(0).abs() / error.clamp(min=1e-12)).max()
    if request.node.callspec.id == "cyclic":
        assert z > 20
    elif request.node.callspec.id == "everyone":
        assert not away.any()
    else:
        assert z < 6


def test_the_size_of_a_poisson_cohort_is_binomial() -> None:
    # 30 clients, rate 0.1, 5,000 rounds: each size has its binomial probability; sizes of more
    # than 8 have p < 3e-4 and are counted together. 10 counts: false alarm with p = 2e-8.
    sizes = taken(poisson(0.1), 30, 5000).sum(1)
    p = [comb(30, k) * 0.1**k * 0.9 ** (30 - k) for k in range(31)]
    for k in range(9):
        assert fits((sizes == k).sum(), 5000, p[k]), k
    assert fits((sizes > 8).sum(), 5000, sum(p[9:]))
    assert (sizes == 0).any()  # an empty draw is legal: 0.9^30 = 4 % of the rounds


def test_beyond_the_capacity_a_uniform_subset_remains() -> None:
    # 30 clients, rate 0.1, at most 4: in a round of N drawn clients each of them stays with 4/N if
    # N > 4. So a client takes part with p = sum_N P(N) min(N, 4) / 30; 30 counts: p = 6e-8. The
    # capacity only ever takes clients away, and it is reached with p = P(N >= 4).
    free, cut = taken(poisson(0.1), 30, 5000), taken(poisson(0.1, 4), 30, 5000)
    p = [comb(30, k) * 0.1**k * 0.9 ** (30 - k) for k in range(31)]
    one = sum(p_n * min(n, 4) / 30 for n, p_n in enumerate(p))
    assert (cut <= free).all() and torch.equal(cut.sum(1), free.sum(1).clamp(max=4))
    for i in range(30):
        assert fits(cut[:, i].sum(), 5000, one), i
    assert fits((cut.sum(1) == 4).sum(), 5000, sum(p[4:]))
    # Who stays does not depend on who else was drawn: of a round's clients, the half with the
    # smaller positions makes up half of those that stay (5,000 rounds, 6 standard errors).
    over = free.sum(1) > 4
    assert fits(cut[over][:, :15].sum(), 4 * int(over.sum()), 0.5)


def test_each_size_between_two_is_equally_likely() -> None:
    # 5 sizes in 4,000 rounds: false alarm with p = 1e-8.
    sizes = Counter(taken(uniform_between(2, 6), 12, 4000).sum(1).tolist())
    assert sorted(sizes) == [2, 3, 4, 5, 6]
    assert all(fits(times, 4000, 1 / 5) for times in sizes.values())


def test_clients_are_drawn_again_with_replacement() -> None:
    # 4 draws of 3 clients, weights 0, 1, 3: client 2 comes Binomial(4, 3/4) times. 5 counts.
    often = taken(with_replacement(4, torch.tensor([0, 1, 3])), 3, 4000)
    assert not often[:, 0].any() and (often.sum(1) == 4).all()
    for k in range(5):
        assert fits((often[:, 2] == k).sum(), 4000, comb(4, k) * 0.75**k * 0.25 ** (4 - k)), k


def test_weights_without_replacement_by_hand() -> None:
    # Weights 1, 2, 3, two clients one after the other. Client 2 first: 3/6; after client 0 (1/6) it
    # has 3/5, after client 1 (2/6) 3/4: in all 1/2 + 1/10 + 1/4 = 17/20. Client 1: 2/6 + 1/6 * 2/5
    # + 3/6 * 2/3 = 11/15. Client 0: 2 - 17/20 - 11/15 = 5/12. A client of weight 0 never comes.
    sample = weighted(2, torch.tensor([1.0, 2.0, 3.0, 0.0]))
    part = taken(sample, 4, 4000)
    for k, p in enumerate((5 / 12, 11 / 15, 17 / 20)):
        assert fits(part[:, k].sum(), 4000, p), k
    assert not part[:, 3].any()
    order = Counter(int(sample(all_of(4), SEED, t)[0]) for t in range(4000))
    assert fits(order[2], 4000, 1 / 2)  # the order is that of the draws
    # Where fewer than `size` have weight, all of them come, and nobody else.
    assert sorted(weighted(4, [0, 5, 0, 1])(all_of(4), SEED, 0).tolist()) == [1, 3]


def test_cyclic_passes_hold_everyone_once_and_are_shuffled_anew() -> None:
    # 11 clients by 4: cohorts of 4, 4, 3. Two orders of 11 agree with p = 1/11!.
    cohorts = [cyclic(4)(all_of(11), SEED, t).tolist() for t in range(6)]
    assert [len(c) for c in cohorts] == [4, 4, 3, 4, 4, 3]
    one, two = sum(cohorts[:3], []), sum(cohorts[3:], [])
    assert sorted(one) == sorted(two) == list(range(11)) and one != two
    # Each client is in the first cohort of a pass with p = 4/11 (2,000 passes, 11 counts: 2e-8).
    firsts = torch.stack(
        [cyclic(4)(all_of(11), SEED, 3 * t).bincount(minlength=11) for t in range(2000)]
    )
    assert all(fits(times, 2000, 4 / 11) for times in firsts.sum(0))


@every
def test_a_cohort_is_a_function_of_eligible_seed_and_round(sample: Sampler) -> None:
    eligible, state = all_of(12), torch.random.get_rng_state()
    first = sample(eligible, SEED, 3)
    assert first.dtype == torch.int64 and first.dim() == 1
    torch.manual_seed(0)
    assert torch.equal(sample(eligible, SEED, 3), first) and eligible.all()
    torch.random.set_rng_state(state)
    sample(eligible, SEED, 3)
    assert torch.equal(torch.random.get_rng_state(), state)


@every
def test_seeds_and_rounds_draw_anew(sample: Sampler, request: pytest.FixtureRequest) -> None:
    # 12 rounds agree by chance with p < 1e-12: the rarest, sets of 5 of 12, have 792 values.
    runs = [
        tuple(tuple(sample(all_of(12), seed, t).tolist()) for t in range(start, start + 12))
        for seed, start in ((SEED, 0), (SEED + 1, 0), (SEED + 2**32, 0), (SEED, 12))
    ]
    assert len(set(runs)) == (1 if request.node.callspec.id == "everyone" else 4)


@every
def test_only_who_is_eligible_is_drawn(sample: Sampler) -> None:
    # Clients 1, 4, 7 and 10 are: in 200 rounds each of them is drawn somewhere (a client that is
    # drawn with p >= 1/66 is left out of 200 rounds with p < 5 %; the fixed seed leaves out none).
    eligible = torch.arange(12) % 3 == 1
    drawn = torch.cat([sample(eligible, SEED, t) for t in range(200)])
    assert set(drawn.tolist()) == {1, 4, 7, 10}
    nobody = sample(torch.zeros(12, dtype=torch.bool), SEED, 0)
    assert nobody.shape == (0,) and nobody.dtype == torch.int64


def test_where_fewer_are_eligible_all_of_them_take_part(caplog: pytest.LogCaptureFixture) -> None:
    distinct.say_short.cache_clear()
    eligible = torch.tensor([True, False, True, False, False])
    for sample in (uniform(3), uniform_between(3, 4), weighted(3, [1, 1, 1, 1, 1])):
        assert sorted(sample(eligible, SEED, 0).tolist()) == [0, 2]
    for t in range(2):
        uniform(3)(eligible, SEED, t)
    assert [message[:60] for message in caplog.messages].count(
        "a cohort of 3 was asked for, but turns or availability leave"
    ) == 1  # said once
    assert len(fraction(0.5)(eligible, SEED, 0)) == 1  # of those who are eligible


@pytest.mark.parametrize(
    "share, population, size", [(0.1, 100, 10), (0.25, 10, 3), (0.001, 10, 1), (1, 7, 7)]
)
def test_a_fraction_is_rounded_and_never_nobody(share: float, population: int, size: int) -> None:
    assert len(fraction(share)(all_of(population), SEED, 0)) == size


def test_a_rate_of_one_is_everybody_and_a_tiny_one_almost_nobody() -> None:
    assert poisson(1)(all_of(50), SEED, 0).tolist() == list(range(50))
    assert len(poisson(2**-33)(all_of(50), SEED, 0)) == 0  # rounded down: never more often


def test_the_rate_is_rounded_down(monkeypatch: pytest.MonkeyPatch) -> None:
    # 0.3 * 2^32 = 1288490188.8: words to 1288490187 are 1288490188 / 2^32 < 0.3 of all, one more
    # would be above.
    edge = [1288490186, 1288490187, 1288490188, 1288490189]
    monkeypatch.setattr(
        "vecfl.random.philox", lambda counter, seed: torch.tensor(edge).expand_as(counter)
    )
    assert poisson(0.3)(all_of(4), SEED, 0).tolist() == [0, 1]


def test_a_smaller_cohort_is_the_beginning_of_a_larger_one() -> None:
    larger = uniform(30)(all_of(30), SEED, 0).tolist()
    assert sorted(larger) == list(range(30))
    assert uniform(7)(all_of(30), SEED, 0).tolist() == larger[:7]


BAD = {
    "uniform 0": (lambda: uniform(0), "a cohort has at least 1 client, not 0"),
    "uniform float": (lambda: uniform(2.0), "a cohort has at least 1 client, not 2.0"),
    "uniform text": (lambda: uniform("3"), "a cohort has at least 1 client, not '3'"),
    "too large": (
        lambda: uniform(11)(all_of(10), SEED, 0),
        "a cohort of 11 clients is larger than the population of 10; choose at most 10",
    ),
    "a pass of more than all": (
        lambda: cyclic(11)(all_of(10), SEED, 0),
        "a cohort of 11 clients is larger than the population of 10; choose at most 10",
    ),
    "range": (
        lambda: uniform_between(5, 4),
        "a cohort of 5 or more has at least 5 clients, not 4",
    ),
    "range too large": (
        lambda: uniform_between(1, 12)(all_of(10), SEED, 0),
        "a cohort of 12 clients is larger than the population of 10; choose at most 10",
    ),
    "fraction 0": (lambda: fraction(0), "a fraction of the clients is in (0, 1], not 0"),
    "fraction 1.5": (lambda: fraction(1.5), "a fraction of the clients is in (0, 1], not 1.5"),
    "fraction True": (lambda: fraction(True), "a fraction of the clients is in (0, 1], not True"),
    "rate nan": (lambda: poisson(float("nan")), "a sampling rate is in (0, 1], not nan"),
    "rate text": (lambda: poisson("0.1"), "a sampling rate is in (0, 1], not '0.1'"),
    "capacity 0": (lambda: poisson(0.1, 0), "a cohort at capacity has at least 1 client, not 0"),
    "replacement 0": (lambda: with_replacement(0), "a cohort has at least 1 client, not 0"),
    "cyclic -1": (lambda: cyclic(-1), "a cohort has at least 1 client, not -1"),
    "weights negative": (
        lambda: weighted(1, [1.0, -2.0]),
        "weights: expected a number of at least 0 for each client, got -2 for client 1",
    ),
    "weights nan": (
        lambda: with_replacement(1, torch.tensor([1.0, float("nan")])),
        "weights: expected a number of at least 0 for each client, got nan for client 1",
    ),
    "weights zero": (
        lambda: weighted(1, [0, 0]),
        "weights: expected a number of at least 0 for each client, got zeros alone",
    ),
    "weights by name": (
        lambda: weighted(1, "sizes"),
        "weights: expected a number of at least 0 for each client, got 'sizes'",
    ),
    "weights of fewer": (
        lambda: weighted(4, [1, 1, 1])(all_of(3), SEED, 0),
        "a cohort of 4 clients is larger than the population of 3; choose at most 3",
    ),
    "weights by table": (
        lambda: weighted(1, torch.ones(2, 3)),
        "weights: expected a number of at least 0 for each client, got shape [2, 3]",
    ),
    "weights of others": (
        lambda: weighted(1, [1, 1])(all_of(3), SEED, 0),
        "weights: 2 of them for a population of 3 clients",
    ),
    "round": (
        lambda: uniform(1)(all_of(10), SEED, 2**22),
        "round 4194304 has no random stream of its own: the counter holds 0 to 2^22 - 1",
    ),
}


@pytest.mark.parametrize("build, message", BAD.values(), ids=BAD)
def test_bad_input(build: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        build()
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_everyone_is_all_in_their_order() -> None:
    for t in (0, 5):
        cohort = everyone()(all_of(4), SEED + t, t)
        assert cohort.dtype == torch.int64 and cohort.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("high", [False, True])
def test_the_smallest_words_are_found_in_a_large_population(
    high: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5,000 clients, of whom the few below a limit are sorted, or all where too few are below."""
    eligible = torch.arange(5000) % 3 != 0
    words = distinct.client_words(eligible, 7, 2) >> 20  # with ties
    if high:
        words = 2**32 - 1 - words
    monkeypatch.setattr(distinct, "client_words", lambda *_: words)
    keys = sorted((w, i) for i, w in enumerate(words.tolist()) if eligible[i])
    found = distinct.distinct(eligible, 7, 2, 40)
    assert found.tolist() == [i for _, i in keys[:40]]


def test_a_large_population_is_drawn_by_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first distinct eligible points, and no words of all clients."""
    population = distinct.LARGE + 1
    eligible = torch.arange(population) % 3 != 0
    monkeypatch.setattr(distinct, "client_words", lambda *_: pytest.fail("words of all"))
    word = philox.words(SEED, philox.COHORT, 400, t=6, step=7).tolist()
    points = [(2**32 * a + b) // 2 % population for a, b in zip(word[::2], word[1::2], strict=True)]
    expected = list(dict.fromkeys(k for k in points if k % 3))[:90]
    assert uniform(90)(eligible, SEED, 6).tolist() == expected and len(expected) == 90


def test_points_are_drawn_until_they_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of 1,000 clients are eligible; 60 of them take about 128 points, and begin with 25."""
    eligible = torch.arange(1000) % 2 == 0
    few = distinct.by_points(eligible, SEED, 0, 60, 6)
    assert few.tolist() == distinct.by_points(eligible, SEED, 0, 60, 1000).tolist()
    assert len(set(few.tolist())) == 60 and not (few % 2).any()


def test_points_draw_every_client_and_every_pair_equally_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 2 of 16 clients in 4,000 rounds: p = 1/8, 2/16 * 1/15 for a pair, 1/16 to be the first.
    # 16 + 120 + 16 counts raise a false alarm with p = 152 * 2e-9 = 3.1e-7; a pair comes 33 times.
    monkeypatch.setattr(distinct, "LARGE", 15)
    monkeypatch.setattr(distinct, "client_words", lambda *_: pytest.fail("words of all"))
    check_equally_often(uniform(2), 16, one=1 / 8, two=1 / 120)


@pytest.mark.parametrize(("size", "among"), [(3, 16), (2, 4)])
def test_a_large_part_of_a_population_is_drawn_by_words(
    size: int, among: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distinct, "LARGE", 15)
    monkeypatch.setattr(distinct, "by_points", lambda *_: pytest.fail("points"))
    assert len(uniform(size)(torch.arange(16) < among, SEED, 0)) == size
