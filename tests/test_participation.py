"""Turns, availability and dropout of clients, alone and in whole rounds.

Statistical tests have a fixed seed; counts are held to 6 standard errors (p = 2e-9 each).
"""

import logging
import math
from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vecfl
from vecfl import Batches, InputError, Simulation, Task, fedavg
from vecfl.participation import available, checked, checked_dropout, lost, separated
from vecfl.sampling import cyclic, everyone, poisson, uniform

from .oracles import philox
from .oracles.bridge import dataset
from .oracles.tasks import PROBLEMS, SIZES
from .oracles.tiny import FAR, PLAIN, STEEP, Line, client, squared

SEED = 2**40 + 3
C = len(SIZES)
WAYS = [
    ("loop", 1, 1),
    ("loop", 2, 2),
    ("vmap", 3, 1),
    ("vmap", 2, 2),
    ("stacked", 3, 1),
]


def all_of(population: int) -> Tensor:
    return torch.ones(population, dtype=torch.bool)


def fits(times: int, trials: int, p: float) -> bool:
    return abs(int(times) - trials * p) < 6 * sqrt(trials * p * (1 - p))


def test_groups_take_turns_and_are_as_equal_as_can_be() -> None:
    sample = separated(everyone(), 4)
    groups = [sample(all_of(10), SEED, t).tolist() for t in range(4)]
    assert [len(group) for group in groups] == [3, 3, 2, 2]
    assert sorted(sum(groups, [])) == list(range(10))
    assert [sample(all_of(10), SEED, t).tolist() for t in range(4, 8)] == groups
    # The draws of the contract: word order of step 3, dealt one after the other.
    order = np.argsort(philox.words(SEED, philox.COHORT, 10, step=3), kind="stable")
    assert groups == [sorted(order[g::4].tolist()) for g in range(4)]
    other = [sample(all_of(10), SEED + 1, t).tolist() for t in range(4)]
    assert other != groups  # by chance with p = 3! 3! 2! 2! / 10! = 4e-5


@pytest.mark.parametrize("inner, p", [(uniform(2), 0.5), (poisson(0.6), 0.6)])
def test_participations_are_separated(inner: vecfl.sampling.Sampler, p: float) -> None:
    # A client comes in every 5th round at most; within its group it is drawn as `inner` draws:
    # uniform(2) of groups of 4 with p = 1/2; 20 clients in 800 rounds of their own each: p = 4e-8.
    last: dict[int, int] = {}
    counts = torch.zeros(20, dtype=torch.int64)
    for t in range(4000):
        for k in separated(inner, 5)(all_of(20), SEED, t).tolist():
            assert t - last.get(k, -5) >= 5
            last[k] = t
            counts[k] += 1
    assert all(fits(times, 800, p) for times in counts)


def test_available_clients_alone_are_drawn() -> None:
    trace = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    for mask in (trace, trace.numpy(), trace.tolist(), lambda t: trace[t % 3]):
        sample = available(uniform(1), mask)
        cohorts = [sample(all_of(4), SEED, t).tolist() for t in range(6)]
        assert [len(c) for c in cohorts] == [1, 1, 0, 1, 1, 0]  # rows begin again after the last
        assert all(set(c) <= {0, 1} for c in cohorts[::3])
        assert all(set(c) <= {2, 3} for c in cohorts[1::3])


