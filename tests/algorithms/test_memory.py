"""SCAFFOLD, FedDyn and FedNova: identities, odd clients, what stands around them, what is refused.

`oracles/test_memory.py` holds them to the plain loop.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vecfl
from vecfl import Batches, InputError, Simulation, Task
from vecfl.algorithms import Algorithm, Begin, Starting
from vecfl.engine.sequence import Sequence
from vecfl.layout import Entry, Layout

from ..oracles.bridge import dataset
from ..oracles.loop import Columns
from ..oracles.tasks import PROBLEMS
from ..oracles.tiny import FAR, PLAIN, STEEP, Line, client, squared

TWO = Batches(4, epochs=2)
KEEPING = [
    lambda **how: vecfl.scaffold(**how),
    lambda **how: vecfl.scaffold(option=1, **how),
    lambda **how: vecfl.feddyn(alpha=0.5, **how),
]
NAMES = ["scaffold", "option 1", "feddyn"]


def simulation(algorithm: Algorithm, clients: list[Columns], **how: Any) -> Simulation:
    data = dataset(clients)
    task = Task(Line(), squared, example=client(FAR, STEEP))
    how = {"backend": "loop", "dtype": torch.float64, "sampler": vecfl.everyone()} | how
    return Simulation(task, data, algorithm, how.pop("sampler"), **how)


def played(algorithm: Algorithm, clients: list[Columns], rounds: int = 3, **how: Any) -> list[Any]:
    """The states after each round, and the last metrics."""
    sim = simulation(algorithm, clients, **how)
    state, found = sim.start(), []
    for _ in range(rounds):
        state, metrics = sim.round(state)
        state = sim.observe(state, metrics)
        found.append({name: t.clone() for name, t in state.server.items()})
        assert state.table is None or state.table.round == state.round
    found.append(metrics)
    return found


def models(algorithm: Algorithm, **how: Any) -> list[float]:
    clients = [client(FAR), client(STEEP, PLAIN, STEEP), client(PLAIN, FAR)]
    return [server["w"].item() for server in played(algorithm, clients, **how)[:-1]]


def drawn(*cohorts: list[int]) -> Callable[[Tensor, int, int], Tensor]:
    return lambda eligible, seed, round: torch.tensor(cohorts[round], dtype=torch.int64)


def test_scaffold_without_variates_is_fedavg() -> None:
    """The corrections at zero; the messages and the table are as they were."""
    plain = vecfl.scaffold(lr=0.2, batches=TWO)

    def begin(server: dict[str, Tensor], starting: Starting) -> Begin:
        made = plain.begin(server, starting)
        return Begin(made.model, torch.zeros_like(made.bias))

    fedavg = vecfl.fedavg(lr=0.2, batches=TWO, weights=vecfl.uniform_weights)
    assert models(replace(plain, begin=begin)) == pytest.approx(models(fedavg), rel=1e-14)
    assert models(plain)[0] == models(fedavg)[0]  # the first round has none
    assert abs(models(plain)[1] - models(fedavg)[1]) > 1e-2


@pytest.mark.parametrize("how", [{}, {"optimizer": vecfl.momentum(0.8)}, {"mu": 0.7}])
def test_fednova_with_equal_steps_is_fedavg(how: dict[str, Any]) -> None:
    """All |a| are the same, tau_eff, too, and cancel."""
    steps = {"lr": 0.1, "batches": Batches(2, steps=5)}
    fedavg = vecfl.fedprox(mu=0.0, **steps, **how) if "mu" not in how else None
    fedavg = fedavg or vecfl.fedprox(**steps, **how)
    assert models(vecfl.fednova(**steps, **how)) == pytest.approx(models(fedavg), rel=1e-12)
    other = {"lr": 0.1, "batches": Batches(2, steps=(5, 1, 3))}
    fedavg = vecfl.fedprox(**{"mu": 0.0} | other | how)
    assert abs(models(vecfl.fednova(**other, **how))[0] - models(fedavg)[0]) > 1e-3


def test_feddyn_begins_with_the_pull_of_fedprox() -> None:
    """All N = 3 come: w - u - alpha u / alpha, twice the move of FedProx with mu = alpha."""
    common = {"lr": 0.2, "batches": TWO}
    prox = vecfl.fedprox(mu=0.5, weights=vecfl.uniform_weights, **common)
    first, right = models(vecfl.feddyn(alpha=0.5, **common))[0], models(prox)[0]
    assert first - 1 == pytest.approx(2 * (right - 1), rel=1e-14) and abs(right - 1) > 0.05


@pytest.mark.parametrize("make", KEEPING, ids=NAMES)
def test_variates_take_the_rate_that_clients_really_had(make: Callable[..., Algorithm]) -> None:
    """Of a schedule, and of a plateau: the rate is halved behind rounds 2 and 3."""
    scheduled = make(lr=lambda t: (0.2, 0.2, 0.1, 0.05)[t], batches=TWO)
    plateau = vecfl.clients_on_plateau(
        make(lr=0.2, batches=TWO), "train/clients", "max", factor=0.5, patience=0
    )
    assert models(plateau, rounds=4) == pytest.approx(models(scheduled, rounds=4), rel=1e-12)
    assert models(scheduled, rounds=4) != models(make(lr=0.2, batches=TWO), rounds=4)


@pytest.mark.parametrize("make", KEEPING, ids=NAMES)
def test_who_takes_no_step_keeps_its_row_and_stands_still(make: Callable[..., Algorithm]) -> None:
    """Clients 1 (no work after round 1) and 2 (no examples) count 1 and pull the mean to w."""

    def epochs(clients: Tensor, round: int, seed: int) -> Tensor:
        return torch.where((clients == 1) & (round > 0), 0, 2)

    clients = [client(FAR), client(STEEP), client()]
    sim = simulation(make(lr=0.1, batches=Batches(4, epochs=epochs)), clients)
    state, _ = sim.round(sim.start())
    assert state.table is not None
    (name,) = state.table.shapes
    before = state.table.gather(torch.arange(3))[name][:, 0].tolist()
    state, metrics = sim.round(state)
    after = state.table.gather(torch.arange(3))[name][:, 0].tolist()
    assert after[1] == before[1] != 0 and after[2] == before[2] == 0 and after[0] != before[0]
    assert (metrics["train/clients"], metrics["train/dropped_clients"]) == (3, 0)


@pytest.mark.parametrize("make", KEEPING[:2], ids=NAMES[:2])
def test_steps_of_size_zero_leave_the_variates(make: Callable[..., Algorithm]) -> None:
    servers = played(make(lr=lambda t: 0.1 * (t != 1), batches=TWO), [client(FAR), client(STEEP)])
    assert servers[0]["w"] == servers[1]["w"] != servers[2]["w"]
    assert servers[0]["variate"] == servers[1]["variate"] != 0


@pytest.mark.parametrize("make", KEEPING, ids=NAMES)
def test_lost_clients_are_as_if_they_had_not_been_drawn(make: Callable[..., Algorithm]) -> None:
    clients = [client(FAR), client(STEEP), client(PLAIN)]
    trace = torch.tensor([[False, True, False], [True, False, False], [False, False, False]])
    algorithm = make(lr=0.1, batches=TWO)
    lost = played(algorithm, clients, client_dropout=trace)
    right = played(algorithm, clients, sampler=drawn([0, 2], [1, 2], [0, 1, 2]))
    assert lost[:-1] == right[:-1]


@pytest.mark.parametrize("make", KEEPING, ids=NAMES)
def test_a_cohort_of_nobody_or_of_no_finite_client_changes_nothing(
    make: Callable[..., Algorithm],
) -> None:
    clients = [client(FAR), client((math.nan, 0.0)), client(STEEP)]
    first, second, third, metrics = played(
        make(lr=0.1, batches=TWO), clients, sampler=drawn([0, 2], [1], [])
    )
    assert first == second == third and first["w"] != 1


@pytest.mark.parametrize("make", KEEPING, ids=NAMES)
def test_a_client_that_comes_twice_is_refused(make: Callable[..., Algorithm]) -> None:
    with pytest.raises(InputError, match="client 0 stands more than once in the cohort, and "):
        played(make(lr=0.1, batches=TWO), [client(FAR)], sampler=drawn([0, 0]))


def test_the_earlier_pass_takes_the_same_examples() -> None:
    """Option 1 under a cap: the gradient at w = 1 of the two of FAR, STEEP and PLAIN that train.

    All in one batch, so option 2, whose one step begins there, finds the same.
    """
    clients = [client(FAR, STEEP, PLAIN)] * 4
    how = {"lr": 0.1, "batches": Batches(4, max_examples=2)}
    one, two = (played(vecfl.scaffold(option=o, **how), clients, 1, seed=5)[0] for o in (1, 2))
    assert one["variate"].item() == pytest.approx(two["variate"].item(), rel=1e-14)
    gradients = [(g + h) / 2 for g, h in ((-1, 4), (-1, 1), (4, 1))]
    possible = {round(sum(g) / 4, 9) for g in _fours(gradients)}
    assert round(one["variate"].item(), 9) in possible


def _fours(values: list[float]) -> list[tuple[float, ...]]:
    return [(a, b, c, d) for a in values for b in values for c in values for d in values]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_earlier_pass_found_goes_to_its_client(workers: int) -> None:
    """The third client has two batches: in two slots it ends its pass with, and above, the second.

    Gradients at w = 1: -1, 4 and 1.
    """
    algorithm = vecfl.scaffold(lr=0.1, option=1, batches=Batches(1))
    clients = [client(FAR), client(STEEP), client(PLAIN, PLAIN)]
    sim = simulation(algorithm, clients, backend="vmap", slots=2, workers=workers)
    state, _ = sim.round(sim.start())
    assert state.table is not None
    assert state.table.gather(torch.arange(3))["variate"][:, 0].tolist() == [-1, 4, 1]
    assert state.server["variate"].item() == pytest.approx(4 / 3)


def test_measured_arrangements_make_the_passes_too() -> None:
    """They write no rows, and no other model comes out."""
    algorithm, clients = vecfl.scaffold(lr=0.1, option=1, batches=TWO), [client(FAR), client(STEEP)]
    auto = {"backend": "auto", "workers": "auto", "slots": "auto"}
    measured, right = played(algorithm, clients, **auto), played(algorithm, clients)
    for some, one in zip(measured[:-1], right[:-1], strict=True):
        torch.testing.assert_close(some, one, rtol=1e-12, atol=0)


def test_the_time_of_the_earlier_pass_counts_and_its_steps_do_not() -> None:
    clients = [client(FAR)] * 4
    metrics = played(vecfl.scaffold(lr=0.1, option=1, batches=TWO), clients, workers=2, slots=1)[-1]
    assert metrics["system/client_steps"] == 8 and metrics["system/slot_efficiency"] == 1
    assert metrics["train/loss"] > 0


def test_stacked_makes_gradients_under_variates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's own step would leave the correction out."""
    p, rates = PROBLEMS["linear"], []
    step = Sequence.step
    monkeypatch.setattr(Sequence, "step", lambda self, *a: rates.append(a[-1]) or step(self, *a))
    data = dataset(p.clients())
    task = Task(p.build(), p.loss, example=data.examples(2))
    for algorithm, own in ((vecfl.scaffold, False), (vecfl.fedavg, True)):
        made = algorithm(lr=0.1, batches=TWO)
        sim = Simulation(task, data, made, vecfl.everyone(), backend="stacked", slots=2)
        rates.clear()
        sim.round(sim.start())
        assert {rate is not None for rate in rates} == {own}


