"""What stands around an algorithm's server: EMA, plateaus and replay, by hand and beside torch."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vecfl
from vecfl.algorithms import Algorithm, carrying
from vecfl.errors import InputError
from vecfl.replay import Training

from ..oracles.bridge import dataset
from ..oracles.loop import Columns
from ..oracles.tasks import PROBLEMS
from ..oracles.tiny import FAR, PLAIN, STEEP, Line, Tracked, client, squared

ONE = vecfl.Batches(1)
HALF = vecfl.fedavg(lr=0.5, batches=ONE)  # PLAIN's w is halved in every round
Around = Callable[[Algorithm, vecfl.Task], Algorithm]


def simulate(
    algorithm: Algorithm, around: Around = lambda algorithm, task: algorithm, **how: Any
) -> vecfl.Simulation:
    """One client with PLAIN, in float64."""
    module = how.pop("module", Line())
    data = dataset(how.pop("clients", [client(PLAIN)]))
    task = vecfl.Task(module, squared, example=data.examples(2))
    sampler = how.pop("sampler", vecfl.everyone())
    how = {"dtype": torch.float64, "backend": "loop", **how}
    return vecfl.Simulation(task, data, around(algorithm, task), sampler, **how)


def play(
    sim: vecfl.Simulation, rounds: int, told: list[dict[str, Any]] | None = None
) -> tuple[list[float], list[dict[str, Any]], vecfl.State]:
    """w after each round, the metrics and the last state; `told` is added to the metrics."""
    state, found, metrics = sim.start(), [], []
    for t in range(rounds):
        state, row = sim.round(state)
        state = sim.observe(state, row | (told[t] if told else {}))
        found.append(sim.state_dict(state)["w"].item())
        metrics.append(row)
    return found, metrics, state


def test_ema_by_hand() -> None:
    # w: 1/2, 1/4, 1/8. The mean, decay 3/4, from 1: 3/4 + 1/8 = 7/8; 21/32 + 2/32 = 23/32;
    # 69/128 + 4/128 = 73/128. The loss w^2 / 2 of a round is that at w, not at the mean.
    sim = simulate(vecfl.ema(HALF, 0.75))
    found, metrics, state = play(sim, 3)
    assert found == [7 / 8, 23 / 32, 73 / 128]
    assert [row["train/loss"] for row in metrics] == [1 / 2, 1 / 8, 1 / 32]
    assert state.server["w"].item() == 1 / 8
    data = {"x": torch.ones(1), "y": torch.zeros(1)}
    assert sim.evaluate(state, data)["eval/loss"] == pytest.approx((73 / 128) ** 2 / 2)
    assert sim.save(state)["model"]["w"].item() == 73 / 128


def test_ema_averages_parameters_and_leaves_buffers() -> None:
    algorithm = vecfl.ema(vecfl.fedavg(lr=0.5, batches=ONE), 0.5)
    sim = simulate(algorithm, module=Tracked(), clients=[client(PLAIN, PLAIN)])
    state = play(sim, 2)[2]
    model = sim.state_dict(state)
    # Steps: w = 1/4 and 1/16; the mean 5/8, then 11/32. Four calls, their trace is that of w.
    assert model["w"].item() == 11 / 32 and model["calls"].item() == 4
    assert model["trace"].item() == state.server["w"][-1].item() != 0


def test_a_round_with_nobody_moves_neither_mean_nor_replay() -> None:
    def somebody_first(eligible: Tensor, seed: int, round: int) -> Tensor:
        return torch.tensor([0] if round == 0 else [], dtype=torch.int64)

    def around(algorithm: Algorithm, task: vecfl.Task) -> Algorithm:
        return vecfl.ema(vecfl.replay(algorithm, task, client(FAR), **REPLAY), 0.5)

    # 1/2 by the client, 7/8 by the server's step on FAR with lr 1/4; the mean is 15/16.
    found, _, state = play(simulate(HALF, around, sampler=somebody_first), 3)
    assert found == [15 / 16] * 3 and state.server["w"].item() == 7 / 8


REPLAY: dict[str, Any] = {"lr": 0.25, "batches": vecfl.Batches(1, steps=1)}


def test_replay_by_hand() -> None:
    # The client halves w, then two steps on FAR (gradient w - 2) with lr 1/4:
    # 1/2 -> 7/8 -> 37/32. Then 37/64 -> 239/256 -> 1229/1024.
    replay = {"lr": 0.25, "batches": vecfl.Batches(1, steps=2)}
    sim = simulate(HALF, lambda a, task: vecfl.replay(a, task, client(FAR), **replay))
    assert play(sim, 2)[0] == [37 / 32, 1229 / 1024]


def test_replay_keeps_its_momentum() -> None:
    # Momentum 1/2, one step a round on PLAIN (gradient w), lr 1/4. v = 1/2, w = 1/2 - 1/8 = 3/8;
    # the client: 3/16; v = 1/4 + 3/16 = 7/16, w = 3/16 - 7/64 = 5/64. Anew it would be 9/64.
    replay = REPLAY | {"optimizer": vecfl.momentum(0.5)}
    sim = simulate(HALF, lambda a, task: vecfl.replay(a, task, client(PLAIN), **replay))
    assert play(sim, 2)[0] == [3 / 8, 5 / 64]


def test_replay_of_epochs_and_its_clip_by_hand() -> None:
    # Two epochs of two batches on STEEP (gradient 4 w), lr 1/8, norms cut to 1. From w = 1/2:
    # 2 is cut to 1, w = 3/8; 3/2 is cut, 1/4; 1 stays, 1/8; 1/2 stays, 1/16.
    replay = {"lr": 0.125, "batches": vecfl.Batches(1, epochs=2), "clip": 1.0}
    sim = simulate(HALF, lambda a, task: vecfl.replay(a, task, client(STEEP, STEEP), **replay))
    assert play(sim, 1)[0] == [1 / 16]


def test_replay_draws_leave_those_of_clients_alone() -> None:
    """A server that replays with a learning rate of 0 has the bits of one without, with dropout."""
    problem = PROBLEMS["mlp"]
    data = dataset(problem.clients())
    task = vecfl.Task(problem.build(), problem.loss, example=data.examples(2))
    plain, models = vecfl.fedavg(lr=0.1, batches=vecfl.Batches(4)), []
    (own,) = problem.clients((9,))
    for lr in (None, 0.0, 0.1):
        still = {"lr": lr, "batches": vecfl.Batches(4, epochs=2)}
        algorithm = plain if lr is None else vecfl.replay(plain, task, own, **still)
        sim = vecfl.Simulation(task, data, algorithm, vecfl.uniform(4), seed=3, backend="loop")
        models.append(vecfl.run(sim, 2).server["w"])
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])


def test_replay_has_the_same_bits_for_any_number_of_threads() -> None:
    """Gradients of LayerNorm are sums over examples that threads would share; its biases begin at
    0, so that their last bits are seen."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.LayerNorm(600), torch.nn.Linear(600, 9))
    x, y = torch.randn(512, 600), torch.randint(9, (512,))
    task = vecfl.Task(module, vecfl.cross_entropy, example={"x": x[:2], "y": y[:2]})
    rule = vecfl.engine.LocalRule(vecfl.sgd(), vecfl.Batches(512, epochs=3), 1.0)
    training = Training(task, {"x": x, "y": y}, rule)
    layout = task.layout
    w, found, before = layout.flatten(task.module), [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(training.after({"w": w}, vecfl.algorithms.Round(0, 0, layout))["w"])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found) and not torch.equal(found[0], w)


