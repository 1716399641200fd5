"""Cohorts: drawn without replacement, with the promised law, as functions of (seed, round).

Statistical tests have a fixed seed. The false-alarm probability that they state is over seeds.
"""

from itertools import combinations
from math import sqrt
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vecfl.errors import InputError
from vecfl.sampling import everyone, uniform

from .oracles import philox

SEED = 2**40 + 3


@given(st.data(), st.integers(1, 40), st.integers(0, 2**63 - 1), st.integers(0, 2**22 - 1))
@settings(deadline=None)
def test_uniform_draws_the_clients_with_the_smallest_words(
    data: st.DataObject, population: int, seed: int, t: int
) -> None:
    size = data.draw(st.integers(1, population))
    drawn = uniform(size)(population, seed, t)
    assert drawn.dtype == torch.int64
    assert len(set(drawn.tolist())) == size and drawn.min() >= 0 and drawn.max() < population
    assert drawn.tolist() == philox.cohort(seed, t, population, size).tolist()


def test_equal_words_go_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    # All odd clients get the word 0 and all even ones the largest word.
    def words(counter: Tensor, seed: int) -> Tensor:
        return torch.tensor([2**32 - 1, 0, 2**32 - 1, 0]).expand_as(counter)

    monkeypatch.setattr("vecfl.random.philox", words)
    drawn = uniform(1500)(2000, 0, 0).tolist()
    assert drawn == [*range(1, 2000, 2), *range(0, 1000, 2)]


def test_every_client_and_every_pair_is_drawn_equally_often() -> None:
    # 5 of 12 clients in 4,000 rounds: a client takes part with p = 5/12, two of them with
    # p = 5/12 * 4/11, and the first of the cohort is a given client with p = 1/12. The counts are
    # binomial: 12 + 66 + 12 of them leave 6 standard errors with p = 90 * 2e-9 = 1.8e-7 (normal).
    rounds, sample = 4000, uniform(5)
    drawn = torch.stack([sample(12, SEED, t) for t in range(rounds)])
    taken = torch.zeros(rounds, 12, dtype=torch.int64).scatter_(1, drawn, 1)

    def fits(times: int, p: float) -> bool:
        return abs(times - rounds * p) < 6 * sqrt(rounds * p * (1 - p))

    for i in range(12):
        assert fits(int(taken[:, i].sum()), 5 / 12), i
        assert fits(int((drawn[:, 0] == i).sum()), 1 / 12), i
    for i, j in combinations(range(12), 2):
        assert fits(int((taken[:, i] * taken[:, j]).sum()), 5 / 12 * 4 / 11), (i, j)


def test_rounds_are_drawn_independently() -> None:
    # A client is in two rounds in a row with p = (5/12)^2: over 12 clients and 1,999 pairs of
    # rounds that is a sum of 1,999 overlaps with mean 25/12 and the hypergeometric variance
    # 5 * 5/12 * 7/12 * 7/11. Neighbouring overlaps are uncorrelated. 6 standard errors: p = 2e-9.
    drawn = torch.stack([uniform(5)(12, SEED, t) for t in range(2000)])
    taken = torch.zeros(2000, 12).scatter_(1, drawn, 1)
    overlap = (taken[1:] * taken[:-1]).sum(1).double()
    variance = 5 * 5 / 12 * 7 / 12 * 7 / 11
    assert abs(overlap.mean() - 25 / 12) < 6 * sqrt(variance / 1999)


def test_a_cohort_is_a_function_of_seed_and_round() -> None:
    # 20 of 1,000 clients agree by chance with p < 1e-40.
    sample, state = uniform(20), torch.random.get_rng_state()
    first = sample(1000, SEED, 3).tolist()
    others = [sample(1000, SEED, 4), sample(1000, SEED + 1, 3), sample(1000, SEED + 2**32, 3)]
    assert all(set(other.tolist()) != set(first) for other in others)
    torch.manual_seed(0)
    assert sample(1000, SEED, 3).tolist() == uniform(20)(1000, SEED, 3).tolist() == first
    torch.random.set_rng_state(state)
    sample(1000, SEED, 3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_smaller_cohort_is_the_beginning_of_a_larger_one() -> None:
    larger = uniform(30)(30, SEED, 0).tolist()
    assert sorted(larger) == list(range(30))
    assert uniform(7)(30, SEED, 0).tolist() == larger[:7]


def test_a_cohort_larger_than_the_population_is_refused() -> None:
    with pytest.raises(InputError) as error:
        uniform(11)(10, SEED, 0)
    assert str(error.value) == (
        "a cohort of 11 clients is larger than the population of 10; choose at most 10"
    )


@pytest.mark.parametrize("size", [0, -1, 2.0, "3", None])
def test_a_cohort_of_nobody_is_refused(size: Any) -> None:
    with pytest.raises(InputError) as error:
        uniform(size)
    assert str(error.value) == f"a cohort has at least 1 client, not {size!r}"


def test_a_round_outside_of_its_field_is_refused() -> None:
    with pytest.raises(InputError, match=r"^round 4194304 has no random stream of its own"):
        uniform(1)(10, SEED, 2**22)


@pytest.mark.parametrize("t", [0, 5])
def test_everyone_is_all_in_their_order(t: int) -> None:
    cohort = everyone()(4, SEED + t, t)
    assert cohort.dtype == torch.int64 and cohort.tolist() == [0, 1, 2, 3]