def test_messages_stand_side_by_side_for_transforms() -> None:
    """Two entries and a buffer: 2 P = 16; names of the second part have its name in front."""
    layout = Layout(
        (Entry("a", (2, 2), 0, torch.float32), Entry("b", (1,), 4, torch.float32)),
        (Entry("calls", (3,), 5, torch.int64),),
    )
    both = layout.of_message(("model", "variate"))
    assert (both.size, both.trainable, layout.of_message(("model",))) == (16, 5, layout)
    assert [(e.name, e.offset) for e in both.params + both.buffers] == [
        *(("a", 0), ("b", 4), ("calls", 5)),
        *(("variate/a", 8), ("variate/b", 12), ("variate/calls", 13)),
    ]
    seen: list[Any] = []
    looks = vecfl.Transform(
        "looks",
        init=lambda layout: seen.append(layout.size) or {},
        table=lambda size: seen.append(size) or {},
        client=lambda own, done, upload: seen.append(done.round.layout.size) or upload,
        server=lambda own, sums, round: seen.append(round.layout.size) or (sums, own),
        metrics=lambda own, sums, round: seen.append(round.layout.size) or {},
    )
    played(vecfl.chain(vecfl.scaffold(lr=0.1, batches=TWO), looks, looks), [client(FAR)], 1)
    assert set(seen) == {2} and len(seen) > 10


