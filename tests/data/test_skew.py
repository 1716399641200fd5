"""Partitioners by size and by the number of classes: promised sizes, counts and laws.

Statistical tests have a fixed seed. The false-alarm probability that they state is over seeds.
"""

import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vecfl.data import classes_per_client, lognormal, natural, power_law, sized_dirichlet
from vecfl.errors import InputError

SEEDS = st.integers(0, 2**63 - 1)
LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=60)
SIZED = [lognormal, power_law]


def table(labels, client, clients):
    """Examples of each label at each client, [clients, labels]."""
    labels = np.unique(np.asarray(labels), return_inverse=True)[1]
    counts = np.zeros((clients, labels.max() + 1), dtype=int)
    np.add.at(counts, (client, labels), 1)
    return counts


def refused(message: str):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


def split(name, labels, clients, seed):
    match name:
        case "lognormal":
            return lognormal(len(labels), clients, 1.0, seed)
        case "power_law":
            return power_law(len(labels), clients, 1.0, seed)
        case "sized_dirichlet":
            sizes = np.full(clients, len(labels) // clients)
            return sized_dirichlet(labels, sizes, 0.5, seed)
        case _:
            return classes_per_client(labels, clients, 2, seed)


NAMES = ["lognormal", "power_law", "sized_dirichlet", "classes_per_client"]

# All of them


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_splits_and_others_do_not(name):
    labels = np.arange(200) % 10
    first = split(name, labels, 8, seed=1)
    assert first.dtype == np.int64 and first.shape == (200,)
    assert np.array_equal(first, split(name, labels, 8, seed=1))
    assert not np.array_equal(first, split(name, labels, 8, seed=2))
    assert not np.array_equal(first, split(name, labels, 8, seed=1 + 2**62))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("seed", "clients"), [(-1, 2), (0.5, 2), (2**63, 2)])
def test_seeds_out_of_range_are_refused(name, seed, clients):
    with pytest.raises(InputError, match="^seed: expected an integer "):
        split(name, np.arange(20) % 2, clients, seed)