def lengths(values: list[float | None], direction: str, patience: int) -> list[float]:
    """The server's factor by torch's scheduler after each round with a value."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, direction, 0.5, patience, threshold=0.0, eps=0.0
    )
    found = []
    for value in values:
        if value is not None:
            scheduler.step(value)
        found.append(optimizer.param_groups[0]["lr"])
    return found


VALUES = [3.0, 3.0, 2.5, 2.6, None, math.nan, 2.5, 2.0, 7.0, 8.0, math.inf, None, 9.0, -1.0, 0.0]


@pytest.mark.parametrize("patience", [0, 1, 2, 3])
@pytest.mark.parametrize("direction", ["min", "max"])
@pytest.mark.parametrize("values", [VALUES, [math.nan, *VALUES[::-1]]])
def test_plateaus_as_in_torch(values: list[float | None], direction: str, patience: int) -> None:
    made = vecfl.server_on_plateau(HALF, "eval/loss", direction, 0.5, patience)
    layout = vecfl.layout.Layout((vecfl.layout.Entry("w", (1,), 0, torch.float64),))
    state, found = made.init(torch.ones(1, dtype=torch.float64), layout), []
    for value in values:
        told: dict[str, Any] = {"train/loss": 1.0} | ({} if value is None else {"eval/loss": value})
        assert made.observe is not None
        state = made.observe(state, told)
        found.append(state["observed/server/factor"].item())
    assert found == lengths(values, direction, patience)
    assert min(found) < 1


def losses(*values: float) -> list[dict[str, Any]]:
    return [{"eval/loss": value} for value in values]


def test_a_plateau_of_the_server_by_hand() -> None:
    # Patience 0, factor 1/2; the client halves w. Losses 2 and 1, each better: 1/2, 1/4, and 1/8 in
    # round 3. That has 1.5, worse: round 4 goes half of the way from 1/8 to 1/16, 3/4 of 1/8. It
    # has 1 again, no better: round 5 goes a quarter of the way to the half, and 7/8 remain.
    made = vecfl.server_on_plateau(HALF, "eval/loss", "min", 0.5, 0)
    found, metrics, _ = play(simulate(made), 5, losses(2.0, 1.0, 1.5, 1.0, 0.5))
    assert found[:2] == [1 / 2, 1 / 4]
    assert [row["server/lr_factor"] for row in metrics] == [1, 1, 1, 0.5, 0.25]
    assert [row["server/lr"] for row in metrics] == [1, 1, 1, 0.5, 0.25]
    expected = [1 / 2, 1 / 4, 1 / 8, 1 / 8 * 3 / 4, 1 / 8 * 3 / 4 * 7 / 8]
    assert found == expected


def test_a_plateau_of_the_clients_by_hand() -> None:
    # lr 1/2 leaves half of w; after a worse value lr 1/8 leaves 7/8, by a number or a function.
    for lr in (0.5, lambda round: 0.5):
        plain = vecfl.fedavg(lr=lr, batches=ONE)
        made = vecfl.clients_on_plateau(plain, "eval/accuracy", "max", 0.25, 0)
        told = [{"eval/accuracy": value} for value in (0.5, 0.5, 0.9)]
        found, metrics, _ = play(simulate(made), 3, told)
        assert found == [1 / 2, 1 / 4, 7 / 32]
        assert [row["train/lr_factor"] for row in metrics] == [1, 1, 0.25]
        assert [row["server/lr"] for row in metrics] == [1, 1, 1]


def test_both_plateaus_stand_side_by_side() -> None:
    # Clients halve w, the server goes half of that way: 3/4; then lr 1/4 and a quarter of the way.
    made = vecfl.server_on_plateau(HALF, "eval/loss", "min", 0.5, 0)
    made = vecfl.clients_on_plateau(made, "eval/loss", "min", 0.5, 0)
    found, _, state = play(simulate(made), 3, losses(1.0, 1.0, 1.0))
    assert found == [1 / 2, 1 / 4, 1 / 4 * (1 - 0.5 * 0.25)]
    assert {k for k in state.server if "/" in k} == {
        f"observed/{who}/{what}"
        for who in ("server", "clients")
        for what in ("factor", "best", "bad")
    }


def test_a_plateau_leaves_buffers_to_their_mean() -> None:
    made = vecfl.server_on_plateau(HALF, "eval/loss", "min", 0.5, 0)
    sim = simulate(made, module=Tracked())
    state = play(sim, 3, losses(1.0, 1.0, 1.0))[2]
    assert sim.state_dict(state)["calls"].item() == 3


def test_a_round_with_nobody_is_no_plateau() -> None:
    """Its training loss is NaN, and so is that of models that diverged, which are no better."""

    def somebody_first(eligible: Tensor, seed: int, round: int) -> Tensor:
        return torch.tensor([0] if round == 0 else [], dtype=torch.int64)

    made = vecfl.server_on_plateau(HALF, "train/loss", "min", 0.5, 0)
    state = play(simulate(made, sampler=somebody_first), 3)[2]
    assert state.server["observed/server/factor"].item() == 1
    broken = {name: t * math.nan for name, t in client(PLAIN).items()}
    state = play(simulate(made, clients=[broken]), 3)[2]
    assert state.server["observed/server/factor"].item() == 0.125
    assert made.observe is not None
    nothing = {"train/clients": 0, "train/dropped_clients": 0, "train/loss": math.nan}
    again = made.observe(state.server, nothing | {"train/loss": 5.0})
    assert again["observed/server/best"].item() == 5  # a value is a value


def test_a_plateau_around_an_algorithm_that_observes_too() -> None:
    """The clients' rate falls, and mu still follows the loss."""
    inner = vecfl.fedprox_adaptive(lr=0.5, batches=ONE, step=0.25, patience=1)
    made = vecfl.clients_on_plateau(inner, "train/loss", "min", 0.5, 0)
    state, found = simulate(made).start().server, []
    for loss in (1.0, 2.0, 3.0, 2.5):
        assert made.observe is not None
        state = made.observe(state, {"train/loss": loss})
        rule = made.local(state, made.rule)
        found.append((rule.lr, rule.mu))
    # The best is 1: three values that are no better halve the rate. Two rises, then a fall.
    assert found == [(0.5, 0), (0.25, 0.25), (0.125, 0.5), (0.0625, 0.25)]


