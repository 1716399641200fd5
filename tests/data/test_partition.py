"""Partitioners: every example exactly once, promised sizes, determinism, and the promised law.

Statistical tests have a fixed seed. The false-alarm probability that they state is over seeds.
"""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vecfl.data import FederatedDataset, dirichlet, iid, shards
from vecfl.errors import InputError

SEEDS = st.integers(0, 2**63 - 1)
LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=60)


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
        case "iid":
            return iid(len(labels), clients, seed)
        case "dirichlet":
            return dirichlet(labels, clients, 0.5, seed)
        case _:
            return shards(labels, clients, seed=seed)


# All of them


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards"])
def test_equal_seeds_give_equal_splits_and_others_do_not(name):
    labels = np.arange(200) % 10
    first = split(name, labels, 8, seed=1)
    assert first.dtype == np.int64 and first.shape == (200,)
    assert np.array_equal(first, split(name, labels, 8, seed=1))
    assert not np.array_equal(first, split(name, labels, 8, seed=2))
    assert not np.array_equal(first, split(name, labels, 8, seed=1 + 2**62))


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards"])
def test_a_split_composes_with_from_arrays(name):
    labels = np.arange(60) % 3
    client = split(name, labels, 6, seed=4)
    arrays = {"y": labels, "row": np.arange(60)}
    dataset = FederatedDataset.from_arrays(arrays, client, num_clients=6)
    assert sorted(dataset.columns["row"].tolist()) == list(range(60))
    assert dataset.sizes.tolist() == np.bincount(client, minlength=6).tolist()
    assert dataset.client(5)["row"].tolist() == np.flatnonzero(client == 5).tolist()


def test_streams_differ_between_partitioners():
    # Each is the first permutation of 100 in its stream; random ones agree with p = 1 / 100!.
    assert not np.array_equal(iid(100, 100, 0), shards(np.arange(100), 100, 1, seed=0))


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards"])
@pytest.mark.parametrize(
    ("clients", "seed", "message"),
    [
        (0, 0, "clients: expected an integer >= 1, got 0"),
        (2.5, 0, "clients: expected an integer >= 1, got 2.5"),
        (2, -1, "seed: expected an integer >= 0, got -1"),
        (2, 0.5, "seed: expected an integer >= 0, got 0.5"),
        (2, 2**63, "seed: expected an integer below 2^63, got 9223372036854775808"),
    ],
)
def test_clients_and_seed_out_of_range_are_refused(name, clients, seed, message):
    with refused(message):
        split(name, np.arange(20) % 2, clients, seed)


@pytest.mark.parametrize("name", ["dirichlet", "shards"])
@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([], "shape [0] of float64"),
        ([[1, 2], [3, 4]], "shape [2, 2] of int64"),
        ([0.5, 1.5], "shape [2] of float64"),
        (3, "shape [] of int64"),
        ([None, "a"], "shape [2] of object"),
    ],
)
def test_labels_that_are_no_classes_are_refused(name, labels, found):
    with refused(f"labels: expected n > 0 integers or strings, got {found}"):
        dirichlet(labels, 1, 1.0, 0) if name == "dirichlet" else shards(labels, 1, seed=0)


@pytest.mark.parametrize(
    "labels",
    [
        ["c", "a", "b", "a", "c", "b"],
        torch.tensor([2, 0, 1, 0, 2, 1]),
        np.array([2, 0, 1, 0, 2, 1], dtype=np.uint8),
        np.array(["c", "a", "b", "a", "c", "b"], dtype=object),
    ],
)
def test_only_the_order_of_labels_matters(labels):
    plain = [20, -3, 7, -3, 20, 7]
    assert np.array_equal(dirichlet(labels, 3, 0.5, 9), dirichlet(plain, 3, 0.5, 9))
    assert np.array_equal(shards(labels, 3, seed=9), shards(plain, 3, seed=9))


# iid


@given(st.integers(1, 200), st.integers(1, 50), SEEDS)
@settings(deadline=None)
def test_iid_sizes_differ_by_at_most_one(n, clients, seed):
    sizes = np.bincount(iid(n, clients, seed), minlength=clients)
    assert len(sizes) == clients and sizes.sum() == n
    assert sizes.max() - sizes.min() <= 1


def test_iid_gives_an_example_to_every_client_equally_often():
    # Over 2,000 seeds the first of 8 examples is at the first of 4 clients Binomial(2000, 1/4)
    # times. Off by more than 110 from 500: p < 2 exp(-2 * 110^2 / 2000) = 1.2e-5 (Hoeffding),
    # times 4 clients.
    times = np.bincount([iid(8, 4, seed)[0] for seed in range(2000)], minlength=4)
    assert (np.abs(times - 500) <= 110).all()


def test_iid_refuses_no_examples():
    with refused("n: expected an integer >= 1, got 0"):
        iid(0, 3, 0)


# dirichlet