def test_bounds_by_layer_name_the_parts_of_a_message() -> None:
    """FAR sends -1/4 and the variate -1: each is cut to its own bound."""
    algorithm = vecfl.scaffold(lr=0.25, batches=Batches(4))
    bounds = {"w": 0.125, "variate/w": 0.5}
    clipped = vecfl.chain(algorithm, vecfl.clip_by_layer(bounds))
    server = played(clipped, [client(FAR)], 1)[0]
    assert server["w"].item() == pytest.approx(1.125, rel=1e-9)
    assert server["variate"].item() == pytest.approx(-0.5, rel=1e-9)
    with pytest.raises(InputError, match="'variate/w' has no bound"):
        played(vecfl.chain(algorithm, vecfl.clip_by_layer({"w": 1.0})), [client(FAR)], 1)


def test_the_update_that_is_measured_is_that_of_the_model() -> None:
    """FAR moves 1/4, its variate 1."""
    metrics = played(vecfl.scaffold(lr=0.25, batches=Batches(4)), [client(FAR)], 1, statistics=2)[1]
    found = [metrics[f"update/{name}"] for name in ("norm_mean", "aggregate_norm", "cosine_mean")]
    assert found == pytest.approx([0.25, 0.25, 1.0], rel=1e-12)
    assert metrics["server/update_norm"] == pytest.approx(0.25)