def test_a_plateau_counts_in_float64_in_a_float32_run() -> None:
    made = vecfl.server_on_plateau(HALF, "eval/loss", "min", 0.1, 0)
    made = vecfl.clients_on_plateau(made, "eval/loss", "min", 0.1, 0)
    state = play(simulate(made, dtype=torch.float32), 21, losses(*[1.0] * 21))[2]
    observed = {name: t for name, t in state.server.items() if name.startswith("observed/")}
    assert len(observed) == 6 and state.server["w"].dtype == torch.float32
    assert all(t.dtype == torch.float64 for t in observed.values())
    for who in ("server", "clients"):  # 20 falls; 1e-20 in float32 is wrong in the eighth digit
        assert observed[f"observed/{who}/factor"].item() == pytest.approx(1e-20, rel=1e-14)


def test_ema_around_an_algorithm_that_keeps_another_model() -> None:
    """The mean is over w; what is no parameter is that of the model that is kept inside."""
    inner = replace(HALF, model=lambda server: server["w"] + 1)
    sim = simulate(vecfl.ema(inner, 0.5), module=Tracked(), clients=[client(PLAIN, PLAIN)])
    state = play(sim, 2)[2]
    model = sim.state_dict(state)
    # w: 1/4 and 1/16, their mean 11/32, as without; four calls, one more in the model inside.
    assert model["w"].item() == 11 / 32 and model["calls"].item() == 5
    assert model["trace"].item() == state.server["w"][-1].item() + 1


