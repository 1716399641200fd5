"""The flags that recipes share, and what their values come to."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vecfl
from vecfl.algorithm_flags import EVERY_OPTION, OPTIONS, AlgorithmArgs, make_algorithm, settle
from vecfl.algorithms import Round
from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.flags import simulation
from vecfl.layout import Entry, Layout
from vecfl.optim import Rows

ALGORITHMS = ["fedavg", "fedsgd", "fedprox", "fedprox_adaptive", "fedavgm", "fedadagrad", "fedadam"]
ALGORITHMS += ["fedyogi", "dga", "scaffold", "feddyn", "fednova"]
X = torch.linspace(-1, 1, 60).view(20, 3).sin()
Y = (X[:, 0] > 0).long()

CHANGED = {"lr": 0.07, "epochs": 2, "optimizer": "momentum", "clip": 0.01, "mu": 3.0, "tau": 0.5}
CHANGED |= {"server_lr": 0.5, "beta": 0.1, "beta1": 0.3, "beta2": 0.2, "start": 2.0}
CHANGED |= {"softmax_beta": 3.0, "weighting": "rms"}
CHANGED |= {"weight_decay": 0.3, "server": "adam(lr=0.5)", "weights": "uniform_weights"}
CHANGED |= {"lr_schedule": ("cosine(2)",), "server_schedule": ("linear_warmup(3)",)}
CHANGED |= {"within_round": "step_decay(1, 0.5)", "steps": 4, "max_examples": 3, "max_tokens": 7}
CHANGED |= {"option": 1, "alpha": 0.4}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_option_has_an_effect(algorithm: str) -> None:
    data = FederatedDataset.from_arrays({"x": X, "y": Y}, [0] * 9 + [1] * 5 + [2] * 6)
    task = vecfl.Task(nn.Linear(3, 2), vecfl.cross_entropy, example=data.examples(2))

    def model(**options: Any) -> torch.Tensor:
        how = {"cohort": 3, "batch": 4, "backend": "loop", "workers": 1, "slots": 1}
        args = settle(AlgorithmArgs(algorithm=algorithm, **how, **options))
        sim = simulation(args, task, data, make_algorithm(args, torch.arange(20) % 3 + 1))
        assert sim.algorithm.name == algorithm
        state = sim.start()
        for _ in range(2):
            state, metrics = sim.round(state)
            state = sim.observe(state, metrics)
        return state.server["w"]

    plain = model()
    assert torch.equal(plain, model())
    without = [n for n in OPTIONS[algorithm] if torch.equal(plain, model(**{n: CHANGED[n]}))]
    assert without == []


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad"])
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
    # RMSprop 2 - 0.1 / sqrt(0.01); Adagrad 2 - 0.1 / sqrt(1).
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
        values = {name: getattr(args, name) for name in CHANGED}
        return {name: value for name, value in values.items() if value not in (None, ())}

    client = {"lr": 0.1, "epochs": 1, "optimizer": "sgd", "weight_decay": 0.0}
    assert settled() == client
    assert settled(algorithm="fedsgd") == {"lr": 0.5}
    assert settled(algorithm="fedprox", mu=0.0) == client | {"mu": 0.0}
    assert settled(algorithm="fedavgm") == client | {"server_lr": 1.0, "beta": 0.9}
    adam = {"server_lr": 0.03, "beta1": 0.9, "beta2": 0.99, "tau": 0.001}
    assert settled(algorithm="fedadam") == settled(algorithm="fedyogi") == client | adam
    assert settled(algorithm="fedyogi", tau=0.1, lr=0.3)["tau"] == 0.1
    scaffold = {"lr": 0.1, "epochs": 1, "option": 2}
    assert settled(algorithm="scaffold") == scaffold
    assert settled(algorithm="feddyn") == client | {"alpha": 0.1}
    assert settled(algorithm="fednova")["mu"] == 0.0
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
    said = f"{flag}: {algorithm} does not take it (got {CHANGED[option]}); "
    behind = (algorithm, option) == ("fedprox_adaptive", "start")
    said += "write --algorithm 'fedprox_adaptive(start=2.0)'" if behind else "it takes --"
    with pytest.raises(InputError, match="^" + re.escape(said)):
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


OWN = """
import vecfl