@given(
    LABELS,
    st.integers(1, 20),
    st.sampled_from([5e-324, 1e-300, 1e-6, 1e-3, 0.1, 1.0, 100.0, 1e6, 1e308]),
    SEEDS,
    st.integers(0, 3),
)
@settings(deadline=None)
def test_dirichlet_assigns_all_and_keeps_the_minimum(labels, clients, alpha, seed, min_size):
    if len(labels) < clients * min_size:
        with pytest.raises(InputError, match="^min_size: "):
            dirichlet(labels, clients, alpha, seed, min_size)
        return
    client = dirichlet(labels, clients, alpha, seed, min_size)
    sizes = np.bincount(client, minlength=clients)
    assert len(sizes) == clients and sizes.sum() == len(labels) == len(client)
    assert sizes.min() >= min_size
    assert np.array_equal(client, dirichlet(labels, clients, alpha, seed, min_size))


@given(LABELS, st.integers(1, 20), st.sampled_from([1e-3, 0.3, 10.0]), SEEDS, st.integers(1, 3))
@settings(deadline=None)
def test_filling_up_takes_only_from_the_largest(labels, clients, alpha, seed, min_size):
    min_size = min(min_size, len(labels) // clients)
    before_client = dirichlet(labels, clients, alpha, seed, min_size=0)
    after_client = dirichlet(labels, clients, alpha, seed, min_size)
    before = np.bincount(before_client, minlength=clients)
    after = np.bincount(after_client, minlength=clients)
    poor, gave = before < min_size, after < before
    assert (after[poor] == min_size).all()  # filled up, and no further
    assert (after[~poor & ~gave] == before[~poor & ~gave]).all()
    if gave.any():  # one level for all: those who gave end at it or one above, no other is higher
        assert after[gave].max() - after[gave].min() <= 1
        assert before[~gave].max(initial=0) <= after[gave].min() + 1
    moved = before_client != after_client
    assert moved.sum() == np.maximum(min_size - before, 0).sum()  # no example moves in vain
    assert poor[after_client[moved]].all() and gave[before_client[moved]].all()


def test_dirichlet_with_a_large_alpha_deals_every_class_evenly():
    # A share is 1/10 to within a few 1e-5 of itself, so 103 examples of a class give every client
    # 10.3, rounded up or down. The level of fit is far from any boundary: no false alarm.
    labels = np.repeat(np.arange(5), 103)
    counts = table(labels, dirichlet(labels, 10, alpha=1e9, seed=0), 10)
    assert set(counts.flatten().tolist()) == {10, 11}
    assert (counts == 11).sum(0).tolist() == [3] * 5  # 103 = 10 * 10 + 3


@pytest.mark.parametrize("alpha", [1e-9, 1e-300, 5e-324])
def test_dirichlet_with_a_tiny_alpha_gives_a_class_to_one_client(alpha):
    # log Gamma(alpha) variables are -e / alpha up to O(1), e exponential; the two smallest of 20
    # values e are Exp(20) apart. A second client gets an example of 100 if they are closer than
    # about 10 alpha: p = 200 alpha = 2e-7 per class at 1e-9, and below 1e-5 for 50 classes.
    labels = np.repeat(np.arange(50), 100)
    client = dirichlet(labels, 20, alpha, seed=2, min_size=0)
    counts = table(labels, client, 20)
    assert ((counts == 100).sum(0) == 1).all()
    # 50 classes miss 11 or more of 20 clients with p < C(20, 9) (9/20)^50 = 8e-13.
    assert (counts.sum(1) > 0).sum() >= 10


@pytest.mark.parametrize("alpha", [0.01, 0.3, 1.0, 10.0])
def test_dirichlet_shares_have_the_right_concentration(alpha):
    # sum_k p_k^2 has the mean (alpha + 1) / (N alpha + 1). Over 5,000 classes their mean is off by
    # 6 standard errors with p = 2e-9 (normal). Rounding 100 p_k without bias adds between 0 and
    # N * 0.25 / 100^2 = 1.3e-4.
    clients, classes, each = 5, 5000, 100
    labels = np.repeat(np.arange(classes), each)
    share = table(labels, dirichlet(labels, clients, alpha, seed=7), clients) / each
    expected = (alpha + 1) / (clients * alpha + 1)
    found = (share**2).sum(0)
    assert abs(found.mean() - expected) < 6 * found.std() / classes**0.5 + 1.3e-4
    # The mean share of a client is 1/N: off by 0.04 with p < 2 exp(-2 * 5000 * 0.04^2) = 2.3e-7.
    assert np.abs(share.mean(1) - 1 / clients).max() < 0.04


def test_dirichlet_shuffles_within_a_class():
    # One class, two clients, shares near 1/2: the client of example 0 is a fair coin. Over 1,000
    # seeds it is off by more than 90 from 500 with p < 2 exp(-2 * 90^2 / 1000) = 1.8e-7.
    labels = np.zeros(10, dtype=int)
    heads = sum(int(dirichlet(labels, 2, 1e6, seed)[0]) for seed in range(1000))
    assert abs(heads - 500) <= 90


def test_dirichlet_for_a_hundred_thousand_clients():
    labels = np.arange(60_000) % 10
    client = dirichlet(labels, 100_000, alpha=0.1, seed=0, min_size=0)
    sizes = np.bincount(client, minlength=100_000)
    assert sizes.shape == (100_000,) and sizes.sum() == 60_000
    # A client has an example of a class with q = E min(1, 6000 p_k), p_k = g / 10,000 up to 1 % and
    # g ~ Gamma(0.1): q = 0.6 * 0.1 P(Gamma(1.1) < 5/3) + P(g > 5/3) = 0.0559. At least one of ten
    # classes: 43,733 clients in expectation. The deviation is below 160, so 1,500 is 9 of it.
    a, b = torch.special.gammainc(torch.tensor([1.1, 0.1]), torch.tensor(5 / 3)).tolist()
    expected = 100_000 * (1 - (1 - (0.06 * a + 1 - b)) ** 10)
    assert round(expected, -2) == 43_700
    assert abs((sizes > 0).sum() - expected) < 1500


def test_as_many_examples_as_the_minimum_needs_leaves_no_freedom():
    labels = np.arange(60_000) % 10
    client = dirichlet(labels, 20_000, alpha=0.01, seed=0, min_size=3)
    assert (np.bincount(client, minlength=20_000) == 3).all()


@pytest.mark.parametrize("alpha", [0, -1.0, float("inf"), float("nan")])
def test_dirichlet_refuses_an_alpha_out_of_range(alpha):
    with refused(f"alpha: expected a positive, finite number, got {alpha}"):
        dirichlet([0, 1], 2, alpha, 0)


def test_dirichlet_refuses_a_minimum_that_cannot_be_met():
    with refused(
        "min_size: 4 clients of at least 3 need 12 examples, there are 11; "
        "lower min_size or clients"
    ):
        dirichlet(np.zeros(11, dtype=int), 4, 1.0, 0, min_size=3)
    with refused("min_size: expected an integer >= 0, got -1"):
        dirichlet([0, 1], 2, 1.0, 0, min_size=-1)


# shards


def test_one_shard_of_one_class_each():
    # Sorted: 0 0 1 1 2 2 3 3, cut into 4 shards of 2: every client has one class, both examples.
    labels = [3, 0, 2, 1, 0, 3, 1, 2]
    counts = table(labels, shards(labels, 4, 1, seed=0), 4)
    assert sorted(counts.tolist(), reverse=True) == np.diag([2, 2, 2, 2]).tolist()


def test_two_shards_of_one_class_each():
    labels = [3, 0, 2, 1, 0, 3, 1, 2]
    counts = table(labels, shards(labels, 2, seed=0), 2)
    assert sorted(counts[0].tolist()) == [0, 0, 2, 2]
    assert (counts.sum(0) == 2).all() and (counts.max(0) == 2).all()


def test_the_split_of_mcmahan():
    # 60,000 examples of 10 classes, 200 shards of 300, 2 to each of 100 clients: 600 each; a class
    # of 6,000 is 20 whole shards, so a client has at most 2 classes.
    labels = np.arange(60_000) % 10
    counts = table(labels, shards(labels, 100, seed=1), 100)
    assert (counts.sum(1) == 600).all()
    assert set(counts.flatten().tolist()) <= {0, 300, 600}


@given(LABELS, st.integers(1, 20), st.integers(1, 4), SEEDS)
@settings(deadline=None)
def test_shards_are_runs_of_the_sorted_order_of_nearly_equal_size(labels, clients, per, seed):
    n, count = len(labels), clients * per
    if count > n:
        with refused(
            f"per_client: {clients} clients * {per} need {count} shards, there are {n} examples; "
            "lower per_client or clients"
        ):
            shards(labels, clients, per, seed=seed)
        return
    client = shards(labels, clients, per, seed=seed)
    sizes = np.bincount(client, minlength=clients)
    assert len(sizes) == clients and sizes.sum() == n
    # A shard has floor(n / count) examples or one more.
    assert sizes.min() >= per * (n // count) and sizes.max() <= per * -(-n // count)
    # In the sorted order the client changes at most count - 1 times.
    runs = client[np.argsort(labels, kind="stable")]
    assert (runs[1:] != runs[:-1]).sum() <= count - 1


def test_shards_for_a_hundred_thousand_clients():
    client = shards(np.arange(200_000) % 10, 100_000, seed=0)
    assert (np.bincount(client, minlength=100_000) == 2).all()


def test_shards_refuses_no_shards():
    with refused("per_client: expected an integer >= 1, got 0"):
        shards([0, 1], 2, 0, seed=0)