def test_ema_stands_outside_of_what_moves_the_model() -> None:
    late = {"delay": vecfl.stale(0.5), "buffer": 1}
    for right in (
        lambda: vecfl.ema(vecfl.server_on_plateau(HALF, "eval/loss", "min"), 0.5),
        lambda: vecfl.clients_on_plateau(vecfl.ema(HALF, 0.5), "eval/loss", "min"),
        lambda: vecfl.delayed(vecfl.ema(HALF, 0.5), **late),
    ):
        simulate(right()).start()
    inside = vecfl.clients_on_plateau(vecfl.delayed(vecfl.ema(HALF, 0.5), **late), "a/b", "min")
    for algorithm, name in (
        (vecfl.server_on_plateau(inside, "eval/loss", "min"), inside.name),
        (with_replay(client(PLAIN), around=vecfl.ema(HALF, 0.5)), "fedavg, ema 0.5"),
    ):
        with pytest.raises(InputError) as error:
            simulate(algorithm).start()
        assert str(error.value) == (
            f"{name}: give ema behind replay and server_on_plateau, in Python around them: "
            "ema(replay(...)); its mean would be of models that the run never has"
        )


@pytest.mark.parametrize("every", [1, 2, 4])
def test_runs_in_two_calls_are_one_under_a_plateau(every: int) -> None:
    """Where a call ends at a multiple of the period; another end is an evaluation more."""
    made, servers = vecfl.server_on_plateau(HALF, "client/loss_p90", "max", 0.5, 0), []
    for parts in ([8], [4, 4]):
        sim = simulate(made)
        state, rows = sim.start(), list[dict[str, Any]]()
        for rounds in parts:
            state = vecfl.run(sim, rounds, evaluate_every=every, trackers=[Rows(rows)], state=state)
        seen = [row["round"] for row in rows if "client/loss_p90" in row]
        assert seen == list(range(every, 9, every))
        servers.append({name: t.item() for name, t in state.server.items()})
    assert servers[0] == servers[1]


@pytest.mark.parametrize(("start", "seen"), [(0, [3, 4]), (1, [3, 5]), (2, [3, 6])])
def test_periods_are_of_the_run_s_rounds(start: int, seen: list[int]) -> None:
    sim, rows = simulate(HALF), list[dict[str, Any]]()
    state = play(sim, start)[2]
    vecfl.run(sim, 4, evaluate_every=3, trackers=[Rows(rows)], state=state)
    assert [row["round"] for row in rows if "client/loss_p90" in row] == seen


