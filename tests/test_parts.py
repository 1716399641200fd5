"""Parts that flags name: a run by flags has the bits of the same run in Python."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vecfl
from vecfl.algorithm_flags import AlgorithmArgs, check_algorithm, make_algorithm, settle
from vecfl.algorithms import Algorithm
from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.flags import check_run, simulation
from vecfl.optim import ClientOptimizer
from vecfl.within_round import by_step

X = torch.linspace(-1, 1, 60).view(20, 3).sin()
Y = (X[:, 0] > 0).long()
TOKENS = torch.arange(20) % 3 + 1
DATA = FederatedDataset.from_arrays({"x": X, "y": Y}, [0] * 9 + [1] * 5 + [2] * 6)
OWN = {"x": X[:7].flip(0), "y": Y[:7].flip(0)}
HOW: dict[str, Any] = {"backend": "loop", "workers": 1, "slots": 1}
ONE = vecfl.Batches(4, epochs=1)


def task() -> vecfl.Task:
    torch.manual_seed(0)
    return vecfl.Task(nn.Linear(3, 2), vecfl.cross_entropy, example=DATA.examples(2))


def play(sim: vecfl.Simulation) -> Tensor:
    """The models of four rounds that are evaluated, one after the other."""
    state, found = sim.start(), []
    for _ in range(4):
        state, metrics = sim.round(state)
        state = sim.observe(state, metrics | sim.evaluate(state, DATA.columns))
        found.append(sim.algorithm.model(state.server))
    return torch.cat(found)


def by_flags(**flags: Any) -> vecfl.Simulation:
    args = settle(AlgorithmArgs(cohort=3, batch=4, **HOW, **flags))
    check_algorithm(args)
    check_run(args)
    return simulation(args, task(), DATA, make_algorithm(args, TOKENS), own=OWN)


def in_python(algorithm: Algorithm, **how: Any) -> vecfl.Simulation:
    return vecfl.Simulation(task(), DATA, algorithm, vecfl.uniform(3), **HOW, **how)


def fedavg(lr: Any = 0.1, batches: vecfl.Batches = ONE, **how: Any) -> Algorithm:
    return vecfl.fedavg(lr=lr, batches=batches, **how)


def stepped(schedule: Callable[[int], float]) -> ClientOptimizer:
    return vecfl.within_round(vecfl.momentum(), by_step(schedule))


def replayed(inner: Algorithm) -> Algorithm:
    how: dict[str, Any] = {"lr": vecfl.scaled(0.2, vecfl.cosine(3)), "optimizer": vecfl.adam()}
    return vecfl.replay(inner, task(), OWN, batches=vecfl.Batches(2, steps=4), **how)


PLATEAU = ("eval/loss", "max", 0.5, 0)
FLAGS: dict[str, tuple[dict[str, Any], Callable[[], Algorithm]]] = {
    "lr": (
        {"lr": 0.3, "lr_schedule": ("linear_warmup(2)", "step_decay(1, 0.5)")},
        lambda: fedavg(vecfl.scaled(0.3, vecfl.linear_warmup(2), vecfl.step_decay(1, 0.5))),
    ),
    "many": (
        {"algorithm": "fedprox", "lr_schedule": ("multi_step([1, 3], 0.1)",)},
        lambda: vecfl.fedprox(
            lr=vecfl.scaled(0.1, vecfl.multi_step([1, 3], 0.1)), mu=0.01, batches=ONE
        ),
    ),
    "within": (
        {"optimizer": "momentum", "lr": 0.1, "within_round": "cosine(2, floor=0.1)"},
        lambda: fedavg(optimizer=stepped(vecfl.cosine(2, floor=0.1))),
    ),
    "nested server": (
        {"server": "clipped(scheduled(adam(0.01), cosine(4)), 0.5)"},
        lambda: fedavg(
            server=vecfl.clipped(vecfl.scheduled(vecfl.server_adam(0.01), vecfl.cosine(4)), 0.5)
        ),
    ),
    "fedopt server": (
        {"server": "fedopt_yogi(0.1)", "server_schedule": ("ramp_hold_decay(1, 2, 4)",)},
        lambda: fedavg(
            server=vecfl.scheduled(vecfl.fedopt_yogi(0.1), vecfl.ramp_hold_decay(1, 2, 4))
        ),
    ),
    "plain server": (
        {"server_schedule": ("cosine(4)", "linear_warmup(2)")},
        lambda: fedavg(
            server=vecfl.scheduled(
                vecfl.server_sgd(), vecfl.scaled(1, vecfl.cosine(4), vecfl.linear_warmup(2))
            )
        ),
    ),
    "fedavgm": (
        {"algorithm": "fedavgm", "beta": 0.5, "server_schedule": ("cosine(4)",)},
        lambda: fedavg(server=vecfl.scheduled(vecfl.server_momentum(1.0, 0.5), vecfl.cosine(4))),
    ),
    "fedadagrad": (
        {"algorithm": "fedadagrad", "beta1": 0.3, "server_schedule": ("cosine(4)",)},
        lambda: fedavg(server=vecfl.scheduled(vecfl.fedopt_adagrad(0.1, 0.3), vecfl.cosine(4))),
    ),
    "fedadam": (
        {"algorithm": "fedadam", "beta2": 0.5, "start": 0.2, "server_schedule": ("cosine(4)",)},
        lambda: fedavg(
            server=vecfl.scheduled(vecfl.fedopt_adam(0.03, (0.9, 0.5), start=0.2), vecfl.cosine(4))
        ),
    ),
    "fedsgd": (
        {"algorithm": "fedsgd", "server_schedule": ("cosine(4)",), "max_examples": 3},
        lambda: vecfl.fedsgd(
            server=vecfl.scheduled(vecfl.server_sgd(0.5), vecfl.cosine(4)), size=4, max_examples=3
        ),
    ),
    "plateau, then ema": (
        {"around": (f"clients_on_plateau{PLATEAU}", "ema(0.5)")},
        lambda: vecfl.ema(vecfl.clients_on_plateau(fedavg(), *PLATEAU), 0.5),
    ),
    "server's plateau around the clients' and a schedule": (
        {
            "around": (f"clients_on_plateau{PLATEAU}", f"server_on_plateau{PLATEAU}"),
            "lr_schedule": ("linear_warmup(9)",),
        },
        lambda: vecfl.server_on_plateau(
            vecfl.clients_on_plateau(fedavg(vecfl.scaled(0.1, vecfl.linear_warmup(9))), *PLATEAU),
            *PLATEAU,
        ),
    ),
    "replay": (
        {
            "around": (
                "replay(lr=scaled(0.2, cosine(3)), batches=Batches(2, steps=4), optimizer=adam())",
            )
        },
        lambda: replayed(fedavg()),
    ),
    "adaptive": (
        {"algorithm": "fedprox_adaptive(start=1.0, step=0.5, patience=1)"},
        lambda: vecfl.fedprox_adaptive(start=1.0, step=0.5, patience=1, lr=0.1, batches=ONE),
    ),
    "random epochs": (
        {"epochs": "random_epochs(1, 5, 0.9)"},
        lambda: fedavg(batches=vecfl.Batches(4, epochs=vecfl.random_epochs(1, 5, 0.9))),
    ),
    "random steps": (
        {"steps": "random_epochs(0, 5)"},
        lambda: fedavg(batches=vecfl.Batches(4, steps=vecfl.random_epochs(0, 5))),
    ),
    "steps": ({"steps": 7}, lambda: fedavg(batches=vecfl.Batches(4, steps=7))),
    "examples": (
        {"max_examples": 5, "epochs": 2},
        lambda: fedavg(batches=vecfl.Batches(4, epochs=2, max_examples=5)),
    ),
    "tokens": (
        {"max_tokens": 8},
        lambda: fedavg(batches=vecfl.Batches(4, max_tokens=8, tokens=TOKENS)),
    ),
    "uniform": (
        {"weights": "uniform_weights"},
        lambda: fedavg(weights=vecfl.uniform_weights),
    ),
    "capped": (
        {"algorithm": "fedavgm", "weights": "capped(6)"},
        lambda: vecfl.fedavgm(lr=0.1, batches=ONE, weights=vecfl.capped(6)),
    ),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_do_what_python_does(name: str) -> None:
    flags, algorithm = FLAGS[name]
    found = play(by_flags(**flags))
    assert torch.equal(found, play(in_python(algorithm())))
    plain = {"algorithm": "fedavg"} | {n: v for n, v in flags.items() if n in ("algorithm", "lr")}
    plain["algorithm"] = plain["algorithm"].partition("(")[0]
    plain |= {"optimizer": flags["optimizer"]} if "optimizer" in flags else {}
    assert not torch.equal(found, play(by_flags(**plain)))


def test_clients_are_lost() -> None:
    found = play(by_flags(client_dropout=0.5))
    assert torch.equal(found, play(in_python(fedavg(), client_dropout=0.5)))
    assert not torch.equal(found, play(by_flags()))


def test_the_order_of_what_stands_around() -> None:
    """As they are given, from the inside outwards; the mean is over models after replay."""
    texts = ("clients_on_plateau('a/b', 'min')", "replay(lr=0.1, batches=Batches(7))")
    names = [by_flags(around=order).algorithm.name for order in (texts, texts[::-1])]
    plateau = "clients on plateau of a/b:min (0.1, 10)"
    assert names == [f"fedavg, {plateau}, replay", f"fedavg, replay, {plateau}"]
    for moves in (texts[1], "server_on_plateau('a/b', 'min')"):
        by_flags(around=(moves, "ema(0.5)"))
        with pytest.raises(InputError, match="^fedavg, ema 0.5: give ema behind replay and serv"):
            by_flags(around=("ema(0.5)", moves))


def test_facts_tell_schedules_apart() -> None:
    def rule(**flags: Any) -> str:
        sim = by_flags(**flags)
        facts: dict[str, Any] = sim.save(sim.start())["facts"]
        return str(facts["rule"])

    assert "lr by round: scaled(0.1, cosine(7, 0.0))" in rule(lr_schedule=("cosine(7)",))
    two = rule(lr_schedule=("multi_step([1, 2], 0.5)", "ramp_hold_decay(1, 2, 3)"))
    said = "scaled(0.1, multi_step([1, 2], 0.5), ramp_hold_decay(1, 2, 3, 0.01))"
    assert said in two
    assert "within_round step_decay(3, 0.5) sgd" in rule(within_round="step_decay(3, 0.5)")
    assert "epochs=random_epochs(1, 5, 0.9)" in rule(epochs="random_epochs(1, 5, 0.9)")


def test_a_schedule_by_steps() -> None:
    # steps of three clients, out of order and beyond what the table has at first
    factor = by_step(vecfl.cosine(4))
    quarter = 0.5 + math.sqrt(0.5) / 2
    for steps, values in (([0, 0, 1], [1, 1, quarter]), ([6, 2, 1], [0, 0.5, quarter])):
        found = factor(torch.tensor(steps, dtype=torch.float32))
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(values, abs=1e-15)


MINE = """
import vecfl
from dataclasses import replace