def test_tau_eff_is_told() -> None:
    """Two and one step, weights 1 and 3; the normalised mean is 89/128 (`hand_memory.FEDNOVA`)."""
    algorithm = vecfl.fednova(lr=0.25, batches=Batches(4, epochs=(2, 1)))
    clients = [client(FAR), client(STEEP, STEEP, STEEP)]
    metrics = played(algorithm, clients, 1)[-1]
    assert metrics["train/tau_eff"] == 1.25
    assert metrics["server/update_norm"] == pytest.approx(1.25 * 89 / 128, rel=1e-12)
    assert math.isnan(played(algorithm, clients, 1, sampler=drawn([]))[-1]["train/tau_eff"])


@pytest.mark.parametrize("weights", [vecfl.by_examples, vecfl.uniform_weights])
def test_who_takes_no_step_has_no_direction_in_fednova(weights: Any) -> None:
    algorithm = vecfl.fednova(lr=0.25, batches=Batches(4), weights=weights)
    alone = played(algorithm, [client(FAR)], 1)
    beside = played(algorithm, [client(FAR), client()], 1)
    assert beside[0] == alone[0] and beside[1]["train/clients"] == 1


COMMON: dict[str, Any] = {"lr": 0.1, "batches": TWO}
NO_SGD = (
    "scaffold: its variates are means of gradients, which only plain SGD adds up; give "
    "optimizer=sgd() without weight_decay, not "
)
UNKNOWN = (
    "fednova: coefficients are known of sgd() and momentum(beta), without weight_decay, and of "
    "sgd() with mu, not of "
)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: vecfl.scaffold(option=3, **COMMON), "scaffold(option=3): must be 1 or 2"),
        (lambda: vecfl.scaffold(optimizer=vecfl.adam(), **COMMON), f"{NO_SGD}adam"),
        (lambda: vecfl.scaffold(optimizer=vecfl.momentum(), **COMMON), f"{NO_SGD}momentum"),
        (lambda: vecfl.scaffold(optimizer=vecfl.sgd(0.1), **COMMON), f"{NO_SGD}sgd"),
        (
            lambda: vecfl.scaffold(
                optimizer=vecfl.within_round(vecfl.sgd(), vecfl.by_step(vecfl.cosine(9))), **COMMON
            ),
            f"{NO_SGD}within_round cosine(9, 0.0) sgd",
        ),
        (
            lambda: vecfl.feddyn(alpha=0.0, **COMMON),
            "feddyn(alpha=0.0): must be positive and finite",
        ),
        (lambda: vecfl.fednova(optimizer=vecfl.adam(), **COMMON), f"{UNKNOWN}adam"),
        (
            lambda: vecfl.fednova(optimizer=vecfl.momentum(nesterov=True), **COMMON),
            f"{UNKNOWN}nesterov",
        ),
        (lambda: vecfl.fednova(optimizer=vecfl.sgd(0.1), **COMMON), f"{UNKNOWN}sgd"),
        (
            lambda: vecfl.fednova(optimizer=vecfl.momentum(weight_decay=0.1), **COMMON),
            f"{UNKNOWN}momentum",
        ),
        (
            lambda: vecfl.fednova(optimizer=vecfl.momentum(), mu=0.1, **COMMON),
            f"{UNKNOWN}momentum with mu 0.1",
        ),
        (
            lambda: played(vecfl.fednova(mu=10.0, **COMMON), [client(FAR)]),
            "fednova: lr * mu must be below 1, not 1",
        ),
    ],
)
def test_what_the_papers_do_not_cover_is_refused(make: Callable[[], Any], line: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        make()


@pytest.mark.parametrize("name", ["clip", "sign", "random"])
@pytest.mark.parametrize("kind", ["scaffold", "feddyn"])
def test_what_the_server_keeps_is_the_mean_of_what_clients_keep(kind: str, name: str) -> None:
    """Whatever transforms make of the messages, with clients that come now and then."""
    made = {
        "scaffold": vecfl.scaffold(lr=0.1, batches=TWO),
        "feddyn": vecfl.feddyn(lr=0.1, alpha=0.3, batches=TWO),
    }[kind]
    transform = {
        "clip": vecfl.clip_by_norm(0.05),
        "sign": vecfl.error_feedback(vecfl.scaled_sign()),
        "random": vecfl.random_k(0.5),
    }[name]
    problem = PROBLEMS["mlp"]
    data = dataset(problem.clients())
    task = Task(problem.build(), problem.loss, example=data.examples(2))
    how: dict[str, Any] = {"dtype": torch.float64, "backend": "loop", "seed": 3}
    sim = Simulation(task, data, vecfl.chain(made, transform), vecfl.uniform(3), **how)
    state = vecfl.run(sim, 5)
    assert state.table is not None
    rows = state.table.gather(torch.arange(data.num_clients))
    own, server = {"scaffold": ("variate",) * 2, "feddyn": ("gradient", "h")}[kind]
    mean = rows[own].mean(0)
    assert mean.abs().max() > 1e-3
    torch.testing.assert_close(mean, state.server[server], rtol=1e-9, atol=1e-12)


def test_the_earlier_pass_is_laid_out_anew_with_its_cohort() -> None:
    sim = simulation(vecfl.scaffold(option=1, **COMMON), [client(FAR), client(PLAIN)], slots=2)
    sim.trainer.rearrange(replace(sim.arrangement, slots=1))
    assert sim.trainer.before is not None
    assert sim.trainer.before.workers[0].slots.number == 1


def test_variates_travel_both_ways() -> None:
    """Two clients, rows of one number of 8 bytes: SCAFFOLD sends and receives two, FedDyn one."""
    told = {}
    for algorithm in (vecfl.scaffold(**COMMON), vecfl.feddyn(alpha=0.1, **COMMON)):
        metrics = played(algorithm, [client(FAR), client(PLAIN)], 1)[-1]
        told[algorithm.name] = metrics["comm/up_bytes"], metrics["comm/down_bytes"]
    assert told == {"scaffold": (32, 32), "feddyn": (16, 16)}
