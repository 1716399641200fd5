"""The schedule: plans counted out by hand, and list scheduling held to its guarantees."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vecfl.errors import InputError
from vecfl.schedule import Batches, Plan, assign, make_plan
from vecfl.work import random_epochs

from .oracles import philox

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
        (
            {"size": 2, "epochs": [1, -2]},
            "Batches(epochs): expected an integer of at least 0 for each client, got -2 for client "
            "1",
        ),
        (
            {"size": 2, "steps": [0.5, 1]},
            "Batches(steps): expected an integer of at least 0 for each client, got torch.float32 "
            "[2]",
        ),
        (
            {"size": 2, "epochs": torch.ones(2, 2, dtype=torch.int64)},
            "Batches(epochs): expected an integer of at least 0 for each client, got torch.int64 "
            "[2, 2]",
        ),
        (
            {"size": 2, "epochs": ["a"]},
            "Batches(epochs): expected an integer of at least 0 for each client, got ['a']",
        ),
        ({"size": 2, "max_tokens": 3}, "Batches takes max_tokens and tokens, one with the other"),
        ({"size": 2, "tokens": [3]}, "Batches takes max_tokens and tokens, one with the other"),
        (
            {"size": 2, "max_tokens": 0, "tokens": [3]},
            "Batches(max_tokens=0): must be an integer of at least 1",
        ),
        (
            {"size": 2, "max_tokens": 3, "tokens": [True]},
            "Batches(tokens): expected an integer of at least 0 for each example, got torch.bool "
            "[1]",
        ),
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
    return make_plan(batches, offsets, torch.arange(len(sizes)), seed=1, round=0)


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
        # By client; without a step nothing is visited. An amount for who has no batch is nothing.
        (
            {"epochs": (3, 2, 0, 1, 2, 0)},
            SIZES,
            (0, 1, 0, 4, 5, 0),
            (0, 1, 1, 1, 2, 3),
            (0, 2, 0, 1, 4, 0),
        ),
        (
            {"steps": np.array([3, 0, 2, 1, 7, 1])},
            SIZES,
            (0, 0, 3, 4, 5, 11),
            (0, 1, 1, 1, 2, 3),
            (0, 0, 2, 1, 7, 1),
        ),
        (
            {"steps": [3, 0, 2, 1, 7, 1], "full": True},
            SIZES,
            (0, 0, 3, 4, 5, 11),
            (0, 1, 1, 1, 2, 3),
            (0, 0, 2, 1, 14, 3),
        ),
        (
            {"epochs": lambda clients, round, seed: clients + round + seed},
            SIZES,
            SIZES,
            (0, 1, 1, 1, 2, 3),
            (0, 2, 3, 4, 10, 18),
        ),
        # A cap of 4 tokens, one an example, is a cap of 4 examples; beside a cap of 3 it is none.
        (
            {"max_tokens": 4, "tokens": [1] * 24},
            (0, 1, 3, 4, 4, 4),
            (0, 1, 3, 4, 4, 4),
            (0, 1, 1, 1, 1, 1),
            (0, 1, 1, 1, 1, 1),
        ),
        (
            {"max_tokens": 4, "tokens": [1] * 24, "max_examples": 3},
            (0, 1, 3, 3, 3, 3),
            (0, 1, 3, 3, 3, 3),
            (0, 1, 1, 1, 1, 1),
            (0, 1, 1, 1, 1, 1),
        ),
        # Examples of 3 tokens: one fits into 4, and one that alone is longer than 2 is kept.
        *(
            (
                {"max_tokens": most, "tokens": [3] * 24},
                (0, 1, 1, 1, 1, 1),
                (0, 1, 1, 1, 1, 1),
                (0, 1, 1, 1, 1, 1),
                (0, 1, 1, 1, 1, 1),
            )
            for most in (2, 4)
        ),
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
    plan = make_plan(Batches(4), offsets, torch.tensor([5, 0, 2]), seed=1, round=0)
    assert plan.client.tolist() == [5, 0, 2]
    assert plan.first.tolist() == [13, 0, 1]
    assert plan.total.tolist() == [11, 0, 3]
    assert plan.steps.tolist() == [3, 0, 1]
    assert plan.run.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": [1, 2, 3]}, "Batches(epochs): 3 of them for 6 clients"),
        (
            {"max_tokens": 5, "tokens": torch.ones(9, dtype=torch.uint8)},
            "Batches(tokens): 9 of them for 24 examples",
        ),
        (
            {"steps": lambda clients, round, seed: clients[:2]},
            "Batches(steps) of round 1: 2 of them for 6 clients of the cohort",
        ),
        (
            {"epochs": lambda clients, round, seed: clients - 3},
            "Batches(epochs) of round 1: expected an integer of at least 0 for each client drawn, "
            "got -3 for client drawn 0",
        ),
        (
            {"epochs": lambda clients, round, seed: None},
            "Batches(epochs) of round 1: expected an integer of at least 0 for each client drawn, "
            "got None",
        ),
    ],
)
def test_work_that_does_not_fit_the_population_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        plan_of(Batches(4, **fields))
    assert str(error.value) == message


# Draws


def test_the_token_cap_keeps_the_longest_prefix_of_the_subset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In the order of the words of kind 1; 40 clients, few at a time.
    rng = np.random.default_rng(3)
    sizes = rng.integers(0, 15, 40)
    offsets, tokens = torch.tensor([0, *sizes]).cumsum(0), rng.integers(0, 8, sizes.sum())
    batches = Batches(4, max_tokens=20, tokens=tokens)
    cohort = torch.tensor([*range(40), 3, 7, 3])
    for at_a_time in (1, 30, 1 << 19):
        monkeypatch.setattr("vecfl.work.AT_A_TIME", at_a_time)
        plan, cut = make_plan(batches, offsets, cohort, seed=2**40 + 3, round=5), 0
        for k, again, kept, n in zip(
            plan.client, plan.occurrence, plan.kept, sizes[cohort], strict=True
        ):
            mine = tokens[offsets[k] : offsets[k + 1]].tolist()
            assert kept == (philox.token_prefix(2**40 + 3, 5, k, mine, 20, again) if n else 0)
            cut += kept < n
        assert 10 < cut < 43
    (other,) = (make_plan(batches, offsets, cohort, seed=2**40 + 3, round=r) for r in (6,))
    assert (other.kept != plan.kept).any()


def test_random_epochs_are_those_of_the_contract() -> None:
    clients = torch.tensor([4, 0, 4, 9, 4])
    for low, high, share in ((0, 3, 1.0), (1, 20, 0.5), (2, 2, 0.0)):
        drawn = random_epochs(low, high, share)(clients, 7, 2**40 + 3)
        again = zip(clients.tolist(), (0, 0, 1, 0, 2), strict=True)
        assert drawn.dtype == torch.int64
        assert drawn.tolist() == [
            philox.amount(2**40 + 3, 7, k, low, high, share, o) for k, o in again
        ]


def test_random_epochs_have_the_promised_law() -> None:
    # 20,000 clients: half draw from 0..3, half do 3, so 1/8 each and 5/8. Four standard deviations
    # are below 0.014.
    drawn = random_epochs(0, 3, 0.5)(torch.arange(20_000), 0, 1)
    shares = drawn.bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([1, 1, 1, 5]) / 8, rtol=0, atol=0.014)
    assert (drawn != random_epochs(0, 3, 0.5)(torch.arange(20_000), 1, 1)).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 2), "random_epochs(3, 2): must be integers 0 <= low <= high"),
        ((-1, 2), "random_epochs(-1, 2): must be integers 0 <= low <= high"),
        ((1.0, 2), "random_epochs(1.0, 2): must be integers 0 <= low <= high"),
        ((1, 2, 1.5), "random_epochs(share=1.5): a probability is in [0, 1]"),
    ],
)
def test_random_epochs_that_make_no_sense_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError) as error:
        random_epochs(*arguments)
    assert str(error.value) == message


def test_work_is_known_by_the_same_text_in_every_process() -> None:
    by_client = Batches(4, epochs=[1, 2, 3])
    assert str(by_client) == str(Batches(4, epochs=np.array([1, 2, 3], np.int32)))
    assert str(by_client) != str(Batches(4, epochs=[1, 2, 4]))
    assert "epochs=random_epochs(1, 20, 0.9)," in str(Batches(4, epochs=random_epochs(1, 20, 0.9)))
    assert " at 0x" not in str(Batches(4, epochs=lambda clients, round, seed: clients))
    assert str(Batches(4, epochs=2)).startswith("Batches(size=4, epochs=2, steps=None, last='keep'")


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