@pytest.mark.parametrize("name", ["lognormal", "power_law", "classes_per_client"])
@pytest.mark.parametrize("clients", [0, 2.5])
def test_clients_out_of_range_are_refused(name, clients):
    with refused(f"clients: expected an integer >= 1, got {clients}"):
        split(name, np.arange(20) % 2, clients, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_thousand_clients_take_less_than_a_second(name):
    labels = np.arange(60_000) % 10
    sizes = np.bincount(np.arange(60_000) * 7 % 100_000, minlength=100_000)
    start = time.process_time()  # other programs do not count
    match name:
        case "lognormal":
            client = lognormal(60_000, 100_000, 1.0, 0, min_size=0)
        case "power_law":
            client = power_law(60_000, 100_000, 1.2, 0, min_size=0)
        case "sized_dirichlet":
            client = sized_dirichlet(labels, sizes, 0.3, 0)
        case _:  # every client needs an example of each of its classes
            client = classes_per_client(labels, 30_000, 2, 0)
    assert time.process_time() - start < 1
    assert len(client) == 60_000 and client.min() >= 0 and client.max() < 100_000


# lognormal and power_law


@pytest.mark.parametrize("partitioner", SIZED)
@given(
    st.integers(1, 100),
    st.integers(1, 20),
    st.sampled_from([0, 1e-9, 0.5, 2.0, 50.0, 1e300]),
    SEEDS,
    st.integers(0, 3),
)
@settings(deadline=None)
def test_all_are_assigned_and_the_minimum_is_kept(partitioner, n, clients, skew, seed, min_size):
    if n < clients * min_size:
        with refused(
            f"min_size: {clients} clients of at least {min_size} need {clients * min_size} "
            f"examples, there are {n}; lower min_size or clients"
        ):
            partitioner(n, clients, skew, seed, min_size)
        return
    client = partitioner(n, clients, skew, seed, min_size)
    sizes = np.bincount(client, minlength=clients)
    assert len(sizes) == clients and sizes.sum() == n == len(client)
    assert sizes.min() >= min_size


@pytest.mark.parametrize("partitioner", SIZED)
def test_without_skew_sizes_are_equal(partitioner):
    # 103 = 10 * 10 + 3, and a share of 10.3 is rounded up or down.
    sizes = np.bincount(partitioner(103, 10, 0, seed=3), minlength=10)
    assert sorted(sizes.tolist()) == [10] * 7 + [11] * 3


def test_lognormal_sizes_have_the_law():
    # Logarithms of 5,000 sizes of 200 on average have the standard deviation sigma = 1, with a
    # standard error of 1 / sqrt(10,000); rounding adds below 0.005. Off by 0.055: p < 6e-7. Their
    # skewness is 0, with a standard error sqrt(6 / 5000) = 0.035: 0.2 is more than 5 of it.
    sizes = np.bincount(lognormal(1_000_000, 5000, 1.0, seed=5), minlength=5000)
    logs = np.log(sizes)
    assert abs(logs.std() - 1) < 0.055
    assert abs((((logs - logs.mean()) / logs.std()) ** 3).mean()) < 0.2
    # exp(N(0, 1)) has the mean exp(1/2) and the median 1: the log of the ratio is 1/2. Standard
    # errors: of the mean 1.31 / sqrt(5000), of the median 1.25 / sqrt(5000), together 0.026.
    assert abs(np.log(sizes.mean() / np.median(sizes)) - 0.5) < 0.15


def test_power_law_sizes_by_hand():
    # Ranks 1, 2, 3, 4 to the power -1: 1, 1/2, 1/3, 1/4, in all 25/12. Of 2,500 examples
    # 1200, 600, 400, 300; systematic sampling gives these to the example, give or take one.
    sizes = np.bincount(power_law(2500, 4, 1.0, seed=0), minlength=4)
    assert np.abs(np.sort(sizes) - [300, 400, 600, 1200]).max() <= 1


def test_ranks_and_examples_are_random():
    # Over 2,000 seeds the largest of 4 clients is the first with p = 1/4, as is the client of
    # example 0 (every client has n/4 in expectation). Off by more than 110 from 500:
    # p < 2 exp(-2 * 110^2 / 2000) = 1.2e-5 (Hoeffding) for each of 8 counts.
    splits = [power_law(40, 4, 1.0, seed) for seed in range(2000)]
    first = np.bincount([client[0] for client in splits], minlength=4)
    largest = np.bincount([np.bincount(client).argmax() for client in splits], minlength=4)
    assert (np.abs(first - 500) <= 110).all() and (np.abs(largest - 500) <= 110).all()


@pytest.mark.parametrize(
    ("partitioner", "name"), list(zip(SIZED, ["sigma", "exponent"], strict=True))
)
@pytest.mark.parametrize("skew", [-0.5, float("inf"), float("nan")])
def test_a_skew_out_of_range_is_refused(partitioner, name, skew):
    with refused(f"{name}: expected a finite number of at least 0, got {skew}"):
        partitioner(10, 2, skew, 0)


def test_streams_differ():
    # Without skew both shuffle 0..99; random permutations agree with p = 1 / 100!.
    assert not np.array_equal(lognormal(100, 100, 0, 0), power_law(100, 100, 0, 0))


# sized_dirichlet


@given(
    LABELS,
    st.integers(1, 20),
    st.sampled_from([5e-324, 1e-300, 1e-3, 0.3, 10.0, 1e13, 1e308]),
    SEEDS,
)
@settings(deadline=None)
def test_sizes_are_those_given(labels, clients, alpha, seed):
    sizes = np.bincount(lognormal(len(labels), clients, 1.0, seed, 0), minlength=clients)
    client = sized_dirichlet(labels, sizes, alpha, seed)
    assert np.bincount(client, minlength=clients).tolist() == sizes.tolist()
    assert np.array_equal(client, sized_dirichlet(labels, sizes, alpha, seed))


def test_a_large_alpha_gives_every_client_the_mix_of_all():
    # Classes of 600, 300 and 100; clients of 100, 50 and 850: n_k p_c to within one of rounding,
    # and what is then wanted of a class is off by at most 3, the sum over clients.
    labels = np.repeat(["a", "b", "c"], [600, 300, 100])
    counts = table(labels, sized_dirichlet(labels, [100, 50, 850], 1e9, seed=0), 3)
    mix = [[60, 30, 10], [30, 15, 5], [510, 255, 85]]
    assert np.abs(counts - mix).max() <= 4
    assert counts.sum(1).tolist() == [100, 50, 850] and counts.sum(0).tolist() == [600, 300, 100]


def test_a_tiny_alpha_gives_a_client_one_class_while_there_are_examples():
    # Two clients of 50, classes of 50 each. Where they want different classes, each gets all of
    # its own; where both want one, half of it each, in expectation. Over 200 seeds, "different"
    # has p = 1/2: off by more than 40 from 100 with p < 2 exp(-2 * 40^2 / 200) = 2.3e-7.
    labels = np.arange(100) % 2
    pure = 0
    for seed in range(200):
        counts = table(labels, sized_dirichlet(labels, [50, 50], 1e-9, seed), 2)
        if 50 in counts:
            pure += 1
            continue
        # 50 of the 100 who want the class get it: hypergeometric, 25 +- 2.5; 5 of it are 12.5.
        assert abs(counts[0, 0] - 25) <= 12
    assert abs(pure - 100) <= 40


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_mixes_have_the_right_concentration(alpha):
    # q ~ Dirichlet over C = 5 equal classes has E sum q^2 = (alpha + 1) / (C alpha + 1). Demand for
    # a class of 40,000 has, over 2,000 clients, a relative deviation of sqrt(4 / (5 alpha + 1) /
    # 2000) < 0.037, so below 2 % of the places go to others: they lower sum q^2 by less than
    # 2 * 0.02. 6 standard errors of the mean add less than 6 * 0.32 / sqrt(2000) = 0.043.
    clients, classes, each = 2000, 5, 100
    labels = np.arange(clients * each) % classes
    sizes = np.full(clients, each)
    share = table(labels, sized_dirichlet(labels, sizes, alpha, seed=2), clients) / each
    found, expected = (share**2).sum(1).mean(), (alpha + 1) / (classes * alpha + 1)
    assert -0.083 < found - expected < 0.045


def test_classes_are_wanted_as_often_as_they_occur():
    # With a tiny alpha a client wants one class: the first, of 4/5 of the examples, with p = 4/5.
    # Over 1,000 clients that is off by 76, which is 6 deviations, with p = 2e-9: then 7.6 % of the
    # places go to the other class. If both were wanted equally often, 30 % did.
    labels = np.repeat([0, 1], [80_000, 20_000])
    counts = table(labels, sized_dirichlet(labels, np.full(1000, 100), 1e-9, seed=0), 1000)
    assert counts.max(1).mean() > 92.4


def test_what_nobody_wants_goes_to_all_whose_wish_is_not_met():
    # Four clients of 25, four classes of 25, one wanted by each client. With p = 36/256 two classes
    # are wanted by two clients each; the two others then go to all four, at random. It happens
    # never in 200 seeds with p = 7e-14, and 25 of 50 examples miss a client with p < 1e-6.
    labels = np.arange(100) % 4
    met = 0
    for seed in range(200):
        counts = table(labels, sized_dirichlet(labels, [25] * 4, 1e-9, seed), 4)
        takers = sorted((counts > 0).sum(0).tolist())
        assert takers != [2, 2, 2, 2]
        met += takers == [2, 2, 4, 4]
    assert met


def test_examples_of_a_class_are_random():
    # One class: the client of example 0 is the first of two with p = 1/5. Over 1,000 seeds off by
    # more than 90 from 200 with p < 2 exp(-2 * 90^2 / 1000) = 1.8e-7.
    hits = sum(int(sized_dirichlet([0] * 10, [2, 8], 1.0, seed)[0] == 0) for seed in range(1000))
    assert abs(hits - 200) <= 90


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "expected one integer for each client, got shape [0] of float64"),
        ([1.0, 2.0], "expected one integer for each client, got shape [2] of float64"),
        ([[3]], "expected one integer for each client, got shape [1, 1] of int64"),
        ([2, 2], "expected numbers >= 0 that add up to 3, the number of labels, got a sum of 4 and "
                 "a smallest of 2"),
        ([4, -1], "expected numbers >= 0 that add up to 3, the number of labels, got a sum of 3 "
                  "and a smallest of -1"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with refused(f"sizes: {message}"):
        sized_dirichlet([0, 1, 1], sizes, 1.0, 0)


@pytest.mark.parametrize("alpha", [0, -1.0, float("inf"), float("nan")])
def test_an_alpha_out_of_range_is_refused(alpha):
    with refused(f"alpha: expected a positive, finite number, got {alpha}"):
        sized_dirichlet([0, 1], [1, 1], alpha, 0)


# classes_per_client


@given(LABELS, st.integers(1, 30), st.integers(1, 6), SEEDS)
@settings(deadline=None, max_examples=300)
def test_every_client_has_exactly_that_many_classes(labels, clients, classes, seed):
    supply = np.unique(labels, return_counts=True)[1]
    most, needed = np.minimum(supply, clients).sum(), clients * classes
    if classes > len(supply) or not len(supply) <= needed <= most:
        with pytest.raises(InputError, match="^classes: "):
            classes_per_client(labels, clients, classes, seed)
        return
    client = classes_per_client(labels, clients, classes, seed)
    counts = table(labels, client, clients)
    assert ((counts > 0).sum(1) == classes).all()
    assert counts.sum() == len(labels) == len(client)
    owners = (counts > 0).sum(0)
    for column, number in zip(counts.T, owners, strict=True):  # shared out evenly
        assert column[column > 0].max() - column[column > 0].min() <= 1
        # A class with two owners less than another has as many as it can.
        assert owners.max() - number <= 1 or number == min(column.sum(), clients)


def test_balanced_classes_have_equally_many_owners_and_clients_equal_sizes():
    # 100 clients * 2 = 200 places: each of 10 classes has 20 owners, who get 6,000 / 20 = 300.
    labels = np.arange(60_000) % 10
    counts = table(labels, classes_per_client(labels, 100, 2, seed=1), 100)
    assert set(counts.flatten().tolist()) == {0, 300}
    assert ((counts > 0).sum(0) == 20).all()


def test_pairs_of_classes_are_random():
    # 3,000 clients with 2 of 6 classes, 1,000 owners each: each of 15 pairs has 200 clients in
    # expectation, with a deviation below sqrt(3000 / 15) = 14.2; 85 is 6 of it: p < 15 * 2e-9.
    labels = np.arange(60_000) % 6
    owns = (table(labels, classes_per_client(labels, 3000, 2, seed=0), 3000) > 0).astype(int)
    pairs = (owns.T @ owns)[np.triu_indices(6, 1)]
    assert pairs.sum() == 3000 and np.abs(pairs - 200).max() < 85


def test_who_owns_what_and_gets_which_example_is_random():
    # 4 clients, 2 of 4 classes: client 0 owns class 0 with p = 1/2; the client of example 0 is
    # the first with p = 1/4. Over 1,000 seeds off by more than 90: p < 1.8e-7 each (Hoeffding).
    labels = np.arange(40) % 4
    splits = [classes_per_client(labels, 4, 2, seed) for seed in range(1000)]
    assert abs(sum((client[::4] == 0).any() for client in splits) - 500) <= 90
    assert abs(sum(client[0] == 0 for client in splits) - 250) <= 90
    # Two clients share three examples: the first has two of them with p = 1/2.
    more = sum((classes_per_client([0] * 3, 2, 1, seed) == 0).sum() == 2 for seed in range(1000))
    assert abs(more - 500) <= 90


def test_classes_that_do_not_fit_are_refused():
    with refused("classes: expected an integer >= 1, got 0"):
        classes_per_client([0, 1], 2, 0, 0)
    with refused("classes: 3 at every client, but labels have 2"):
        classes_per_client([0, 1, 0], 1, 3, 0)
    with refused(
        "classes: 2 clients * 1 leave some of the 3 classes without a client; "
        "raise classes or clients"
    ):
        classes_per_client([0, 1, 2], 2, 1, 0)
    with refused(
        "classes: 3 clients * 2 need 6 examples of different classes at a client, the labels allow "
        "5; lower classes or clients"  # 3 clients can share the 9 examples of 0, and 2 those of 1
    ):
        classes_per_client([0] * 9 + [1] * 2, 3, 2, 0)


# natural


def test_natural_clients_are_the_values_in_order():
    assert natural(["eve", "ann", "eve", "bob"]).tolist() == [2, 0, 2, 1]
    assert natural(np.array([30, -1, 30], dtype=np.int32)).tolist() == [1, 0, 1]
    assert natural([7]).dtype == np.int64
    with refused("column: expected n > 0 integers or strings, got shape [2] of float64"):
        natural([0.5, 1.5])