def late(round):
    return 0.0 if round < 2 else 1.0


def after(rounds):
    return lambda round: float(round >= rounds)


def renamed(algorithm, name="mine", times=1):
    return replace(algorithm, name=name * times)


def nothing(algorithm):
    return None


def light(done):
    return 1.0 / done.examples.double()


def two(a, b):
    return 1.0
"""


def test_parts_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    first = task().layout.flatten(task().module)
    for late in ("mine.py:late", "mine.py:after(2)"):
        for flags in ({"lr_schedule": (late,)}, {"server_schedule": (late,)}):
            one, two, three, _ = play(by_flags(**flags)).view(4, -1)
            assert torch.equal(one, first) and torch.equal(two, first)
            assert not torch.equal(three, first)
    assert by_flags(around=("mine.py:renamed", "ema(0)")).algorithm.name == "mine, ema 0.0"
    assert by_flags(around=("mine.py:renamed('a', times=2)",)).algorithm.name == "aa"

    def light(done: Any) -> Tensor:
        return 1.0 / done.examples.double()

    mine, python = by_flags(weights="mine.py:light"), in_python(fedavg(weights=light))
    assert torch.equal(play(mine), play(python))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lr_schedule": ("cosin(3)",)}, "--lr-schedule: no cosin here; is it cosine"),
    ({"lr_schedule": ("cosine",)}, "--lr-schedule: cosine takes arguments, or (): cosine(rounds, "),
    (
        {"lr_schedule": ("cosine(0)",)},
        "--lr-schedule: cosine(rounds=0): must be an integer of at least 1",
    ),
    (
        {"lr_schedule": ("step_decay(3, '1')",)},
        "--lr-schedule: step_decay(3, '1'): an argument is of",
    ),
    ({"lr_schedule": ("mine.py:after",)}, "--lr-schedule: mine.py:after gives <function "),
    ({"server_schedule": ("mine.py:nothing",)}, "--server-schedule: mine.py:nothing gives None; "),
    ({"within_round": "cosine(2, 3)"}, "--within-round: cosine(floor) must be in [0, 1], not 3"),
    ({"server": "cosine(3)"}, "--server: cosine(3) gives <function cosine(3, 0.0)"),
    ({"server": "scheduled(adam(0.1), 2)"}, "--server: scheduled(schedule): such as cosine("),
    ({"server": "scheduled(cosine(2), cosine(3))"}, "--server: scheduled(cosine(2), "),
    (
        {"server": "lamb('a')"},
        "--server: lamb('a'): an argument is of the wrong type; it is lamb(lr=0.01, ",
    ),
    ({"server": "server_lamb(-1)"}, "--server: server_lamb(lr)"),
    ({"lr_schedule": ("mine.py:two",)}, "--lr-schedule: mine.py:two is two(a, b); expected a fun"),
    ({"sampler": "poisson(2)"}, "--sampler: poisson(2): a sampling rate is in (0, 1], not 2"),
    ({"aggregator": "trimmed_mean(1)"}, "--aggregator: trimmed_mean(share=1): must be at least"),
    ({"around": ("ema",)}, "--around: ema: missing a required argument: 'decay'; it is ema(decay)"),
    ({"around": ("ema(2)",)}, "--around: ema(decay) must be in [0, 1), not 2"),
    ({"around": ("ema('1')",)}, "--around: ema('1'): an argument is of the wrong type"),
    ({"around": ("emma(0.5)",)}, "--around: no emma here; is it ema"),
    ({"around": ("ema(0.5)", "ema(0.9)")}, "fedavg, ema 0.5: ema stands around it already"),
    ({"around": ("mine.py:nothing",)}, "--around: mine.py:nothing gives None; expected a vecfl.A"),
    (
        {"around": ("server_on_plateau(1, 'min')",)},
        "--around: server_on_plateau(1, 'min'): a plateau's m",
    ),
    ({"around": ("clients_on_plateau('a/b')",)}, "--around: clients_on_plateau: missing a requir"),
    (
        {"around": ("replay(lr=0.1, batches=8)",)},
        "--around: replay(lr=0.1, batches=8): batches must",
    ),
    (
        {"algorithm": "fedsgd", "around": ("clients_on_plateau('eval/loss', 'min')",)},
        "--around: clients_on_plateau('eval/loss', 'min'): fedsgd: its clients have no l",
    ),
    ({"algorithm": "fedsgd", "lr_schedule": ("cosine(3)",)}, "--lr-schedule: fedsgd does not take"),
    ({"algorithm": "fedadam", "server": "adam()"}, "--server: fedadam does not take it"),
    ({"algorithm": "dga", "weights": "by_examples"}, "--weights: dga does not take it"),
    (
        {"algorithm": "fedprox_adaptive(step=0)"},
        "fedprox_adaptive(step=0, patience=5): step must be positive",
    ),
    (
        {"algorithm": "fedprox_adaptive(server=3)"},
        "--algorithm: fedprox_adaptive(server=3): write fedprox_adaptive --server 3",
    ),
    ({"algorithm": "fedprox(mu=0.1)"}, "--algorithm: fedprox(mu=0.1): write fedprox --mu 0.1"),
    (
        {"algorithm": "fedprox(my=0.1)"},
        "--algorithm: fedprox(my=0.1): give its options by flags, fedprox",
    ),
    (
        {"algorithm": "fedprox_adaptive", "start": 1.0},
        "--start: fedprox_adaptive does not take it (got 1.0); write --algorithm "
        "'fedprox_adaptive(start=1.0)'",
    ),
    (
        {"algorithm": "mine.py:renamed", "mu": 1.0},
        "--mu: renamed does not take it (got 1.0); it takes no such flags",
    ),
    ({"epochs": 1, "steps": 2}, "--epochs: expected none beside --steps, which is instead of it"),
    ({"epochs": "1.5"}, "--epochs: 1.5: expected name(arguments), "),
    ({"epochs": "random_epochs(3, 1)"}, "--epochs: random_epochs(3, 1): must be integers "),
    ({"steps": 0}, "--steps: expected at least 1, got 0"),
    ({"max_examples": 0}, "--max-examples: expected at least 1, got 0"),
    ({"weights": "capped"}, "--weights: capped takes arguments, or (): capped(limit)"),
    ({"client_dropout": 1.5}, "--client-dropout: expected a probability in [0, 1), got 1.5"),
    ({"client_dropout": 1.0}, "--client-dropout: expected a probability in [0, 1), got 1.0"),
]


@pytest.mark.parametrize(("flags", "said"), WRONG)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    with pytest.raises(InputError) as caught:
        by_flags(**flags)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_what_the_server_and_the_examples_do_not_have() -> None:
    args = settle(AlgorithmArgs(cohort=3, **HOW, max_tokens=5))
    with pytest.raises(InputError, match="^--max-tokens: these examples have no tokens"):
        make_algorithm(args)
    args = settle(AlgorithmArgs(cohort=3, **HOW, around=("replay(lr=1, batches=Batches(2))",)))
    with pytest.raises(InputError, match="^--around: replay needs examples that the server has"):
        simulation(args, task(), DATA, make_algorithm(args))
