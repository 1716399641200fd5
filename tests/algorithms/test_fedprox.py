"""FedProx with an adaptive mu: how the loss moves it, and that every round trains by its own."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import vecfl
from vecfl import Batches, InputError, Simulation, Task, fedprox, fedprox_adaptive
from vecfl.algorithms import Algorithm
from vecfl.algorithms.fedprox import FALLS, LOSS, MU
from vecfl.engine.sequence import Sequence
from vecfl.layout import Entry, Layout
from vecfl.watch import Watch

from ..oracles.bridge import dataset
from ..oracles.tasks import PROBLEMS

B = Batches(4, epochs=2)
LAYOUT = Layout((Entry("w", (1,), 0, torch.float64),))
NAN = math.nan


def mus(losses: list[float], **how: Any) -> list[float]:
    """mu after each of these losses."""
    algorithm = fedprox_adaptive(lr=0.1, batches=B, **how)
    state, found = algorithm.init(torch.zeros(1, dtype=torch.float64), LAYOUT), []
    assert algorithm.observe is not None
    for loss in losses:
        state = algorithm.observe(state, {"train/loss": loss})
        assert algorithm.local(state, algorithm.rule).mu == float(state[MU])
        found.append(float(state[MU]))
    return found


@pytest.mark.parametrize(
    ("losses", "how", "expected"),
    [
        # Nothing to compare with, a rise, a rise, a fall.
        ([1, 2, 3, 2], {}, [0, 0.1, 0.2, 0.2]),
        # Five falls in a row make one step down, and are counted anew.
        ([9, 8, 7, 6, 5, 4, 3, 2, 1, 0.5, 0.2], {"start": 1.0}, [1] * 5 + [0.9] * 5 + [0.8]),
        # A rise or an equal loss breaks the row.
        ([3, 2, 1, 1, 0.5, 0.4], {"start": 1.0, "patience": 3}, [1] * 6),
        ([3, 2, 1, 2, 1, 0.5, 0.4], {"start": 1.0, "patience": 3}, [1, 1, 1, 1.1, 1.1, 1.1, 1]),
        # Never below 0, and up again from there.
        ([3, 2, 1, 2], {"start": 0.25, "patience": 1, "step": 0.2}, [0.25, 0.05, 0, 0.2]),
        # A round without a loss counts for nothing: 2 to 1 is a fall, the second in a row.
        ([3, 2, NAN, 1], {"start": 1.0, "patience": 2}, [1, 1, 1, 0.9]),
        # As many steps down as up lead back to 0 exactly, where plain SGD is plain.
        ([1, 2, 3, 4, 3, 2, 1], {"patience": 1}, [0, 0.1, 0.2, 0.3, 0.2, 0.1, 0]),
    ],
)
def test_mu_follows_the_loss(losses: list[float], how: dict, expected: list[float]) -> None:
    assert mus(losses, **how) == expected


def simulation(algorithm: Algorithm, backend: str = "loop") -> Simulation:
    p = PROBLEMS["linear"]
    data = dataset(p.clients())
    task = Task(p.build(), p.loss, example=data.examples(2))
    how = {"backend": backend, "slots": 3, "dtype": torch.float64}
    return Simulation(task, data, algorithm, vecfl.everyone(), **how)


@pytest.mark.parametrize("backend", ["loop", "vmap", "stacked"])
def test_every_round_trains_by_its_own_mu(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round has the model of FedProx with that mu, from the same state."""
    plain, step = set(), Sequence.step

    def watched(self: Sequence, *args: Any) -> Any:
        plain.add(args[-1] is not None)  # a layer's step by itself
        return step(self, *args)

    adaptive = fedprox_adaptive(lr=lambda t: 0.1 + 2 * (t % 2), batches=B, patience=1)
    sim = simulation(adaptive, backend)
    state, told = sim.start(), []
    for _ in range(6):
        plain.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Sequence, "step", watched)
            after, metrics = sim.round(state)
        mu = metrics["train/mu"]
        right = simulation(fedprox(lr=adaptive.rule.lr, mu=mu, batches=B), backend)
        there, _ = right.round(vecfl.State(state.round, {"w": state.server["w"]}))
        assert torch.equal(after.server["w"], there.server["w"])
        assert backend != "stacked" or plain == {mu == 0}
        told.append(mu)
        state = sim.observe(after, metrics)
    assert told == [0, 0, 0.1, 0, 0.1, 0]


def test_a_round_that_was_not_observed_is_refused() -> None:
    sim = simulation(fedprox_adaptive(lr=0.1, batches=B))
    state, _ = sim.round(sim.start())
    with pytest.raises(InputError, match=r"^fedprox_adaptive adapts to the metrics of a round"):
        sim.round(state)


@pytest.mark.parametrize("server", [vecfl.server_adam(), vecfl.server_momentum()])
def test_a_server_optimizer_and_mu_go_through_a_checkpoint(server: Any) -> None:
    def make() -> Simulation:
        how = {"start": 1.0, "patience": 2, "server": server}
        return simulation(fedprox_adaptive(lr=0.05, batches=B, **how))

    def play(sim: Simulation, state: vecfl.State, rounds: int) -> vecfl.State:
        for _ in range(rounds):
            state, metrics = sim.round(state)
            state = sim.observe(state, metrics)
        return state

    sim = make()
    half = play(sim, sim.start(), 3)
    whole, again = play(sim, half, 3), make()
    rest = play(again, again.load(sim.save(half)), 3)
    assert (float(half.server[MU]), int(half.server[FALLS])) != (1.0, 0)
    assert whole.server.keys() == rest.server.keys() > {"w", MU, FALLS, LOSS}
    for name, tensor in whole.server.items():
        assert torch.equal(tensor, rest.server[name]), name


def test_a_fall_back_keeps_what_mu_has_learned() -> None:
    """The model goes back to that of the best round, mu does not: the next one trains by it."""
    sim, watch = simulation(fedprox_adaptive(lr=0.1, batches=B)), Watch("eval/loss:min", True)
    state, told = sim.start(), []
    for t, loss in enumerate((1.0, 2.0, 3.0)):  # mu: 0, 0.1, 0.2; a fall back after each rise
        state, metrics = sim.round(state)
        state = sim.observe(state, metrics | {"train/loss": loss})
        state, best = watch.look(state, {"eval/loss": loss}, True)
        assert best == (t == 0)
        told.append(float(state.server[MU]))
        assert watch.server is not None and torch.equal(state.server["w"], watch.server["w"])
    assert told == [0, 0.1, 0.2]
    assert float(state.server[LOSS]) == 3
    assert sim.round(state)[1]["train/mu"] == 0.2


@pytest.mark.parametrize("how", [{"step": 0.0}, {"step": NAN}, {"patience": 0}, {"patience": 1.5}])
def test_steps_that_make_no_sense_are_refused(how: dict) -> None:
    with pytest.raises(
        InputError, match=r"^fedprox_adaptive\(step=.*, patience=.*\): step must be"
    ):
        fedprox_adaptive(lr=0.1, batches=B, **how)


def test_a_first_mu_below_zero_is_refused() -> None:
    with pytest.raises(InputError, match=r"^mu must be at least 0, not -1$"):
        fedprox_adaptive(lr=0.1, batches=B, start=-1)


def test_without_a_pull_it_is_fedavg() -> None:
    sim = simulation(fedprox_adaptive(lr=0.1, batches=B))
    (state, _), other = sim.round(sim.start()), simulation(vecfl.fedavg(lr=0.1, batches=B))
    assert torch.equal(state.server["w"], other.round(other.start())[0].server["w"])
    assert isinstance(sim.task.module, nn.Linear)