def halved(*, lr, batches, server=None, share=0.5):
    return vecfl.fedavg(lr=share * lr, batches=batches, server=server)


def quietly(own, done, upload):
    return upload
"""


def test_an_algorithm_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags fill what its parameters ask for; the rest stands behind its name."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    args = settle(AlgorithmArgs(algorithm="own.py:halved(share=0.25)", lr=0.8, epochs=3, batch=7))
    rule = make_algorithm(args).rule
    assert (rule.lr, rule.batches.epochs, rule.batches.size) == (0.2, 3, 7)
    args = settle(AlgorithmArgs(algorithm="own.py:halved", server="momentum(2.0)"))
    assert make_algorithm(args).rule.lr == 0.05  # 0.1 of SGD, where none is given
    for algorithm, flags, said in (
        (
            "own.py:halved",
            {"mu": 1.0},
            "--mu: halved does not take it (got 1.0); it takes --lr, -",
        ),
        (
            "own.py:halved(shared=2)",
            {},
            "--algorithm: own.py:halved(shared=2): halved() got an",
        ),
        ("own.py:other", {}, "--algorithm: own.py has no other; it has halved, quietly"),
        ("own.py:quietly", {}, "--algorithm: own.py:quietly: quietly() missing 3 required posit"),
        ("fedavg(lr=1)", {}, "--algorithm: fedavg(lr=1): write fedavg --lr 1"),
        ("fedavgg", {}, "--algorithm: no fedavgg here; is it fedavg, fedavgm"),
        ("fedavg", {"server": "adan()"}, "--server: no adan here; is it adam"),
    ):
        with pytest.raises(InputError) as caught:
            make_algorithm(settle(AlgorithmArgs(algorithm=algorithm, **flags)))
        assert str(caught.value).startswith(said)


def test_parts_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "vecfl")
    monkeypatch.chdir(tmp_path)
    ones = "def ones(output, batch):\n    return batch['y'] * 0 + 1, None"
    Path("own.py").write_text(f"{OWN}\n\n{ones}")
    data = FederatedDataset.from_arrays({"x": X, "y": Y}, [0] * 9 + [1] * 5 + [2] * 6)
    task = vecfl.Task(
        nn.Linear(3, 2), vecfl.cross_entropy, {"a": vecfl.accuracy}, example=data.examples(2)
    )
    flags = {"sampler": "cyclic(2)", "transforms": ("clip_by_norm(0.5)", "clip_by_norm(0.25)")}
    flags |= {"metrics": ("one=own.py:ones", "top=top_k_accuracy(2)"), "cohort": 2, "slots": 1}
    flags |= {"backend": "loop", "workers": 1}
    args = AlgorithmArgs(**flags)
    sim = simulation(args, task, data, make_algorithm(settle(args)))
    assert "--sampler cyclic(2) says who takes part; --cohort is not used" in caplog.text
    assert sim.algorithm.name == "fedavg, clip_by_norm 0.5, clip_by_norm 0.25"
    assert sorted(sim.cohort(0).tolist() + sim.cohort(1).tolist())[:3] == [0, 1, 2]
    found = sim.evaluate(sim.start(), data.columns)
    assert (found["eval/one"], found["eval/top"]) == (1, 1) and "eval/a" in found
    with pytest.raises(InputError, match="^--metrics: own.py:ones: expected NAME=file.py:function"):
        simulation(replace(args, metrics=("own.py:ones",)), task, data, sim.algorithm)
    with pytest.raises(InputError, match="^metric a: there is one of this name"):
        simulation(replace(args, metrics=("a=own.py:ones",)), task, data, sim.algorithm)
