"""Whole rounds: metrics, states, seeds, what comes out and what stays as it was."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import vecfl
from vecfl import Batches, Simulation, State, Task, everyone, fedavg, fedsgd

from .oracles.bridge import dataset, recorded
from .oracles.loop import Columns
from .oracles.tasks import PROBLEMS, SIZES
from .oracles.tiny import FAR, PLAIN, STEEP, Line, client, squared

C = len(SIZES)
BACKENDS = ["loop", "vmap"]
ADAM = {"lr": 0.05, "batches": Batches(4, epochs=2), "optimizer": vecfl.adam()}


def simulate(problem: str = "mlp", algorithm: Any = None, sampler: Any = None, **kind: Any) -> Any:
    """A simulation of the ragged clients of an oracle problem."""
    p = PROBLEMS[problem]
    data = dataset(p.clients())
    metrics = {} if problem == "tokens" else {"accuracy": vecfl.accuracy}
    task = Task(p.build(), p.loss, metrics, example=data.examples(2))
    return Simulation(task, data, algorithm or fedavg(**ADAM), sampler or everyone(), **kind)


def tiny(clients: list[Columns], **kind: Any) -> Simulation:
    """w from 1, lr = 1/2, two epochs of single examples."""
    data = dataset(clients)
    task = Task(Line(), squared, {"loss_twice": squared}, example=data.examples(2))
    algorithm = fedavg(lr=0.5, batches=Batches(1, epochs=2))
    return Simulation(task, data, algorithm, everyone(), **kind)


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    torch.testing.assert_close(dict(a), dict(b), rtol=0, atol=0)


# Clients with 3, 1, 0 and 2 examples make 6, 2, 0 and 4 steps, 12 in all. In two slots: 6 | 4, 2,
# six slot-steps each. In three and five: two steps of three clients, two of two, and two of the
# last one, beside which vmap keeps a slot: 2 * (3 + 2 + 2). The loop needs no such slot.
@pytest.mark.parametrize(
    "backend, slots, executed",
    [("vmap", 1, 12), ("vmap", 2, 12), ("vmap", 3, 14), ("vmap", 5, 14), ("loop", 1, 12)]
    + [("loop", 3, 12)],
)
def test_system_metrics_by_hand(backend: str, slots: int, executed: int) -> None:
    clients = [client(FAR, FAR, FAR), client(STEEP), client(), client(PLAIN, PLAIN)]
    sim = tiny(clients, backend=backend, slots=slots)
    _, metrics = sim.round(sim.start())
    assert metrics["system/backend"] == backend
    assert metrics["system/slots"] == slots
    assert metrics["system/client_steps"] == 12
    assert metrics["system/slot_efficiency"] == 12 / executed
    assert metrics["system/clients_per_s"] * metrics["system/round_s"] == pytest.approx(4)
    assert metrics["round"] == 1
    assert metrics["train/clients"] == 3
    assert metrics["train/dropped_clients"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_default_slots_hold_the_cohort_of_a_small_model(backend: str) -> None:
    sim = simulate(backend=backend)
    assert sim.round(sim.start())[1]["system/slots"] == C


class Memo:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.rounds: list[dict] = []

    def log(self, metrics: Mapping[str, float | int | str]) -> None:
        self.rounds.append(dict(metrics))

    def close(self) -> None:
        pass


ROUND_KEYS = [
    "round",
    "train/lr",
    "train/loss",
    "train/cohort",
    "train/lost_clients",
    "train/clients",
    "train/dropped_clients",
    *(f"comm/{name}_bytes" for name in ("up", "down", "total_up", "total_down")),
    "server/lr",
    "server/update_norm",
    "system/clients_per_s",
    "system/ranks",
    "system/round_s",
    "system/wait_s",
    "system/train_s",
    "system/aggregate_s",
    "system/client_s",
    "system/worker_max_s",
    "system/data",
    "system/backend",
    "system/workers",
    "system/threads",
    "system/slots",
    "system/processes",
    "system/precision",
    "system/graphs",
    "system/slot_efficiency",
    "system/client_steps",
]
EVAL_KEYS = ["eval/loss", "eval/accuracy"]
CLIENT_KEYS = ["client/loss_p90"]
CLIENT_KEYS += [f"client/accuracy_{s}" for s in ("mean", "p10", "p50", "p90", "worst")]


def test_metrics_have_a_fixed_list_of_keys() -> None:
    sim = simulate()
    first, second = Memo(), Memo()
    state, metrics = sim.round(sim.start())
    assert sorted(metrics) == sorted(ROUND_KEYS)
    vecfl.run(sim, 2, test=dict(sim.data.columns), trackers=iter([first, second]), state=state)
    assert first.rounds == second.rounds
    assert [logged["round"] for logged in first.rounds] == [2, 3]
    for logged in first.rounds:
        assert sorted(logged) == sorted(ROUND_KEYS + EVAL_KEYS + CLIENT_KEYS)
    memo = Memo()
    vecfl.run(sim, 1, trackers=[memo])
    assert sorted(memo.rounds[0]) == sorted(ROUND_KEYS + CLIENT_KEYS)


def test_evaluation_by_hand() -> None:
    # At w = 1: FAR and PLAIN lose 1/2, STEEP 2. Clients lose 1/2, (2 + 1/2) / 2 = 1.25 and 2, the
    # empty one has no say. The 90th percentile of (0.5, 1.25, 2) lies 0.8 of the way from 1.25 to
    # 2, the 10th 0.2 of the way from 0.5 to 1.25. Pooled: (1/2 + 2 + 1/2 + 2) / 4.
    sim = tiny([client(FAR), client(STEEP, PLAIN), client(), client(STEEP)])
    state = sim.start()
    assert sim.evaluate(state, sim.data.columns) == {"eval/loss": 1.25, "eval/loss_twice": 1.25}
    expected = {"loss_p90": 1.85, "loss_twice_mean": 1.25, "loss_twice_p10": 0.65}
    expected |= {"loss_twice_p50": 1.25, "loss_twice_p90": 1.85, "loss_twice_worst": 0.5}
    spread = sim.evaluate_clients(state)
    assert spread == pytest.approx({f"client/{name}": v for name, v in expected.items()})


def test_evaluations_carry_their_names() -> None:
    # FAR loses 1/2 and STEEP 2 at w = 1: pooled 1.25; the 90th percentile is 0.5 + 0.9 * 1.5.
    sim = tiny([client(PLAIN), client(PLAIN)])
    other = tiny([client(FAR), client(STEEP)]).data
    state = sim.start()
    metrics = sim.evaluate(state, other.columns, "unseen")
    assert metrics == {"unseen/loss": 1.25, "unseen/loss_twice": 1.25}
    spread = sim.evaluate_clients(state, other, name="unseen_clients")
    assert {key.partition("/")[0] for key in spread} == {"unseen_clients"} and len(spread) == 6
    assert spread["unseen_clients/loss_p90"] == pytest.approx(1.85)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_model_goes_back_into_its_module(problem: str) -> None:
    p = PROBLEMS[problem]
    sim, module = simulate(problem, dtype=torch.float64), p.build()
    before = copy.deepcopy(module.state_dict())
    state = vecfl.run(sim, 2)
    trained = sim.state_dict(state)
    assert list(trained) == list(before)
    module.load_state_dict(trained)
    same_bits(module.state_dict(), trained)
    if problem == "tied":
        assert module.decode.weight is module.encode.weight
    moved = {name for name in before if not torch.equal(before[name], trained[name])}
    assert moved == {n for n in before if not n.startswith(("frozen", "constant"))}
    columns = dict(sim.data.columns)
    x = columns["x"].double() / 255 if problem == "cnn" else columns["x"]
    value, weight = p.loss(module.eval()(x), columns)
    loss = (value.sum() / weight.sum()).item()
    assert sim.evaluate(state, columns)["eval/loss"] == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_repeats_its_bits(backend: str) -> None:
    kind = {"backend": backend, "slots": 3, "seed": 3}
    one, two = simulate("cnn", **kind), simulate("cnn", **kind)
    same_bits(one.state_dict(vecfl.run(one, 2)), two.state_dict(vecfl.run(two, 2)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", [fedavg(**ADAM), fedsgd(lr=0.5, size=4)], ids=["avg", "sgd"])
@pytest.mark.parametrize("problem", ["mlp", "buffers"])
def test_a_round_leaves_its_state_alone(problem: str, algorithm: Any, backend: str) -> None:
    sim = simulate(problem, algorithm, backend=backend, slots=2)
    state, _ = sim.round(sim.start())
    server = {name: t.clone() for name, t in state.server.items()}
    after, _ = sim.round(state)
    last, _ = sim.round(after)
    assert state.round == 1 and after.round == 2 and last.round == 3
    same_bits(state.server, server)
    assert not torch.equal(after.server["w"], state.server["w"])
    again, _ = sim.round(State(1, server))
    same_bits(again.server, after.server)


def test_what_the_user_gave_stays_as_it_was() -> None:
    p = PROBLEMS["cnn"]
    module, data = p.build(), dataset(p.clients())
    before, columns = copy.deepcopy(module), {n: c.clone() for n, c in data.columns.items()}
    task = Task(module, p.loss, example=data.examples(2))
    torch.manual_seed(1)
    random = torch.get_rng_state()
    sim = Simulation(task, data, fedavg(**ADAM), everyone(), seed=4)
    start = {name: t.clone() for name, t in sim.state_dict(sim.start()).items()}
    vecfl.run(sim, 1)
    same_bits(module.state_dict(), before.state_dict())
    assert [type(m) for m in module.modules()] == [type(m) for m in before.modules()]
    same_bits(data.columns, columns)
    same_bits(sim.state_dict(sim.start()), start)
    assert torch.equal(torch.get_rng_state(), random)
    assert sim.data.columns["x"].dtype == torch.uint8  # scaled batch by batch, never as a whole


def sent(problem: str, algorithm: Any, cohort: int, **seeds: int) -> dict[int, Tensor]:
    """What the clients of the first round send, in the order of the cohort."""
    rows: list[dict] = [{}]
    sampler, kind = vecfl.uniform(cohort), {"backend": "loop", "dtype": torch.float64}
    sim = simulate(problem, recorded(algorithm, rows), sampler, **kind, **seeds)
    sim.round(sim.start())
    return {k: rows[0][k][0][0] for k in sim.cohort(0).tolist()}


def test_seeds_act_on_what_they_should() -> None:
    train = fedavg(lr=0.1, batches=Batches(4))
    base = sent("linear", train, 5, seed=1, sample_seed=1)
    # Another sample seed draws another cohort, and whoever is in both sends the same bits.
    other = sent("linear", train, 5, seed=1, sample_seed=2)
    both = base.keys() & other.keys()
    assert base.keys() != other.keys() and any(SIZES[k] > 4 for k in both)
    assert all(torch.equal(base[k], other[k]) for k in both)
    # Another seed keeps the cohort and shuffles anew: visible in whoever has two batches.
    shuffled = sent("linear", train, 5, seed=9, sample_seed=1)
    assert list(shuffled) == list(base)
    assert {k: torch.allclose(base[k], shuffled[k]) for k in base} == {
        k: SIZES[k] <= 4 for k in base
    }
    # Without a sample seed it is the seed that draws.
    assert list(sent("linear", train, 5, seed=2)) == list(other)


def test_the_seed_is_of_no_effect_where_nothing_is_drawn() -> None:
    one, two = (sent("linear", fedsgd(lr=1.0), C, seed=s, sample_seed=0) for s in (1, 2))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)
    one, two = (sent("mlp", fedsgd(lr=1.0), C, seed=s, sample_seed=0) for s in (1, 2))
    assert all(torch.allclose(one[k], two[k]) == (SIZES[k] == 0) for k in one)  # dropout


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_population_of_one(backend: str) -> None:
    # lr = 1/2 halves w at each of the 2 * 3 steps: losses (1 + 1/4 + ... + 1/4^5) / 2 over 6.
    data = dataset([client(PLAIN, PLAIN, PLAIN)])
    algorithm = fedavg(lr=0.5, batches=Batches(1, epochs=2))
    task = Task(Line(), squared, example=data.examples(2))
    sim = Simulation(task, data, algorithm, vecfl.uniform(1), backend=backend)
    state, metrics = sim.round(sim.start())
    assert state.server["w"].tolist() == [2.0**-6]
    assert metrics["train/loss"] == pytest.approx((1 - 4.0**-6) / (1 - 1 / 4) / 12, rel=1e-6)
    assert (metrics["system/slots"], metrics["train/clients"]) == (1, 1)


def test_the_learning_rate_of_a_round_is_told() -> None:
    """0.2 by a schedule that halves each round, times 0.1 after a plateau: of a loss that is said
    to be best at infinity every round is one."""
    fed = fedavg(lr=vecfl.scaled(0.2, vecfl.step_decay(1, 0.5)), batches=Batches(4))
    sim = simulate(algorithm=vecfl.clients_on_plateau(fed, "train/loss", "max", 0.1, 0))
    state, told = sim.start(), []
    for _ in range(3):
        state, metrics = sim.round(state)
        told.append(metrics["train/lr"])
        state = sim.observe(state, metrics | {"train/loss": 1.0})
    # the first value is better than none; the second is not
    assert told == pytest.approx([0.2, 0.1, 0.05 * 0.1])
    sim = simulate(algorithm=fedsgd(lr=0.3, size=4))
    assert sim.round(sim.start())[1]["train/lr"] == 0
