"""The schedule: plans counted out by hand, and list scheduling held to its guarantees."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vecfl.errors import InputError
from vecfl.schedule import Batches, Plan, assign, make_plan

# Batches


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "Batches(size=0): must be an integer of at least 1"),
        ({"size": -3}, "Batches(size=-3): must be an integer of at least 1"),
        ({"size": 2.0}, "Batches(size=2.0): must be an integer of at least 1"),
        ({"size": 2, "epochs": 0}, "Batches(epochs=0): must be an integer of at least 1"),
        ({"size": 2, "epochs": 1.5}, "Batches(epochs=1.5): must be an integer of at least 1"),
        ({"size": 2, "steps": 0}, "Batches(steps=0): must be an integer of at least 1"),
        ({"size": 2, "steps": "9"}, "Batches(steps='9'): must be an integer of at least 1"),
        (
            {"size": 2, "max_examples": 0},
            "Batches(max_examples=0): must be an integer of at least 1",
        ),
        ({"size": 2, "epochs": 1, "steps": 1}, "Batches takes epochs or steps, not both"),
        ({"size": 2, "last": "pad"}, "Batches(last='pad'): must be keep, drop or wrap"),
        (
            {"size": 2, "last": "drop", "full": True},
            "Batches(last='drop'): a full batch keeps every example",
        ),
        (
            {"size": 2, "last": "wrap", "full": True},
            "Batches(last='wrap'): a full batch keeps every example",
        ),
    ],
)
def test_work_that_makes_no_sense_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        Batches(**fields)
    assert str(error.value) == message


# Plans: B = 4 and clients of 0, 1, B - 1, B, B + 1 and 2 B + 3 examples

SIZES = (0, 1, 3, 4, 5, 11)


def plan_of(batches: Batches, sizes: tuple[int, ...] = SIZES) -> Plan:
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return make_plan(batches, offsets, torch.arange(len(sizes)))


@pytest.mark.parametrize(
    ("fields", "kept", "n", "per_epoch", "steps"),
    [
        # A short last batch is a batch: ceil(n / 4); the default is one epoch.
        ({}, SIZES, SIZES, (0, 1, 1, 1, 2, 3), (0, 1, 1, 1, 2, 3)),
        ({"epochs": 2}, SIZES, SIZES, (0, 1, 1, 1, 2, 3), (0, 2, 2, 2, 4, 6)),
        # Dropped: floor(n / 4), and n is what these visit.
        (
            {"epochs": 2, "last": "drop"},
            SIZES,
            (0, 0, 0, 4, 4, 8),
            (0, 0, 0, 1, 1, 2),
            (0, 0, 0, 2, 2, 4),
        ),
        # Wrapped: as many batches as kept, and n does not count an example twice.
        ({"epochs": 2, "last": "wrap"}, SIZES, SIZES, (0, 1, 1, 1, 2, 3), (0, 2, 2, 2, 4, 6)),
        # Steps: the same for all who have a batch.
        ({"steps": 5}, SIZES, SIZES, (0, 1, 1, 1, 2, 3), (0, 5, 5, 5, 5, 5)),
        (
            {"steps": 5, "last": "drop"},
            SIZES,
            (0, 0, 0, 4, 4, 8),
            (0, 0, 0, 1, 1, 2),
            (0, 0, 0, 5, 5, 5),
        ),
        # Full batch: an optimizer step is an epoch, counted here in its batches of 4.
        ({"epochs": 2, "full": True}, SIZES, SIZES, (0, 1, 1, 1, 2, 3), (0, 2, 2, 2, 4, 6)),
        ({"steps": 3, "full": True}, SIZES, SIZES, (0, 1, 1, 1, 2, 3), (0, 3, 3, 3, 6, 9)),
        # A cap of 4 is all of 4 and cuts 5 and 11; a cap of 6 cuts 11 only.
        (
            {"max_examples": 4},
            (0, 1, 3, 4, 4, 4),
            (0, 1, 3, 4, 4, 4),
            (0, 1, 1, 1, 1, 1),
            (0, 1, 1, 1, 1, 1),
        ),
        (
            {"max_examples": 6, "last": "drop", "epochs": 3},
            (0, 1, 3, 4, 5, 6),
            (0, 0, 0, 4, 4, 4),
            (0, 0, 0, 1, 1, 1),
            (0, 0, 0, 3, 3, 3),
        ),
    ],
)
def test_plan_by_hand(
    fields: dict,
    kept: tuple[int, ...],
    n: tuple[int, ...],
    per_epoch: tuple[int, ...],
    steps: tuple[int, ...],
) -> None:
    plan = plan_of(Batches(4, **fields))
    assert tuple(plan.total) == SIZES
    assert tuple(plan.kept) == kept
    assert tuple(plan.n) == n
    assert tuple(plan.per_epoch) == per_epoch
    assert tuple(plan.steps) == steps


def test_a_plan_follows_the_cohort() -> None:
    # Clients of 0, 1, 3, 4, 5, 11 examples begin at 0, 0, 1, 4, 8, 13.
    offsets = torch.tensor([0, *SIZES]).cumsum(0)
    plan = make_plan(Batches(4), offsets, torch.tensor([5, 0, 2]))
    assert plan.client.tolist() == [5, 0, 2]
    assert plan.first.tolist() == [13, 0, 1]
    assert plan.total.tolist() == [11, 0, 3]
    assert plan.steps.tolist() == [3, 0, 1]
    assert plan.run.tolist() == [0, 0, 0]


# Slots

STEPS = st.lists(st.integers(0, 12), max_size=12)
SLOTS = st.integers(1, 5)


def test_longest_first_by_hand() -> None:
    # In order of length: client 1 (5 steps) takes slot 0 until 5, client 4 (4) slot 1 until 4,
    # client 2 (3) slot 1 until 7, client 0 (2) slot 0 until 7; both are free at 7, and client 5 (1)
    # takes the first of them. Client 3 has nothing to do.
    slot, begin = assign(np.array([2, 5, 3, 0, 4, 1]), 2)
    assert slot.tolist() == [0, 0, 1, -1, 1, 0]
    assert begin[slot >= 0].tolist() == [5, 0, 4, 0, 7]


def test_equal_clients_go_in_the_order_of_the_cohort() -> None:
    slot, begin = assign(np.full(5, 3), 2)
    assert slot.tolist() == [0, 1, 0, 1, 0]
    assert begin.tolist() == [0, 0, 3, 3, 6]


@pytest.mark.parametrize("count", [20, 100])
def test_ties_are_broken_by_position(count: int) -> None:
    # One slot: who is longer goes first, among equals who comes first in the cohort.
    steps = np.arange(count) % 2 + 1
    _, begin = assign(steps, 1)
    order = [*range(1, count, 2), *range(0, count, 2)]
    assert np.argsort(begin).tolist() == order


def test_a_longest_first_schedule_need_not_be_optimal() -> None:
    # Graham's tight case for two slots: 3 + 3 and 2 + 2 + 2 would end at 6; longest first puts
    # 3, 2, 2 on one slot and 3, 2 on the other and ends at 7 = (4/3 - 1/6) * 6.
    steps = np.array([3, 3, 2, 2, 2])
    slot, begin = assign(steps, 2)
    assert (begin + steps).max() == 7
    assert sorted(np.bincount(slot, weights=steps).tolist()) == [5, 7]


@pytest.mark.parametrize(("steps", "slots"), [([], 3), ([0, 0], 1)])
def test_nobody_has_work(steps: list[int], slots: int) -> None:
    slot, begin = assign(np.array(steps, dtype=np.int64), slots)
    assert slot.tolist() == [-1] * len(steps) and len(begin) == len(steps)


def occupancy(steps: np.ndarray, slot: np.ndarray, begin: np.ndarray, slots: int) -> np.ndarray:
    """How many clients sit in each slot at each step, [steps until the last ends, slots]."""
    seats = np.zeros((int((begin + steps)[slot >= 0].max(initial=0)), slots), int)
    for c in np.flatnonzero(slot >= 0):
        seats[begin[c] : begin[c] + steps[c], slot[c]] += 1
    return seats


@given(STEPS, SLOTS)
@settings(deadline=None)
def test_every_client_is_placed_once_and_nobody_waits_for_an_idle_slot(
    lengths: list[int], slots: int
) -> None:
    steps = np.array(lengths, dtype=np.int64)
    slot, begin = assign(steps, slots)
    assert ((slot >= 0) == (steps > 0)).all() and slot.max(initial=-1) < slots
    seats = occupancy(steps, slot, begin, slots)
    assert seats.max(initial=0) <= 1  # with the sum: all steps of all clients, none on another
    assert seats.sum() == steps.sum()
    for c in np.flatnonzero(steps):
        assert (seats[: begin[c]] == 1).all()  # all slots are busy until c begins
        assert (begin[steps > steps[c]] <= begin[c]).all()  # no longer client waits behind it


def shortest(lengths: list[int], slots: int) -> int:
    """The least makespan, by trying every slot for every client."""
    loads = {(0,) * slots}
    for length in lengths:
        loads = {
            tuple(sorted(load[:s] + (load[s] + length,) + load[s + 1 :]))
            for load in loads
            for s in range(slots)
        }
    return min(map(max, loads))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 4))
@settings(deadline=None)
def test_makespan_is_within_grahams_bound(lengths: list[int], slots: int) -> None:
    # Graham 1969, theorem 2: longest first ends at most at (4/3 - 1/(3 S)) times the optimum.
    steps = np.array(lengths)
    _, begin = assign(steps, slots)
    end, best = int((begin + steps).max()), shortest(lengths, slots)
    assert max(max(lengths), -(-sum(lengths) // slots)) <= best <= end
    assert 3 * slots * end <= (4 * slots - 1) * best
