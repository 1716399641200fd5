"""Late messages and buffers: by hand, the law of delays, identities, resume and refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vecfl
from vecfl import Batches, InputError, Simulation, Task
from vecfl.algorithms import Algorithm
from vecfl.delays import Delay
from vecfl.random import Kind, stream, words

from ..oracles.bridge import dataset
from ..oracles.tasks import PROBLEMS
from ..oracles.tiny import FAR, PLAIN, STEEP, Line, client, squared

B = Batches(1)


def fedavg(**kind: Any) -> Algorithm:
    return vecfl.fedavg(lr=0.25, batches=B, **kind)


def line(algorithm: Algorithm, *examples: Any, **kind: Any) -> Simulation:
    """Clients of one example; y = w x with w = 1 at first."""
    data = dataset([client(one) for one in examples])
    task = Task(Line(), squared, example=data.examples(2))
    kind = {"dtype": torch.float64, "backend": "loop", **kind}
    return Simulation(task, data, algorithm, vecfl.everyone(), **kind)


def ws(sim: Simulation, rounds: int) -> tuple[list[float], dict[str, Any]]:
    """w after each round, and the metrics of the last."""
    state, found, metrics = sim.start(), [], {}
    for _ in range(rounds):
        state, metrics = sim.round(state)
        found.append(float(state.server["w"][0]))
    return found, {k: v for k, v in metrics.items() if k.startswith("late/")}


def test_one_round_late_by_hand() -> None:
    """Gradients are w - 2 of FAR and w of PLAIN, whose messages are a round late; lr is 1/4.

    Round 1, from 1: FAR sends -1/4, which comes alone: w = 5/4. Round 2: FAR sends -3/16, PLAIN's
    1/4 of round 1 comes: w = 5/4 - 1/32 = 39/32. One step old, 1/(1 + 1) of it counts for
    polynomial(1): (-3/16 + 1/8) / 2 = -1/32, so w = 41/32; weights are not discounted.
    """
    late = vecfl.delay_trace([0, 1])
    found, told = ws(line(vecfl.delayed(fedavg(), late), FAR, PLAIN), 2)
    assert found == [1.25, 39 / 32]
    assert told == {"late/arrived": 2, "late/age": 0.5} | {
        "late/waiting": 1,
        "late/buffered": 0,
        "late/steps": 2,
    }
    old = vecfl.delayed(fedavg(), late, discount=vecfl.polynomial(1))
    assert ws(line(old, FAR, PLAIN), 2)[0] == [1.25, 41 / 32]


def test_a_buffer_by_hand() -> None:
    """FAR sends -1/4 and STEEP (gradient 4 w) 1, in both rounds from w = 1; four messages fill a
    buffer of three: w = 1 - 3/8. Then all begin from 5/8: FAR (5/8 - 2) / 4, STEEP 5/8."""
    found, told = ws(line(vecfl.delayed(fedavg(), buffer=3), FAR, STEEP), 4)
    step = (5 / 8 + (5 / 8 - 2) / 4) / 2
    assert found == pytest.approx([1, 5 / 8, 5 / 8, 5 / 8 - step])
    assert (told["late/steps"], told["late/buffered"]) == (2, 0)


def test_age_counts_steps_and_not_rounds() -> None:
    """PLAIN is two rounds late; a buffer of two is full in rounds 2 and 3 with FAR's -1/4, -1/4
    and then, from 5/4, FAR's -3/16 with the first 1/4 of PLAIN. That one is one step old (the step
    of round 2), not two rounds: 1/2 of it counts, (1/8 - 3/16) / 2 = -1/32."""
    late, how = vecfl.delay_trace([0, 2]), {"buffer": 2, "discount": vecfl.polynomial(1)}
    found, told = ws(line(vecfl.delayed(fedavg(), late, **how), FAR, PLAIN), 3)
    assert found == [1, 1.25, 1.25 + 1 / 32]
    assert (told["late/age"], told["late/waiting"]) == (0.5, 2)


def test_the_law_of_delays() -> None:
    """Of 20,000 clients each count is within 5 standard deviations: a false alarm in 10^6."""
    clients, share = torch.arange(20_000), (0.5, 0.2, 0.0, 0.3)
    found = torch.from_numpy(vecfl.drawn_delay(share).of(clients, 3, 7))
    for rounds, p in enumerate(share):
        assert abs(int((found == rounds).sum()) - 20_000 * p) <= 5 * (20_000 * p * (1 - p)) ** 0.5
    key = stream(Kind.COHORT, client=clients, round=3, occurrence=0, step=6)
    word = words(7, key, 1)[:, 0].double() / 2**32
    assert torch.equal(found, (word >= 0.5).long() + 2 * (word >= 0.7).long())
    half = vecfl.stale(0.5, rounds=2).of(clients, 3, 7)
    assert set(half.tolist()) == {0, 2} and torch.equal(torch.from_numpy(half > 0), word >= 0.5)
    twice = vecfl.stale(0.5).of(torch.zeros(60, dtype=torch.int64), 0, 1)
    assert 0 < twice.sum() < 60  # occurrences draw anew
    trace = vecfl.delay_trace([[0, 1, 2], [3, 0, 0]])
    assert [trace.of(torch.tensor([2, 0]), t, 0).tolist() for t in range(3)] == [
        [2, 0],
        [0, 3],
        [2, 0],
    ]
    assert trace.most == 3


def simulation(algorithm: Algorithm, **kind: Any) -> Simulation:
    problem = PROBLEMS["mlp"]
    data = dataset(problem.clients())
    task = Task(problem.build(), problem.loss, example=data.examples(2))
    kind = {"dtype": torch.float64, "backend": "loop", "seed": 3, **kind}
    return Simulation(task, data, algorithm, vecfl.uniform(4), **kind)


ALGORITHMS = {
    "fedavg": lambda: vecfl.fedavg(lr=0.1, batches=Batches(4)),
    "dga": lambda: vecfl.chain(vecfl.dga(lr=0.1, batches=Batches(4)), vecfl.clip_by_norm(0.1)),
    "scaffold": lambda: vecfl.scaffold(lr=0.1, batches=Batches(4)),
    "fednova": lambda: vecfl.fednova(lr=0.1, batches=Batches(4)),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_delay_and_a_buffer_of_one_change_no_bit(name: str) -> None:
    ends = []
    for algorithm in (
        ALGORITHMS[name](),
        vecfl.delayed(ALGORITHMS[name]()),
        vecfl.delayed(ALGORITHMS[name](), vecfl.stale(0.0), discount=None),
    ):
        state = vecfl.run(simulation(algorithm), 3)
        ends.append({n: t for n, t in state.server.items() if not n.startswith("late/")})
    for end in ends[1:]:
        assert end.keys() == ends[0].keys()
        assert all(torch.equal(end[n], ends[0][n]) for n in end)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("how", [{}, {"exact_sums": True, "workers": 2}])
def test_what_is_on_its_way_is_in_the_checkpoint(name: str, how: dict[str, Any]) -> None:
    def late() -> Algorithm:
        return vecfl.delayed(ALGORITHMS[name](), vecfl.drawn_delay([0.3, 0.3, 0.4]), buffer=4)

    whole = vecfl.run(simulation(late(), **how), 6)
    half = vecfl.run(first := simulation(late(), **how), 3)
    assert (
        float(sum(half.server[f"late/{r}/extra/late/clients"] for r in ("1.1", "2.1", "2.2"))) > 0
    )
    other = simulation(late(), **how)
    resumed = vecfl.run(other, 3, state=other.load(first.save(half)))
    assert whole.server.keys() == resumed.server.keys()
    assert all(torch.equal(whole.server[n], resumed.server[n]) for n in whole.server)


def test_a_round_in_which_all_are_late() -> None:
    late = vecfl.delayed(vecfl.fedavg(lr=0.1, batches=Batches(4)), vecfl.stale(1.0))
    sim = simulation(late, statistics=4)
    state = sim.start()
    first, metrics = sim.round(state)
    assert torch.equal(first.server["w"], state.server["w"])
    assert metrics["late/arrived"] == 0 and metrics["train/loss"] > 0
    assert metrics["update/aggregate_norm"] > 0  # of those that trained
    second, metrics = sim.round(first)
    assert not torch.equal(second.server["w"], first.server["w"])
    assert metrics["late/age"] == 0  # the server has made no step since


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: vecfl.delayed(vecfl.delayed(fedavg())), "is delayed; delayed cannot stand"),
        (
            lambda: vecfl.delayed(vecfl.aggregated_by(fedavg(), vecfl.coordinate_median())),
            "needs all messages at once; delayed cannot stand around it",
        ),
        (
            lambda: vecfl.aggregated_by(vecfl.delayed(fedavg()), vecfl.coordinate_median()),
            "coordinate_median needs all messages at once, none may be late",
        ),
        (
            lambda: vecfl.chain(vecfl.delayed(fedavg()), vecfl.clip_by_norm(1.0)),
            "chain first, and let delayed stand around all of it",
        ),
        (lambda: vecfl.delayed(fedavg(), buffer=0), r"delayed\(buffer=0\): must be an integer"),
        (lambda: vecfl.delayed(fedavg(), 3), "expected a delay, such as stale"),
        (lambda: vecfl.delayed(fedavg(), discount=0.5), "a function of the age, such as poly"),
        (lambda: vecfl.drawn_delay([float("nan"), 1.0]), "a probability for each number of rounds"),
        (lambda: vecfl.delayed(fedavg(), vecfl.stale(0.3, 101)), "up to 101 rounds late; at most"),
        (lambda: vecfl.drawn_delay(0.5), r"drawn_delay\(0.5\): expected a probability for each"),
        (lambda: vecfl.polynomial(-1.0), r"polynomial\(power=-1.0\): must be at least 0"),
        (lambda: vecfl.stale(1.5), r"stale\(1.5, rounds=1\): a probability is in \[0, 1\]"),
        (lambda: vecfl.drawn_delay([0.5, 0.4]), "a probability for each number of rounds"),
        (lambda: vecfl.delay_trace([0, -1]), "delay_trace: expected an integer of at least 0"),
        (lambda: vecfl.delay_trace([[[1]]]), r"expected \[N\] or \[T, N\], got \[1, 1, 1\]"),
    ],
)
def test_what_is_refused_when_it_is_made(make: Any, line: str) -> None:
    with pytest.raises(InputError, match=line):
        make()


def test_algorithms_whose_sums_have_to_hold() -> None:
    discount = vecfl.polynomial(0.5)
    for algorithm in (
        vecfl.scaffold(lr=0.1, batches=B),
        vecfl.feddyn(lr=0.1, alpha=0.1, batches=B),
    ):
        with pytest.raises(InputError, match=f"{algorithm.name}: no discount: what its clients"):
            vecfl.delayed(algorithm, vecfl.stale(0.5), discount=discount)
        with pytest.raises(InputError, match="adds up to what the server keeps of the mean"):
            vecfl.aggregated_by(algorithm, vecfl.coordinate_median())


def test_a_discount_that_is_none() -> None:
    late = vecfl.delayed(fedavg(), vecfl.delay_trace([0, 1]), discount=lambda age: float("nan"))
    sim = line(late, FAR, PLAIN)
    with pytest.raises(InputError, match="the discount of age 0 is nan: at least 0 and finite"):
        sim.round(sim.start())


def test_a_model_of_delays_that_is_wrong() -> None:
    def five(clients: Tensor, round: int, seed: int) -> Tensor:
        return torch.full_like(clients, 5)

    late = vecfl.delayed(fedavg(), Delay("mine", 3, five))
    sim = line(late, FAR, PLAIN, slots=1)
    with pytest.raises(InputError, match="mine, round 1: a delay of 5, which has most=3"):
        sim.round(sim.start())
    for trace in ([0], [0, 1, 0]):
        short = vecfl.delayed(fedavg(), vecfl.delay_trace(trace))
        with pytest.raises(
            InputError, match=f"^delay_trace: {len(trace)} clients, but there are 2"
        ):
            line(short, FAR, PLAIN)


def test_runs_know_delays_by_name() -> None:
    one = vecfl.delayed(fedavg(), vecfl.stale(0.3), buffer=2, discount=vecfl.polynomial(0.5))
    assert one.name == "fedavg, delayed(stale(0.3, 1); buffer 2; polynomial(0.5))"
    assert vecfl.delayed(fedavg(), buffer=3).name == "fedavg, delayed(buffer 3)"


def test_what_follows_the_server_s_steps_stands_inside() -> None:
    late = vecfl.delayed(fedavg(), vecfl.stale(1.0))
    with pytest.raises(InputError, match="ema first, and let delayed stand around it"):
        vecfl.ema(late, 0.5)
    problem = PROBLEMS["mlp"]
    (data,) = problem.clients((9,))
    task = Task(problem.build(), problem.loss, example=data)
    with pytest.raises(InputError, match="replay first, and let delayed stand around it"):
        vecfl.replay(late, task, data, lr=0.1, batches=Batches(4))


def test_metrics_are_of_the_messages_that_are_used() -> None:
    """FAR's -1/4 of two rounds fills a buffer of two: the pseudo-gradient is -1/4. Before, the
    server makes no step, of which nothing is told."""
    sim = line(vecfl.delayed(fedavg(), buffer=2), FAR)
    state, first = sim.round(sim.start())
    _, second = sim.round(state)
    assert torch.tensor(first["server/update_norm"]).isnan()
    assert second["server/update_norm"] == pytest.approx(0.25)


def test_normalised_messages_of_two_ages() -> None:
    """FedNova, FAR in time with two steps, PLAIN a round late with one; lr 1/4 and a discount of
    1/2 at age 1. Round 2: tau_eff is of both messages in full, (2 + 1) / 2, whatever their age.

    From w FAR sends d = (w - w2) / 2 with w2 = 2 + (w - 2) (3/4)^2, that is (w - 2) 7/32. Round 1:
    w = 1 - 2 (-7/32) = 23/16. Round 2: FAR sends -9/16 * 7/32 = -63/512, PLAIN's 1/4 counts half:
    w = 23/16 - 3/2 (-63/512 + 1/8) / 2 = 23/16 - 3/2048.
    """
    nova = vecfl.fednova(lr=0.25, batches=Batches(1, steps=[2, 1]))
    late = vecfl.delayed(nova, vecfl.delay_trace([0, 1]), discount=vecfl.polynomial(1))
    found, _ = ws(line(late, FAR, PLAIN), 2)
    assert found == pytest.approx([23 / 16, 23 / 16 - 3 / 2048], rel=1e-12)


def test_clients_that_are_not_lost_keep_their_delays() -> None:
    """A trace by client; without the lost, the others have theirs."""
    late = vecfl.delayed(fedavg(), vecfl.delay_trace([0, 1, 2, 1]))
    sim = line(late, FAR, PLAIN, STEEP, FAR, client_dropout=0.5, seed=5)
    sim.round(sim.start())
    plan = sim.cohorts.take(0).plan
    assert 0 < len(plan.client) < 4 and plan.client.tolist() != [0, 1, 2, 3][: len(plan.client)]
    assert plan.delay.tolist() == [[0, 1, 2, 1][k] for k in plan.client.tolist()]
