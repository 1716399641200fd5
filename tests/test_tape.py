"""The tape: every promise about a round, over random rounds whose windows cut epochs anywhere.

`Case` is a round and `work` reads off its tape what each client does, from starts, finishes and
columns alone. The oracle's loop says what it has to do.
"""

import tracemalloc
from collections import Counter
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vecfl.errors import InputError
from vecfl.random import ragged_permutation
from vecfl.schedule import Batches, make_plan
from vecfl.tape import Block, Tape
from vecfl.work import random_epochs

from .oracles import philox
from .oracles.dropout import Place
from .oracles.loop import Setting, steps_of

RANDOM = random_epochs(0, 3, 0.7)


@dataclass(frozen=True)
class Case:
    """A round: clients of these sizes, of which `cohort` takes part."""

    sizes: tuple[int, ...]
    cohort: tuple[int, ...]
    batches: Batches
    slots: int = 3
    window: int = 1 << 19
    seed: int = 2**40 + 3
    round: int = 2
    draws: bool = True

    def tape(self) -> Tape:
        cohort, at = torch.tensor(self.cohort, dtype=torch.int64), (self.seed, self.round)
        plan = make_plan(self.batches, self.offsets, cohort, seed=at[0], round=at[1])
        return Tape(
            plan, self.batches, self.slots, seed=self.seed, round=self.round, draws=self.draws
        )

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([0, *self.sizes]).cumsum(0)

    def blocks(self) -> list[Block]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vecfl.tape.WINDOW", self.window)
            return list(self.tape().blocks())

    def kept(self, k: int) -> int:
        """How many examples of client k take part."""
        most = min(self.sizes[k], self.batches.max_examples or self.sizes[k])
        if self.batches.max_tokens is None or not most:
            return most
        tokens, cap = self.tokens(k), self.batches.max_tokens
        return min(most, philox.token_prefix(self.seed, self.round, k, tokens, cap))

    def tokens(self, k: int) -> list[int]:
        """The tokens of each example of client k."""
        assert self.batches.tokens is not None
        return self.batches.tokens[slice(*self.offsets[k : k + 2])].tolist()

    def amount(self, k: int) -> int:
        """The epochs, or steps, of client k."""
        amount = self.batches.epochs if self.batches.steps is None else self.batches.steps
        if amount is RANDOM:
            return philox.amount(self.seed, self.round, k, 0, 3, 0.7)
        return int(amount[k]) if isinstance(amount, Tensor) else amount or 1

    def per_epoch(self, k: int) -> int:
        """How many batches of client k make an epoch."""
        whole, rest = divmod(self.kept(k), self.batches.size)
        return whole + (rest > 0 and self.batches.last != "drop")


@dataclass(frozen=True)
class Step:
    """One step of one client: a row of the columns of a block."""

    index: list[int]
    valid: int
    apply: bool | None
    stream: list[int] | None

    @property
    def examples(self) -> list[int]:
        return self.index[: self.valid]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.integers(0, 14), min_size=3, max_size=8))
    cohort = draw(st.permutations(range(len(sizes))))[draw(st.integers(0, 3)) :]
    amount = draw(st.sampled_from(["epochs", "steps"]))
    last: Literal["keep", "drop", "wrap"] = draw(st.sampled_from(["keep", "drop", "wrap"]))
    most, n = 3 if amount == "epochs" else 7, sum(sizes)
    by_client = st.lists(st.integers(0, most), min_size=len(sizes), max_size=len(sizes))
    some = st.integers(1, most) | by_client | st.just(RANDOM)
    cap = draw(st.none() | st.integers(1, 30))
    tokens = draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)) if cap else None
    batches = Batches(
        draw(st.integers(1, 5)),
        **{amount: draw(some)},
        last=last,
        full=last == "keep" and draw(st.booleans()),
        max_examples=draw(st.none() | st.integers(1, 12)),
        max_tokens=cap,
        tokens=tokens,
    )
    return Case(
        tuple(sizes),
        tuple(cohort),
        batches,
        slots=draw(st.integers(1, 4)),
        window=draw(st.sampled_from([1, 6, 20, 90, 1 << 19])),
        seed=draw(st.integers(0, 2**63 - 1)),
        round=draw(st.sampled_from([0, 1, 2**22 - 1])),
        draws=draw(st.booleans()),
    )