class Rows:
    """A tracker that keeps rows in a list."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def log(self, metrics: Any) -> None:
        self.rows.append(dict(metrics))


def test_a_metric_that_is_not_there() -> None:
    made = vecfl.server_on_plateau(HALF, "eval/los", "min")
    state = simulate(made).start()
    assert made.observe is not None
    assert made.observe(state.server, {"train/loss": 1.0}) == state.server
    with pytest.raises(InputError) as error:
        made.observe(state.server, {"eval/loss": 1.0, "train/loss": 1.0})
    assert str(error.value) == "a plateau of eval/los: no such metric; is it eval/loss?"
    with pytest.raises(InputError, match="a plateau of eval/los: it is text, 'x', not a number"):
        made.observe(state.server, {"eval/los": "x"})


@pytest.mark.parametrize("exact", [False, True])
def test_a_model_that_is_not_finite_ends_the_run(exact: bool) -> None:
    """PLAIN's w goes from 1 to 1 - 4, and the server 1e308 times as far; a replay on STEEP, whose
    gradient is 4 w = 2, goes 2e308 far."""
    far_away = vecfl.fedavg(lr=4.0, batches=ONE, server=vecfl.server_sgd(1e308))
    sim = simulate(far_away, exact_sums=exact)
    with pytest.raises(InputError) as error:
        sim.round(sim.start())
    assert str(error.value) == (
        "round 1: the server's step has left a model that is not finite; is its learning rate "
        "(sgd(1e+308)), or that of a replay, too large?"
    )
    far = REPLAY | {"lr": 1e308}
    sim = simulate(HALF, lambda a, task: vecfl.replay(a, task, client(STEEP), **far))
    with pytest.raises(InputError, match="^round 1: the server's step has left a model that is"):
        play(sim, 1)


class Scaled(Line):
    """A parameter that does not train."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


def test_replay_of_a_model_with_frozen_parts() -> None:
    """Two float32 modules of one body fit in float64, too."""
    sim = simulate(with_replay(client(PLAIN), Scaled(0.3)), module=Scaled(0.3))
    assert 0 < play(sim, 1)[0][0] < 1


def with_replay(
    columns: Columns, module: Any = None, around: Algorithm = HALF, **how: Any
) -> Algorithm:
    data = dataset([client(PLAIN)])
    task = vecfl.Task(module or Line(), squared, example=data.examples(2))
    return vecfl.replay(around, task, columns, **(REPLAY | how))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vecfl.ema(HALF, 1.0), "ema(decay) must be in [0, 1), not 1.0"),
        (
            lambda: vecfl.server_on_plateau(HALF, "a", "low"),
            "a plateau's direction must be min or max, not 'low'",
        ),
        (
            lambda: vecfl.clients_on_plateau(HALF, "a", "min", 1.0),
            "a plateau's factor must be in (0, 1), not 1.0",
        ),
        (
            lambda: vecfl.clients_on_plateau(HALF, "a", "min", 0.5, -1),
            "a plateau's patience must be 0, 1, 2, ..., not -1",
        ),
        (
            lambda: vecfl.clients_on_plateau(vecfl.fedsgd(lr=1.0), "a", "min"),
            "fedsgd: its clients have no learning rate; its server has one",
        ),
        (
            lambda: with_replay(client(PLAIN), batches=vecfl.Batches(2, last="drop")),
            "replay: 1 examples make no batch of 2",
        ),
        (lambda: with_replay({"y": torch.zeros(2)}), "the data have no column 'x'"),
        (
            lambda: simulate(with_replay(client(PLAIN), torch.nn.Sequential(Line()))).start(),
            "replay: its task has another module than that of the clients",
        ),
        (
            lambda: simulate(with_replay(client(PLAIN), Scaled(2.0)), module=Scaled(1.0)).start(),
            "replay: its task has other frozen parameters or constant buffers than that of the",
        ),
        (
            lambda: simulate(vecfl.ema(vecfl.ema(HALF, 0.5), 0.5)).start(),
            "fedavg, ema 0.5: ema stands around it already",
        ),
    ],
)
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value).startswith(message)


def test_the_inner_algorithm_does_not_see_what_is_carried() -> None:
    seen: list[set[str]] = []

    def spied(name: str) -> Callable[..., Any]:
        function = getattr(HALF, name)

        def spy(server: dict[str, Tensor], *args: Any) -> Any:
            seen.append(set(server))
            return function(server, *args)

        return spy

    names = ("begin", "upload", "server", "local", "model", "metrics")
    inner = replace(HALF, observe=lambda server, told: server, **{n: spied(n) for n in names})
    own = carrying(inner, "own/", lambda w, layout: {"own/a": w + 1})
    sim = simulate(own)
    _, _, state = play(sim, 2)
    assert len(seen) >= 2 * len(names) and all(names == {"w"} for names in seen)
    assert state.server["own/a"].item() == 2
