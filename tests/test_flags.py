"""The flags that recipes share, and what their values come to."""

from typing import Any

import pytest
import torch
from torch import nn

import vecfl
from vecfl.algorithms import Round
from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.flags import EVERY_OPTION, OPTIONS, AlgorithmArgs, make_algorithm, settle, simulation
from vecfl.layout import Entry, Layout
from vecfl.optim import Rows

ALGORITHMS = ["fedavg", "fedsgd", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi"]
ALGORITHMS += ["dga"]
X = torch.linspace(-1, 1, 60).view(20, 3).sin()
Y = (X[:, 0] > 0).long()

CHANGED = {"lr": 0.07, "epochs": 2, "optimizer": "momentum", "clip": 0.01, "mu": 3.0, "tau": 0.5}
CHANGED |= {"server_lr": 0.5, "beta": 0.1, "beta1": 0.3, "beta2": 0.2, "start": 2.0}
CHANGED |= {"softmax_beta": 3.0, "weighting": "rms"}
CHANGED |= {"weight_decay": 0.3}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_option_has_an_effect(algorithm: str) -> None:
    data = FederatedDataset.from_arrays({"x": X, "y": Y}, [0] * 9 + [1] * 5 + [2] * 6)
    task = vecfl.Task(nn.Linear(3, 2), vecfl.cross_entropy, example=data.examples(2))

    def model(**options: Any) -> torch.Tensor:
        how = {"cohort": 3, "batch": 4, "backend": "loop", "workers": 1, "slots": 1}
        args = settle(AlgorithmArgs(algorithm=algorithm, **how, **options))
        sim = simulation(args, task, data, make_algorithm(args))
        assert sim.algorithm.name == algorithm
        state = sim.start()
        for _ in range(2):
            state, _ = sim.round(state)
        return state.server["w"]

    plain = model()
    assert torch.equal(plain, model())
    without = [n for n in OPTIONS[algorithm] if torch.equal(plain, model(**{n: CHANGED[n]}))]
    assert without == []


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw", "rmsprop"])
def test_weight_decay_reaches_every_optimizer(optimizer: str) -> None:
    def moved(decay: float) -> float:
        args = settle(AlgorithmArgs(optimizer=optimizer, weight_decay=decay))
        rule = make_algorithm(args).rule
        assert rule.optimizer.name == optimizer
        w = torch.full((1,), 2.0)
        state = [[torch.zeros(1)] for _ in range(rule.optimizer.states)]
        rule.optimizer.step_(Rows([w], state, None, None, None, torch.zeros(1)), [0 * w], 0.1)
        return w.item()

    # lr 0.1, g = 0.5 * 2: SGD and momentum 2 - 0.1; Adam 2 - 0.1; AdamW 2 - 0.1 * 0.5 * 2;
    # RMSprop 2 - 0.1 / sqrt(0.01).
    assert moved(0.5) == pytest.approx(1.0 if optimizer == "rmsprop" else 1.9)
    assert moved(0.0) == 2


def test_what_a_run_is_reaches_the_simulation() -> None:
    data = FederatedDataset.from_arrays({"x": X, "y": Y}, [0] * 9 + [1] * 5 + [2] * 6)
    task = vecfl.Task(nn.Linear(3, 2), vecfl.cross_entropy, example=data.examples(2))
    how = {"cohort": 2, "seed": 3, "sample_seed": 4, "dtype": "float64", "device": "cpu:0"}
    how |= {"backend": "loop", "workers": 2, "threads": 3, "slots": 1}
    args = settle(AlgorithmArgs(**how))
    sim = simulation(args, task, data, make_algorithm(args))
    assert (sim.seed, sim.sample_seed, sim.dtype) == (3, 4, torch.float64)
    assert sim.device == torch.device("cpu:0")
    a = sim.arrangement
    assert (a.backend, a.workers, a.threads, a.slots) == ("loop", 2, 3, 1)
    assert len(sim.cohort(0)) == 2


def test_betas_by_hand() -> None:
    # One step of FedAdam without bias correction (Algorithm 2) from m = 0, v = tau^2 = 0.01, on a
    # mean update of 1: m = 1 - beta1 = 0.5, v = 0.9 * 0.01 + 0.1 * 1 = 0.109.
    options = {"server_lr": 1.0, "beta1": 0.5, "beta2": 0.9, "tau": 0.1}
    args = settle(AlgorithmArgs(algorithm="fedadam", **options))
    algorithm = make_algorithm(args)
    layout = Layout((Entry("w", (1,), 0, torch.float64),))
    server = algorithm.init(torch.zeros(1, dtype=torch.float64), layout)
    one = torch.ones((), dtype=torch.float64)
    sums = vecfl.aggregate.Aggregate(one.view(1), one, None, one)
    after = algorithm.server(server, sums, Round(0, 0, layout))
    assert after["w"].item() == pytest.approx(-0.5 / (0.109**0.5 + 0.1))


def test_values_where_none_is_given() -> None:
    def settled(**given: Any) -> dict[str, Any]:
        args = settle(AlgorithmArgs(**given))
        return {name: value for name in CHANGED if (value := getattr(args, name)) is not None}

    client = {"lr": 0.1, "epochs": 1, "optimizer": "sgd", "weight_decay": 0.0}
    assert settled() == client
    assert settled(algorithm="fedsgd") == {"lr": 0.5}
    assert settled(algorithm="fedprox", mu=0.0) == client | {"mu": 0.0}
    assert settled(algorithm="fedavgm") == client | {"server_lr": 1.0, "beta": 0.9}
    adam = {"server_lr": 0.03, "beta1": 0.9, "beta2": 0.99, "tau": 0.001}
    assert settled(algorithm="fedadam") == settled(algorithm="fedyogi") == client | adam
    assert settled(algorithm="fedyogi", tau=0.1, lr=0.3)["tau"] == 0.1
    adamw = client | {"lr": 0.001, "optimizer": "adamw", "weight_decay": 0.01}
    assert settled(optimizer="adamw") == adamw
    assert settled(optimizer="adamw", weight_decay=0.0) == adamw | {"weight_decay": 0.0}
    assert settled(optimizer="rmsprop") == client | {"lr": 0.001, "optimizer": "rmsprop"}
    assert settled(optimizer="momentum") == client | {"lr": 0.01, "optimizer": "momentum"}


REFUSED = [(a, o) for a in ALGORITHMS for o in CHANGED if o not in OPTIONS[a]]


@pytest.mark.parametrize(("algorithm", "option"), REFUSED)
def test_what_an_algorithm_does_not_take_is_an_error(algorithm: str, option: str) -> None:
    args = AlgorithmArgs(algorithm=algorithm, **{option: CHANGED[option]})
    flag = "--" + option.replace("_", "-")
    said = f"^{flag}: {algorithm} does not take it \\(got {CHANGED[option]}\\); it takes --"
    with pytest.raises(InputError, match=said):
        settle(args)


def test_the_table_of_options_is_whole() -> None:
    assert list(OPTIONS) == ALGORITHMS
    assert set(EVERY_OPTION) == set(CHANGED)


def test_a_recipe_has_learning_rates_of_its_own() -> None:
    own = {"sgd": 2.0, "adam": 0.5}
    assert settle(AlgorithmArgs(), own).lr == 2.0
    assert settle(AlgorithmArgs(optimizer="adam"), own).lr == 0.5
    assert settle(AlgorithmArgs(lr=3.0), own).lr == 3.0
    assert settle(AlgorithmArgs(algorithm="fedsgd"), own).lr == 0.5  # the server's


def test_seeds() -> None:
    assert settle(AlgorithmArgs(seed=4)).sample_seed == 4
    assert settle(AlgorithmArgs(seed=4, sample_seed=0)).sample_seed == 0
