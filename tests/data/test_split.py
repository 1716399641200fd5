"""Held-out clients and examples: nothing is lost or doubled, and what stays with whom."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vecfl.data import FederatedDataset, hold_out
from vecfl.errors import InputError

SEEDS = st.integers(0, 2**63 - 1)
SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)


def dataset(sizes, ids=()):
    """Clients of these sizes; column "row" numbers the examples."""
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return FederatedDataset({"row": torch.arange(sum(sizes))}, offsets, ids)


def by_id(data):
    """{client id: rows}, nothing for None."""
    if data is None:
        return {}
    return {id_: data.client(k)["row"].tolist() for k, id_ in enumerate(data.client_ids)}


def refused(message: str):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


@given(SIZES, SEEDS, st.sampled_from([None, 1, 2, 0.3]), st.sampled_from([None, 0.1, 0.5, 0.99]))
@settings(deadline=None, max_examples=300)
def test_every_example_is_in_one_part_with_its_client(sizes, seed, clients, samples):
    whole = dataset(sizes, [f"client {k}" for k in range(len(sizes))])
    try:
        split = hold_out(whole, seed, clients=clients, samples=samples)
    except InputError:
        return
    assert (split.test_clients is None, split.test_samples is None) == (
        *(clients is None, samples is None),
    )
    train, same, unseen = map(by_id, (split.train, split.test_samples, split.test_clients))
    assert not set(train) & set(unseen) and set(same) <= set(train)
    assert [id_ for id_ in by_id(whole) if id_ in train] == list(train)  # the order stays
    for id_, rows in by_id(whole).items():
        parts = [train.get(id_, []), same.get(id_, []), unseen.get(id_, [])]
        assert sorted(sum(parts, [])) == rows and all(part == sorted(part) for part in parts)
        assert id_ in unseen or parts[0] or not rows  # at least one example stays for training
        if id_ in train and samples is not None:  # rounded up or down
            most = max(len(rows) - 1, 0)
            assert int(samples * len(rows)) <= len(parts[1]) + (len(rows) - 1 == len(parts[1]))
            assert len(parts[1]) <= min(int(samples * len(rows)) + 1, most)


def test_numbers_and_fractions_of_clients():
    data = dataset([2] * 10)
    for clients, held in ((3, 3), (0.3, 3), (9, 9), (0.94, 9), (np.int64(1), 1)):
        split = hold_out(data, 0, clients=clients)
        assert split.test_clients.num_clients == held
        assert split.train.num_clients == 10 - held
        assert split.test_samples is None


def test_fractions_of_samples_by_hand():
    # 0.25 of 8 is 2 exactly, of 2 it is 0 or 1, and of 1 and 0 nothing can go.
    train, same = (dataset([8, 2, 1, 0]), None)
    held = []
    for seed in range(1000):
        split = hold_out(train, seed, samples=0.25)
        same = split.test_samples.sizes.tolist()
        assert split.train.sizes.tolist() == [8 - same[0], 2 - same[1], 1, 0]
        assert same[0] == 2 and same[2:] == [0, 0]
        held.append(same[1])
    # 0.5 examples of client 1 in the mean: off by more than 90 of 1,000 with
    # p < 2 exp(-2 * 90^2 / 1000) = 1.8e-7 (Hoeffding).
    assert abs(sum(held) - 500) <= 90


def test_clients_and_samples_are_held_out_at_random():
    # Client 0 of 4 is one of 2 held out with p = 1/2, and example 0 of 4 one of 2: each off by more
    # than 90 of 1,000 seeds with p < 1.8e-7 (Hoeffding).
    data = dataset([4] * 4)
    splits = [hold_out(data, seed, clients=2, samples=0.5) for seed in range(1000)]
    assert abs(sum(0 in by_id(split.test_clients) for split in splits) - 500) <= 90
    samples = [hold_out(data, seed, samples=0.5).test_samples for seed in range(1000)]
    assert abs(sum(0 in by_id(part)[0] for part in samples) - 500) <= 90


def test_seeds_and_streams():
    data = dataset([20] * 30)
    one, again, other = (hold_out(data, seed, clients=0.5, samples=0.5) for seed in (1, 1, 2))
    for part in ("train", "test_samples", "test_clients"):
        assert by_id(getattr(one, part)) == by_id(getattr(again, part))
        assert by_id(getattr(one, part)) != by_id(getattr(other, part))
    # Which examples a client keeps does not depend on which clients are held out.
    alone = by_id(hold_out(data, 1, samples=0.5).test_samples)
    assert by_id(one.test_samples).items() <= alone.items()


def test_ids_and_dtypes_are_kept():
    columns = {"x": torch.arange(12, dtype=torch.uint8).view(6, 2), "y": torch.ones(6)}
    data = FederatedDataset(columns, torch.tensor([0, 2, 4, 6]), ["ann", "bob", "eve"])
    split = hold_out(data, 4, clients=1, samples=0.5)
    assert {*split.train.client_ids, *split.test_clients.client_ids} == {"ann", "bob", "eve"}
    assert split.test_samples.client_ids == split.train.client_ids
    for part in (split.train, split.test_samples, split.test_clients):
        assert part.columns["x"].dtype == torch.uint8 and part.columns["x"].shape[1:] == (2,)
        assert part.columns["y"].dtype == torch.float32
    assert hold_out(dataset([2, 2]), 0, samples=0.5).train.client_ids == range(2)


@pytest.mark.parametrize("clients", [0, 3, 4, -1, 1.5, 0.1, 0.9, 1.0, "2"])
def test_numbers_of_clients_out_of_range_are_refused(clients):
    with pytest.raises(InputError, match="^clients: expected "):
        hold_out(dataset([2, 2, 2]), 0, clients=clients)


def test_the_lines_that_refuse():
    data = dataset([1, 1, 0])
    with refused("nothing to hold out: give clients, samples, or both"):
        hold_out(data, 0)
    with refused(
        "clients: expected a number or a fraction that holds out 1 to 2 of the 3 clients, got 3"
    ):
        hold_out(data, 0, clients=3)
    with refused(
        "clients: there is one client, which must train: get more clients, or hold out examples of "
        "it (samples=)"
    ):
        hold_out(dataset([4]), 0, clients=0.2)
    for samples in (0, 1, 2, -0.5, float("nan")):
        with refused(f"samples: expected a fraction in (0, 1), got {samples}"):
            hold_out(data, 0, samples=samples)
    with refused("the split leaves no example as held-out data: hold out more or less"):
        hold_out(data, 0, samples=0.9)  # both clients need their only example
    with refused("the split leaves no example as training data: hold out more or less"):
        hold_out(dataset([0, 0, 3]), 1, clients=2, samples=0.5)
    with refused("seed: expected an integer >= 0, got -1"):
        hold_out(data, -1, clients=1)