def test_turns_and_availability_go_together_in_either_order() -> None:
    trace = torch.rand(7, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    one = separated(available(everyone(), trace), 4)
    two = available(separated(everyone(), 4), trace)
    for t in range(28):
        group = separated(everyone(), 4)(all_of(20), SEED, t)
        both = group[trace[t % 7][group]].tolist()
        assert one(all_of(20), SEED, t).tolist() == two(all_of(20), SEED, t).tolist() == both
    # In a pass a client that is away misses its turn, and nobody comes twice.
    passes = [available(cyclic(5), trace)(all_of(20), SEED, t).tolist() for t in range(4)]
    assert len(sum(passes, [])) == len(set(sum(passes, [])))


def test_clients_are_lost_with_their_probability_and_independently() -> None:
    # 12 clients in 4,000 rounds, p = 0.2; two of them together 0.04, one in two rounds 0.04.
    # 12 + 66 + 12 counts: false alarm with p = 1.8e-7.
    cohort = torch.arange(12)
    away = torch.stack([lost(0.2, cohort, 12, SEED, t) for t in range(4000)]).long()
    for i in range(12):
        assert fits(away[:, i].sum(), 4000, 0.2)
        assert all(fits((away[:, i] * away[:, j]).sum(), 4000, 0.04) for j in range(i))
        # Neighbours overlap, so every other pair of rounds.
        assert fits((away[1::2, i] * away[::2, i]).sum(), 2000, 0.04)


def test_who_is_lost_depends_on_the_client_alone() -> None:
    cohort = torch.tensor([7, 3, 7, 900_000, 3])
    away = lost(0.5, cohort, 10**6, SEED, 4).tolist()
    assert away[0] == away[2] and away[1] == away[4]  # with both of their turns
    for k, gone in zip(cohort.tolist(), away, strict=True):
        word = philox.words(SEED, philox.COHORT, 1, client=k, t=4, step=4)[0]
        assert gone == (word < 2**31) == bool(lost(0.5, torch.tensor([k]), 10**6, SEED, 4))
    assert not lost(0.0, cohort, 10**6, SEED, 4).any()
    trace = torch.zeros(2, 10, dtype=torch.bool)
    trace[1, 3] = True
    assert lost(trace, torch.tensor([3, 4]), 10, SEED, 1).tolist() == [True, False]
    assert lost(lambda t: trace[t], torch.tensor([3, 4]), 10, SEED, 0).tolist() == [False, False]


def simulate(
    sampler: Any, problem: str = "mlp", way: tuple[str, int, int] = ("loop", 1, 1), **kind: Any
) -> Simulation:
    p = PROBLEMS[problem]
    data, (backend, slots, workers) = dataset(p.clients()), way
    task = Task(p.build(), p.loss, example=data.examples(2))
    algorithm = kind.pop("algorithm", fedavg(lr=0.1, batches=Batches(4, epochs=2)))
    kind |= {"backend": backend, "slots": slots, "workers": workers, "dtype": torch.float64}
    return Simulation(task, data, algorithm, sampler, seed=7, **kind)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_lost_client_is_as_if_it_had_not_been_drawn(way: tuple[str, int, int]) -> None:
    gone = torch.zeros(1, C, dtype=torch.bool)
    gone[0, [2, 5]] = True
    stay = torch.tensor([k for k in range(C) if not gone[0, k]])
    with_dropout = simulate(everyone(), way=way, client_dropout=gone)
    state, metrics = with_dropout.round(with_dropout.start())
    without = simulate(lambda eligible, seed, round: stay, way=way)
    right, _ = without.round(without.start())
    assert torch.equal(state.server["w"], right.server["w"])
    assert (metrics["train/cohort"], metrics["train/lost_clients"]) == (C, 2)
    assert with_dropout.cohort(0).tolist() == list(range(C))  # those that were drawn


def test_dropout_by_hand() -> None:
    # FAR alone goes from 1 to 1.5, PLAIN to 0.5. Whoever is lost does not pull at the mean.
    data = dataset([client(FAR), client(PLAIN)])
    task = Task(Line(), squared, example=data.examples(2))
    for gone, w in (([True, False], 0.5), ([False, True], 1.5), ([False, False], 1.0)):
        sim = Simulation(
            *(task, data, fedavg(lr=0.5, batches=Batches(1)), everyone()),
            client_dropout=lambda t, gone=gone: torch.tensor(gone),
        )
        state, metrics = sim.round(sim.start())
        assert state.server["w"].tolist() == [w]
        assert metrics["train/lost_clients"] == sum(gone)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("server", ["server_sgd", "server_momentum", "server_adam"])
def test_an_empty_cohort_leaves_the_state(
    server: str, way: tuple[str, int, int], caplog: pytest.LogCaptureFixture
) -> None:
    algorithm = fedavg(lr=0.1, batches=Batches(4), server=getattr(vecfl, server)())
    nobody = torch.zeros(3, C, dtype=torch.bool)
    nobody[0] = True
    sim = simulate(available(uniform(3), nobody), way=way, algorithm=algorithm)
    state, _ = sim.round(sim.start())
    with caplog.at_level(logging.INFO, "vecfl"):
        after, metrics = sim.round(state)
    told = [message for message in caplog.messages if message.startswith("round")]
    assert told == ["round 2: no client takes part; the model stays as it is"]
    assert after.round == 2 and after.server.keys() == state.server.keys()
    assert all(torch.equal(after.server[name], t) for name, t in state.server.items())
    assert math.isnan(metrics.pop("train/loss"))
    numbers = ("train/cohort", "train/clients", "train/dropped_clients", "system/client_steps")
    assert [metrics[name] for name in numbers] == [0, 0, 0, 0]
    assert metrics["system/clients_per_s"] == 0
    again, _ = sim.round(sim.round(after)[0])  # a day later they are there again
    assert not torch.equal(again.server["w"], state.server["w"])


def test_a_simulation_that_begins_with_an_empty_draw_still_measures() -> None:
    later = lambda eligible, seed, t: torch.arange(3 if t == 4 else 0)  # noqa: E731
    sim = simulate(later, backend="loop")
    state = sim.start()
    for t in range(5):
        state, metrics = sim.round(state)
        assert metrics["train/cohort"] == (3 if t == 4 else 0)
    p = PROBLEMS["mlp"]
    data = dataset(p.clients())
    task = Task(p.build(), p.loss, example=data.examples(2))
    algorithm = fedavg(lr=0.1, batches=Batches(4))
    nobody = lambda eligible, seed, t: torch.arange(0)  # noqa: E731
    auto = Simulation(task, data, algorithm, nobody, backend="auto", slots="auto")
    state, metrics = auto.round(auto.start())
    assert metrics["train/cohort"] == 0 and auto.arrangement.backend in ("loop", "vmap", "stacked")


def test_slots_go_by_a_large_cohort_of_the_first_rounds() -> None:
    sizes = [2, 0, 6, 3] + [1] * 20
    sim = simulate(lambda eligible, seed, t: torch.arange(sizes[t]), way=("vmap", None, 1))
    assert sim.arrangement.slots == 6
    ends = simulate(lambda eligible, seed, t: torch.arange([1, 4][t]), way=("vmap", None, 1))
    assert ends.arrangement.slots == 4  # a sampler may end with the run
    drawn: list[int] = []
    same = lambda eligible, seed, t: drawn.append(t) or torch.arange(3)  # noqa: E731
    assert simulate(same, way=("vmap", None, 1)).arrangement.slots == 3 and drawn == [0, 1, 2]


def test_dropout_is_drawn_by_the_sample_seed() -> None:
    sim = simulate(everyone(), client_dropout=0.5, sample_seed=99)
    away = []
    for t in range(9):
        stay = set(sim.cohorts.ask(t).tolist())
        away.append([k not in stay for k in range(C)])
    assert away == [lost(0.5, torch.arange(C), C, 99, t).tolist() for t in range(9)]
    assert away != [lost(0.5, torch.arange(C), C, 7, t).tolist() for t in range(9)]


def test_the_sampler_of_a_simulation_stays() -> None:
    sim = simulate(everyone())
    with pytest.raises(AttributeError):
        sim.sampler = uniform(1)  # type: ignore[misc]


def test_occurrences_of_a_client_draw_anew_and_keep_their_keys() -> None:
    # The first occurrence has the draws of a cohort without repeats, and further ones others:
    # client 3 has 23 examples, so its shuffles agree with p = 1/23!.
    sent: list[dict] = []

    def run(cohort: list[int], way: tuple[str, int, int]) -> dict[int, list[Tensor]]:
        from .oracles.bridge import recorded

        sent.append({})
        algorithm = recorded(fedavg(lr=0.1, batches=Batches(4, epochs=2)), sent)
        sim = simulate(lambda eligible, seed, t: torch.tensor(cohort), way=way, algorithm=algorithm)
        sim.round(sim.start())
        return {k: sorted((r for r, _ in rows), key=Tensor.tolist) for k, rows in sent[-1].items()}

    once, thrice = run([3, 1], WAYS[0]), run([3, 1, 3, 3], WAYS[0])
    assert torch.equal(once[1][0], thrice[1][0])
    assert sum(torch.equal(once[3][0], row) for row in thrice[3]) == 1
    assert len({tuple(row.tolist()) for row in thrice[3]}) == 3
    for way in WAYS[1:]:
        for k, rows in run([3, 1, 3, 3], way).items():
            torch.testing.assert_close(rows, thrice[k], rtol=1e-9, atol=1e-12)


def test_poisson_rounds_run_by_any_way_to_the_same_model() -> None:
    models = []
    for way in WAYS:
        sim = simulate(poisson(0.3), way=way, client_dropout=0.2)
        state, seen = sim.start(), []
        for _ in range(8):
            state, metrics = sim.round(state)
            seen.append((metrics["train/cohort"], metrics["train/lost_clients"]))
        models.append((seen, state.server["w"]))
    assert 0 in [cohort for cohort, _ in models[0][0]] and any(away for _, away in models[0][0])
    for seen, w in models[1:]:
        assert seen == models[0][0]
        torch.testing.assert_close(w, models[0][1], rtol=1e-9, atol=1e-12)


WHAT = "expected bool [rounds, clients] or a function of the round, got"
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "separation 0": (
        lambda: separated(uniform(1), 0),
        "participations are separated by at least 1 round, not 0",
    ),
    "more groups than clients": (
        lambda: separated(uniform(1), 11)(all_of(10), SEED, 0),
        "10 clients cannot take turns over 11 rounds; separate them by at most 10",
    ),
    "trace of numbers": (
        lambda: available(uniform(1), torch.ones(2, 3)),
        f"availability: {WHAT} torch.float32 [2, 3]",
    ),
    "trace of one round": (
        lambda: available(uniform(1), all_of(3)),
        f"availability: {WHAT} torch.bool [3]",
    ),
    "trace of no round": (
        lambda: available(uniform(1), torch.ones(0, 3).bool()),
        f"availability: {WHAT} torch.bool [0, 3]",
    ),
    "trace of text": (lambda: available(uniform(1), "day"), f"availability: {WHAT} 'day'"),
    "trace of others": (
        lambda: available(uniform(1), torch.ones(2, 3).bool())(all_of(4), SEED, 6),
        "availability in round 7: expected bool [4], got torch.bool [3]",
    ),
    "function that gives a list": (
        lambda: available(uniform(1), lambda t: [True])(all_of(1), SEED, 0),
        "availability in round 1: expected bool [1], got [True]",
    ),
    "dropout of all": (
        lambda: checked_dropout(1),
        "client_dropout: a probability is in [0, 1), not 1",
    ),
    "dropout nan": (
        lambda: simulate(everyone(), client_dropout=math.nan),
        "client_dropout: a probability is in [0, 1), not nan",
    ),
    "dropout by name": (lambda: checked_dropout("10 %"), f"client_dropout: {WHAT} '10 %'"),
    "a cohort that is a list": (
        lambda: checked([1, 2], 3, 0),
        "the sampler gave [1, 2] in round 1; clients are int64 positions from 0 to 2",
    ),
    "a cohort of pairs": (
        lambda: checked(torch.zeros(2, 2).long(), 3, 0),
        "the sampler gave torch.int64 [2, 2] in round 1; clients are int64 positions from 0 to 2",
    ),
}


@pytest.mark.parametrize("build, message", BAD.values(), ids=BAD)
def test_bad_input(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        build()
    assert str(error.value) == message


def test_a_client_may_come_1024_times() -> None:
    cohort = torch.zeros(1024, dtype=torch.int64)
    assert checked(cohort, 1, 0) is cohort
    data = dataset([client(STEEP)])
    task = Task(Line(), squared, example=data.examples(2))
    algorithm = fedavg(lr=0.25, batches=Batches(1))
    sim = Simulation(task, data, algorithm, lambda eligible, seed, t: cohort)
    state, metrics = sim.round(sim.start())
    assert state.server["w"].tolist() == [0.0] and metrics["train/clients"] == 1024