def work(case: Case) -> dict[int, list[Step]]:
    """The steps of every client of the cohort, by its position in the dataset."""
    done: dict[int, list[Step]] = {k: [] for k in case.cohort}
    sitting: dict[int, int] = {}
    for block in case.blocks():
        sitting |= {s: case.cohort[c] for s, c in zip(*block.starts, strict=True)}
        index, valid = block.index.tolist(), block.valid.tolist()
        apply = None if block.apply is None else block.apply.tolist()
        streams = None if block.streams is None else block.streams.tolist()
        for t in range(len(index)):
            for s, k in sitting.items():
                end = None if apply is None else apply[t][s]
                stream = None if streams is None else streams[t][s]
                done[k].append(Step(index[t][s], valid[t][s], end, stream))
        for s in block.finishes[0]:
            del sitting[s]
    return done


# By hand


def test_a_round_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Orders are not shuffled here. Two slots, B = 2; clients 0, 1, 2, 3 own the examples 0..4,
    # none, 5..7 and 8..9. Client 0 has 3 batches, client 2 has 2 and client 3 has 1: longest first
    # puts 0 in slot 0 for the steps 0, 1, 2 and 2 in slot 1 for 0, 1; 3 follows it at 2.
    def unshuffled(seed: int, streams: Tensor, sizes: Tensor) -> Tensor:
        return torch.cat([torch.arange(n) for n in sizes.tolist()])

    monkeypatch.setattr("vecfl.tape.ragged_permutation", unshuffled)
    case = Case((5, 0, 3, 2), (3, 0, 1, 2), Batches(2), slots=2, draws=False)
    first, second = case.blocks()
    assert case.tape().idle.tolist() == [2]  # client 1 is third in the cohort

    assert [a.tolist() for a in first.starts] == [[0, 1], [1, 3]]
    assert [a.tolist() for a in first.finishes] == [[1], [3]]
    assert first.index.tolist() == [[[0, 1], [5, 6]], [[2, 3], [7, 7]]]
    assert first.valid.tolist() == [[2, 2], [2, 1]]
    assert first.active == 2 and not first.full

    assert [a.tolist() for a in second.starts] == [[1], [0]]
    assert [sorted(a.tolist()) for a in second.finishes] == [[0, 1], [0, 1]]
    assert second.index.tolist() == [[[4, 4], [8, 9]]]
    assert second.valid.tolist() == [[1, 2]]
    assert second.active == 2 and not second.full
    assert first.apply is second.apply is first.streams is second.streams is None


@pytest.mark.parametrize("cohort", [(), (0,), (2, 0)])
def test_a_cohort_without_a_step_has_no_blocks(cohort: tuple[int, ...]) -> None:
    # With B = 2, clients of 0 and 1 examples drop their only batch.
    case = Case((1, 5, 0), cohort, Batches(2, last="drop"))
    assert case.blocks() == []
    assert case.tape().idle.tolist() == list(range(len(cohort)))


def test_a_round_outside_of_its_field_is_refused() -> None:
    case = Case((3,), (0,), Batches(2), round=2**22)
    with pytest.raises(InputError, match=r"^round 4194304 has no random stream of its own"):
        case.blocks()


# Who visits what


def expected(case: Case, k: int) -> list[tuple[list[int], bool]]:
    """(examples, whether an optimizer step ends here) of every batch of client k, by the oracle."""
    b = case.batches
    setting = Setting(
        seed=case.seed,
        batch=b.size,
        epochs=case.amount(k) if b.steps is None else None,
        steps=None if b.steps is None else case.amount(k),
        last=b.last,
        full=b.full,
    )
    kept = philox.subset(case.seed, case.round, k, case.sizes[k], case.kept(k))
    first = int(case.offsets[k])
    return [
        ((batch + first).tolist(), i == len(step) - 1)
        for step in steps_of(kept, setting, Place(case.seed, case.round, k))
        for i, batch in enumerate(step)
    ]


@given(cases())
@settings(deadline=None, max_examples=250)
def test_batches_and_apply_are_those_of_the_oracle(case: Case) -> None:
    for k, steps in work(case).items():
        due = expected(case, k)
        assert [step.examples for step in steps] == [examples for examples, _ in due]
        ends = [end if case.batches.full else None for _, end in due]
        assert [step.apply for step in steps] == ends


@given(cases())
@settings(deadline=None)
def test_the_amount_of_work(case: Case) -> None:
    b = case.batches
    for k, steps in work(case).items():
        length = case.per_epoch(k)
        if b.steps is None:
            assert len(steps) == case.amount(k) * length
        else:
            assert len(steps) == case.amount(k) * (length if b.full else min(length, 1))
        if b.full:
            ends = case.amount(k) * min(length, 1)
            assert sum(bool(step.apply) for step in steps) == ends


@given(cases())
@settings(deadline=None, max_examples=150)
def test_an_epoch_visits_what_it_should(case: Case) -> None:
    size = case.batches.size
    for k, steps in work(case).items():
        length, kept = case.per_epoch(k), case.kept(k)
        for i in range(0, len(steps) // max(length, 1) * length, max(length, 1)):
            visits = [e for step in steps[i : i + length] for e in step.examples]
            if case.batches.last == "keep":
                assert len(visits) == len(set(visits)) == kept
            elif case.batches.last == "drop":
                assert len(visits) == len(set(visits)) == size * (kept // size)
            else:  # filled up with the first positions, again and again where n < B
                assert len(set(visits[:kept])) == kept
                assert visits == (visits[:kept] * size)[: size * -(-kept // size)]


@given(cases())
@settings(deadline=None, max_examples=150)
def test_a_client_visits_its_own_examples_and_the_same_in_each_epoch(case: Case) -> None:
    b = case.batches
    for k, steps in work(case).items():
        times = Counter(e for step in steps for e in step.examples)
        assert times.keys() <= set(range(*case.offsets[k : k + 2].tolist()))
        assert len(times) <= case.kept(k)
        if b.epochs is not None and b.last == "keep":
            visits = case.amount(k)
            assert list(times.values()) == [visits] * (case.kept(k) if visits else 0)


@given(cases())
@settings(deadline=None, max_examples=150)
def test_padding_repeats_an_example_of_its_own_batch(case: Case) -> None:
    for steps in work(case).values():
        for step in steps:
            assert 1 <= step.valid <= len(step.index) == case.batches.size
            assert set(step.index) == set(step.examples)


@given(cases())
@settings(deadline=None)
def test_streams_are_those_of_the_client_and_its_own_step(case: Case) -> None:
    # Kind 3 is dropout: word 3 is 3 << 28 plus the step; word 2 is the round << 10.
    for k, steps in work(case).items():
        due = [[k, case.round << 10, (3 << 28) + step] for step in range(len(steps))]
        assert [step.stream for step in steps] == (due if case.draws else [None] * len(due))


# Who sits where


@given(cases())
@settings(deadline=None, max_examples=150)
def test_blocks_follow_each_other_and_seat_everybody_once(case: Case) -> None:
    tape, time, steps = case.tape(), 0, 0
    sitting: dict[int, int] = {}
    started: list[int] = []
    for block in case.blocks():
        length, slots, size = block.index.shape
        assert length >= 1 and (slots, size) == (case.slots, case.batches.size)
        assert block.valid.shape == (length, slots)
        assert block.index.dtype == block.valid.dtype == torch.int64
        assert block.streams is None or block.streams.shape == (length, slots, 3)
        for s, c in zip(*block.starts, strict=True):
            assert s not in sitting and tape.slot[c] == s and tape.begin[c] == time
            sitting[s] = c
            started.append(c)
        assert [*range(block.active)] == sorted(sitting)
        time, steps = time + length, steps + length * len(sitting)
        for s, c in zip(*block.finishes, strict=True):
            assert sitting.pop(s) == c and time == tape.begin[c] + tape.plan.steps[c]
        assert all(time < tape.begin[c] + tape.plan.steps[c] for c in sitting.values())
    assert not sitting and steps == tape.plan.steps.sum()
    assert sorted(started) == np.flatnonzero(tape.plan.steps).tolist()
    assert tape.idle.tolist() == np.flatnonzero(tape.plan.steps == 0).tolist()
    assert time == (tape.begin + tape.plan.steps).max(initial=0)


@given(cases())
@settings(deadline=None, max_examples=150)
def test_an_idle_slot_counts_nothing_and_borrows_from_a_busy_client(case: Case) -> None:
    owner = np.repeat(np.arange(len(case.sizes)), case.sizes)
    sitting: dict[int, int] = {}
    for block in case.blocks():
        sitting |= {s: case.cohort[c] for s, c in zip(*block.starts, strict=True)}
        idle = [*range(block.active, case.slots)]
        assert (block.valid[:, idle] == 0).all()
        assert block.apply is None or not block.apply[:, idle].any()
        for borrowed in block.index[:, idle].flatten(0, 1).tolist():
            (lender,) = set(owner[borrowed].tolist())
            assert lender in sitting.values()
        for s in block.finishes[0]:
            del sitting[s]


@given(cases())
@settings(deadline=None)
def test_full_means_that_every_seat_has_a_full_batch(case: Case) -> None:
    for block in case.blocks():
        assert block.full == bool((block.valid[:, : block.active] == case.batches.size).all())


def test_full_is_seen_per_block() -> None:
    # 5 examples in batches of 2: the steps 0 and 1 are full and step 2 is not. Windows of 2 steps
    # cut there, and a window of all steps makes one block that is not full.
    case = Case((5,), (0,), Batches(2), slots=1, window=4)
    assert [block.full for block in case.blocks()] == [True, False]
    assert [block.full for block in replace(case, window=6).blocks()] == [False]


# What the work of a client does not depend on


@given(cases(), st.integers(1, 6), st.sampled_from([1, 6, 90, 1 << 19]), st.randoms())
@settings(deadline=None, max_examples=150)
def test_slots_order_company_and_windows_change_nothing(
    case: Case, slots: int, window: int, random: Random
) -> None:
    before = work(case)
    some = random.sample(case.cohort, random.randint(0, len(case.cohort)))
    after = work(replace(case, slots=slots, window=window, cohort=tuple(some)))
    assert after == {k: before[k] for k in some}


@pytest.mark.parametrize("other", [{"seed": 8}, {"round": 3}])
def test_seed_and_round_change_the_order(other: dict[str, Any]) -> None:
    # Equal orders of 20 examples have p = 1 / 20!.
    case = Case((20,), (0,), Batches(20), seed=7)
    (one,), (two,) = work(case)[0], work(replace(case, **other))[0]
    assert sorted(one.index) == sorted(two.index) and one.index != two.index


# Memory


@pytest.fixture
def permuted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many entries each call to `ragged_permutation` gives."""
    entries: list[int] = []

    def counted(seed: int, streams: Tensor, sizes: Tensor) -> Tensor:
        entries.append(int(sizes.sum()))
        return ragged_permutation(seed, streams, sizes)

    monkeypatch.setattr("vecfl.tape.ragged_permutation", counted)
    return entries


@pytest.mark.parametrize("clients", [10, 2000])
def test_a_larger_cohort_holds_no_more_indices(clients: int, permuted: list[int]) -> None:
    # A window of 64 entries is 4 steps of 4 slots of 4 examples. A (client, epoch) pair takes at
    # least a step in it, so at most 16 orders of at most 20 examples (one more for idle slots) are
    # drawn for a window, and at most one a slot (and one more) is kept for the next one.
    sizes = tuple(1 + i * 7 % 20 for i in range(clients))
    case = Case(sizes, tuple(range(clients)), Batches(4, epochs=2), slots=4, draws=False)
    tape = case.tape()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vecfl.tape.WINDOW", 64)
        for block in tape.blocks():
            memory = block.index.untyped_storage().nbytes()
            assert memory <= 64 * 8
            assert len(tape.examples) <= 5 * 20
    assert max(permuted) <= 17 * 20
    assert sum(permuted) >= 2 * sum(sizes)


def test_the_memory_of_a_round_is_that_of_a_window() -> None:
    # 1,000 clients of 200 examples, 5 epochs: 1,000,000 indices or 8 MB, against a window of 2048
    # (16 kB). What may grow with the cohort is a few numbers a client.
    clients = 1000
    batches = Batches(16, epochs=5)
    case = Case((200,) * clients, tuple(range(clients)), batches, slots=8, draws=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vecfl.tape.WINDOW", 2048)
        tape, visits = case.tape(), 0
        tracemalloc.start()
        for block in tape.blocks():
            visits += int(block.valid.sum())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert visits == 5 * 200 * clients
    assert peak < 1_000_000


@pytest.mark.parametrize("window", [1, 6, 20, 1 << 19])
def test_a_shuffle_is_drawn_once_however_windows_cut_it(window: int, permuted: list[int]) -> None:
    case = Case((9, 4, 14), (0, 1, 2), Batches(2, epochs=3), slots=1, window=window)
    assert len(work(case)[2]) == 3 * 7
    assert sum(permuted) == 3 * (9 + 4 + 14)


def test_a_subset_is_drawn_once_a_client_and_window(permuted: list[int]) -> None:
    # 50 epochs of 4 of 1,000 examples: 50 shuffles of 4 and one subset of 1,000.
    Case((1000,), (0,), Batches(4, epochs=50, max_examples=4), slots=1).blocks()
    assert sum(permuted) == 50 * 4 + 1000


def test_a_token_cap_draws_where_a_client_has_more(
    permuted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Clients of 3, 4 and 5 examples of 2 tokens under a cap of 8: only the last has more, of whose
    # order (drawn for the plan, and again for the tape) 4 examples take part.
    planned = list[int]()

    def counted(seed: int, streams: Tensor, sizes: Tensor) -> Tensor:
        planned.extend(sizes.tolist())
        return ragged_permutation(seed, streams, sizes)

    monkeypatch.setattr("vecfl.work.ragged_permutation", counted)
    tokens = torch.full((12,), 2)
    case = Case((3, 4, 5), (0, 1, 2), Batches(9, max_tokens=8, tokens=tokens), slots=3)
    case.blocks()
    assert planned == [5] and sum(permuted) == 3 + 4 + 4 + 5
