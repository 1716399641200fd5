"""What a simulation gives a checkpoint, and takes back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vecfl
from tests.persist.tiny import X, Y, arguments, make_simulation
from vecfl import checkpoint
from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.mesh import Mesh
from vecfl.state import facts as known_facts
from vecfl.state import open_table, together, unpack
from vecfl.table import Tables

OPTIMIZERS = {
    "sgd": vecfl.server_sgd(),
    "momentum": vecfl.server_momentum(lr=0.5),
    "adam": vecfl.server_adam(lr=0.1),
    "adagrad": vecfl.fedopt_adagrad(lr=0.1),
    "yogi": vecfl.fedopt_yogi(lr=0.1),
    "adamax": vecfl.server_adamax(lr=0.1),
    "lamb": vecfl.clipped(vecfl.server_lamb(lr=0.1), 0.5),
    "lars": vecfl.scheduled(vecfl.server_lars(lr=0.1), vecfl.cosine(5)),
}


class Counting(nn.Module):
    """A linear model with a buffer that each forward pass counts up, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.tensor(0.5), requires_grad=False)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls = self.calls + 1
        return self.linear(x) * self.frozen


def simulation(
    optimizer: str,
    dtype: torch.dtype = torch.float32,
    clients: int = 5,
    examples: int = 40,
    module: Callable[[], nn.Module] = Counting,
) -> vecfl.Simulation:
    client = [i % clients for i in range(examples)]
    data = FederatedDataset.from_arrays({"x": X[:examples], "y": Y[:examples]}, client)
    torch.manual_seed(0)
    task = vecfl.Task(module(), vecfl.cross_entropy, example=data.examples(2))
    batches = vecfl.Batches(size=3)
    algorithm = vecfl.fedavg(lr=0.2, batches=batches, server=OPTIMIZERS[optimizer])
    return vecfl.Simulation(task, data, algorithm, vecfl.uniform(3), backend="loop", dtype=dtype)


def rounds(sim: vecfl.Simulation, state: vecfl.State, number: int) -> vecfl.State:
    for _ in range(number):
        state, _ = sim.round(state)
    return state


def bits(state: vecfl.State) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in state.server.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_state_goes_through_a_file(tmp_path: Path, optimizer: str, dtype: torch.dtype) -> None:
    sim = simulation(optimizer, dtype)
    half = rounds(sim, sim.start(), 2)
    checkpoint.save(tmp_path / "half", sim.save(half))
    whole = rounds(sim, half, 2)
    other = simulation(optimizer, dtype)
    again = other.load(checkpoint.load(tmp_path / "half"))
    assert (again.round, bits(again)) == (2, bits(half))
    assert bits(rounds(other, again, 2)) == bits(whole) != bits(again)


def surrounded(task: vecfl.Task, algorithm: vecfl.Algorithm) -> vecfl.Algorithm:
    """All that may stand around an algorithm's server and has a state."""
    batches = vecfl.Batches(4, epochs=2)
    algorithm = vecfl.server_on_plateau(algorithm, "train/loss", "max", 0.5, 0)
    algorithm = vecfl.clients_on_plateau(algorithm, "train/loss", "max", 0.25, 1)
    own = {"x": X[:9], "y": Y[:9]}
    for_server = {"lr": 0.02, "optimizer": vecfl.adam(), "batches": batches}
    return vecfl.ema(vecfl.replay(algorithm, task, own, **for_server), 0.6)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_what_stands_around_a_server_goes_through_a_file(tmp_path: Path, cut: int) -> None:
    def made() -> vecfl.Simulation:
        sim = simulation("momentum")
        algorithm = surrounded(sim.task, sim.algorithm)
        return vecfl.Simulation(sim.task, sim.data, algorithm, sim.sampler, backend="loop")

    def play(sim: vecfl.Simulation, state: vecfl.State, rounds: int) -> vecfl.State:
        for _ in range(rounds):
            state, metrics = sim.round(state)
            state = sim.observe(state, metrics)
        return state

    sim, other = made(), made()
    whole = play(sim, sim.start(), 4)
    checkpoint.save(tmp_path / "cut", sim.save(play(sim, sim.start(), cut)))
    again = other.load(checkpoint.load(tmp_path / "cut"))
    assert bits(play(other, again, 4 - cut)) == bits(whole)
    names = {name.rpartition("/")[0] for name in whole.server}
    assert names == {"", "ema", "replay", "observed/server", "observed/clients"}
    assert whole.server["observed/server/factor"] < 1 and whole.server["replay/steps"] == 24
    assert sim.state_dict(whole)["linear.weight"].ne(whole.server["w"][:6].view(2, 3)).all()


def test_the_model_is_named_views_of_the_row() -> None:
    sim = simulation("sgd")
    state = rounds(sim, sim.start(), 1)
    content = sim.save(state)
    model, whole = content["model"], sim.state_dict(state)
    assert model.keys() == {"linear.weight", "linear.bias", "calls"}  # not what is frozen
    assert all(torch.equal(model[name], whole[name]) for name in model)
    assert model["linear.bias"].untyped_storage().data_ptr() == (
        content["server"]["w"].untyped_storage().data_ptr()
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed 0 there, 1 here; sample_seed 0 there, 1 here"),
        ({"sample_seed": 5}, "sample_seed 0 there, 5 here"),
        ({"slots": 1}, "slots 2 there, 1 here"),
        ({"workers": 1}, "workers 2 there, 1 here"),
        ({"backend": "vmap"}, "backend loop there, vmap here"),
        ({"exact_sums": True}, "exact_sums False there, True here"),
    ],
)
def test_the_state_of_another_run_is_refused(change: dict[str, Any], said: str) -> None:
    content = make_simulation(arguments("run")).save(make_simulation(arguments("run")).start())
    other = make_simulation(arguments("run", **change))
    with pytest.raises(InputError) as caught:
        other.load(content)
    assert str(caught.value) == f"the checkpoint is of another run: {said}"
    assert other.load(content, changed=True).round == 0


def test_another_rule_of_the_clients_is_refused() -> None:
    content = make_simulation(arguments("run")).save(make_simulation(arguments("run")).start())
    other = make_simulation(arguments("run", batch=4))
    with pytest.raises(InputError, match=r"run: rule .*size=3.* there, .*size=4.* here$"):
        other.load(content)


def test_several_machines_do_not_share_rows(tmp_path: Path) -> None:
    tables = Tables({"a": (2,)}, 3, torch.float32, tmp_path / "rows")
    with pytest.raises(InputError, match="of one machine; these are on 2$"):
        open_table(tables, Mesh(machines=2), 0)


def test_rows_that_another_rank_cannot_write_are_no_checkpoint() -> None:
    class Two(Mesh):
        def sum(self, *parts: torch.Tensor) -> list[torch.Tensor]:
            return [part + torch.tensor([0.0, 1.0]) for part in parts]

    with pytest.raises(OSError, match="rank 1 could not write the rows of its clients"):
        together(Two(0, 2), lambda: 1)
    assert together(Mesh(), lambda: 1) == 1


class Other(Counting):
    """Another value that does not train."""

    def __init__(self, value: float = 0.25) -> None:
        super().__init__()
        self.frozen.data.fill_(value)


class Mask(Counting):
    """A buffer beside it that nothing changes."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([value]), persistent=False)


@pytest.mark.parametrize("pair", [(Counting, Other), (Mask, lambda: Mask(2.0)), (Mask, Counting)])
def test_another_frozen_body_is_refused(pair: tuple[Any, Any]) -> None:
    for there, here in (pair, pair[::-1]):
        content = simulation("sgd", module=there).save(simulation("sgd", module=there).start())
        with pytest.raises(InputError, match="^the checkpoint is of another run: frozen .* there"):
            simulation("sgd", module=here).load(content)
        simulation("sgd", module=here).load(content, changed=True)
        simulation("sgd", module=there).load(content)


def test_older_checkpoints_tell_nothing_of_what_is_frozen_and_of_processes() -> None:
    for module, right in ((lambda: nn.Linear(3, 2), True), (Counting, False)):
        sim = simulation("sgd", module=module)
        content = sim.save(sim.start())
        del content["facts"]["frozen"], content["facts"]["processes"]
        if right:
            sim.load(content)
        else:
            with pytest.raises(InputError, match="another run: frozen nothing there"):
                sim.load(content)


def test_tied_parameters_are_saved_under_all_their_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    sim = simulation("sgd", module=Tied)
    state = rounds(sim, sim.start(), 1)
    model = sim.save(state)["model"]
    assert model.keys() == Tied().state_dict().keys()
    assert all(torch.equal(model[name], t) for name, t in sim.state_dict(state).items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clients": 4}, "clients 5 there, 4 here"),
        ({"examples": 39}, "examples 40 there, 39 here"),
        (
            {"module": lambda: nn.Sequential(Counting())},
            "parameters ['linear.weight [2, 3]', 'linear.bias [2]'] there, "
            "['0.linear.weight [2, 3]', '0.linear.bias [2]'] here",
        ),
    ],
)
def test_the_state_of_another_population_or_model_is_refused(
    change: dict[str, Any], said: str
) -> None:
    content = simulation("sgd").save(simulation("sgd").start())
    with pytest.raises(InputError) as caught:
        simulation("sgd", **change).load(content)
    assert str(caught.value) == f"the checkpoint is of another run: {said}"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (("sgd", torch.float64), r"'w' is float32 \[9\] there, float64 \[9\] here"),
        (("momentum", torch.float32), r"'\w+' is missing there, float64 \[8\] here"),
    ],
)
@pytest.mark.parametrize("changed", [False, True])
def test_tensors_that_do_not_fit_are_refused(
    other: tuple[str, torch.dtype], said: str, changed: bool
) -> None:
    content = simulation("sgd").save(simulation("sgd").start())
    with pytest.raises(InputError, match=f"another model, precision or server optimizer: {said}"):
        simulation(*other).load(content, changed=changed)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({"epochs": [1, 2, 1, 1, 1]}, {"epochs": [1, 1, 2, 1, 1]}),
        ({"epochs": vecfl.random_epochs(1, 3)}, {"epochs": vecfl.random_epochs(1, 4)}),
        ({"max_tokens": 9, "tokens": [2] * 40}, {"max_tokens": 9, "tokens": [2] * 39 + [3]}),
    ],
)
def test_the_state_of_other_work_is_refused(there: dict[str, Any], here: dict[str, Any]) -> None:
    def made(work: dict[str, Any]) -> vecfl.Simulation:
        sim = simulation("sgd")
        algorithm = vecfl.fedavg(lr=0.2, batches=vecfl.Batches(3, **work))
        return vecfl.Simulation(sim.task, sim.data, algorithm, sim.sampler, backend="loop")

    content = made(there).save(made(there).start())
    made(there).load(content)
    with pytest.raises(InputError, match=r"^the checkpoint is of another run: rule LocalRule\("):
        made(here).load(content)


PAIRS = {
    "softmax_beta": lambda x: dga(softmax_beta=(0.5, 0.50000001)[x]),
    "weighting": lambda x: dga(weighting=("loss", "uniform")[x]),
    "dga's server": lambda x: dga(server=vecfl.server_sgd(1 + x)),
    "optimizer": lambda x: plain(server=(vecfl.server_adam(0.1), vecfl.server_lamb(0.1))[x]),
    "sgd": lambda x: plain(server=vecfl.server_sgd(1 + x)),
    "momentum": lambda x: plain(server=vecfl.server_momentum(1, (0.9, 0.8)[x])),
    "eps": lambda x: plain(server=vecfl.server_adam(0.1, eps=(1e-8, 1e-7)[x])),
    "betas": lambda x: plain(server=vecfl.server_adamax(0.1, (0.9, (0.99, 0.999)[x]))),
    "decay": lambda x: plain(server=vecfl.server_adamw(0.1, weight_decay=x)),
    "trust": lambda x: plain(server=vecfl.server_lars(0.1, trust=1 + x)),
    "tau": lambda x: plain(server=vecfl.fedopt_adagrad(0.1, tau=1 + x)),
    "start": lambda x: plain(server=vecfl.fedopt_adagrad(0.1, start=1 + x)),
    "beta2": lambda x: plain(server=vecfl.fedopt_adam(0.1, (0.9, (0.99, 0.999)[x]))),
    "yogi": lambda x: plain(server=vecfl.fedopt_yogi(0.1, (0.9, (0.99, 0.999)[x]))),
    "clipped": lambda x: plain(server=vecfl.clipped(vecfl.server_sgd(), (1, 1.0000001)[x])),
    "scheduled": lambda x: plain(server=vecfl.scheduled(vecfl.server_sgd(), vecfl.cosine(5 + x))),
    "weights": lambda x: plain(weights=(vecfl.by_examples, vecfl.uniform_weights)[x]),
    "capped": lambda x: plain(weights=vecfl.capped(5 + x)),
    "client's decay": lambda x: plain(optimizer=vecfl.momentum(0.9, weight_decay=(0.1, 0.2)[x])),
    "client's betas": lambda x: plain(optimizer=vecfl.adam((0.9, (0.99, 0.999)[x]))),
    "client's eps": lambda x: plain(optimizer=vecfl.rmsprop(eps=(1e-8, 1e-7)[x])),
    "fednova": lambda x: vecfl.fednova(lr=0.1, batches=B3, weights=vecfl.capped(5 + x)),
    "fedsgd": lambda x: vecfl.fedsgd(server=vecfl.server_sgd(1 + x)),
    "scaffold": lambda x: vecfl.scaffold(lr=0.1, batches=B3, option=1 + x),
    "scaffold's server": lambda x: vecfl.scaffold(
        lr=0.1, batches=B3, server=vecfl.server_sgd(1 + x)
    ),
    "step": lambda x: vecfl.fedprox_adaptive(lr=0.1, batches=B3, step=(0.1, 0.2)[x]),
    "patience": lambda x: vecfl.fedprox_adaptive(lr=0.1, batches=B3, patience=5 + x),
    "ema": lambda x: vecfl.ema(plain(), (0.9999999, 0.99999991)[x]),
    "trimmed": lambda x: vecfl.aggregated_by(plain(), vecfl.trimmed_mean((0.1, 0.1000001)[x])),
    "plateau": lambda x: vecfl.server_on_plateau(plain(), "a/b", "min", (0.1, 0.1000001)[x]),
    "late": lambda x: vecfl.delayed(plain(), vecfl.stale((0.1, 0.1000001)[x])),
    "delays": lambda x: vecfl.delayed(
        plain(), vecfl.drawn_delay([(0.9, 0.9000001)[x], (0.1, 0.0999999)[x]])
    ),
    "replay": lambda x: replayed(lr=(0.1, 0.2)[x], batches=B3),
    "replay's batches": lambda x: replayed(lr=0.1, batches=vecfl.Batches(3 + x)),
    "replay's examples": lambda x: replayed(9 + x, lr=0.1, batches=B3),
}
B3 = vecfl.Batches(3)


def plain(**kind: Any) -> vecfl.Algorithm:
    return vecfl.fedavg(lr=0.1, batches=B3, **kind)


def dga(**kind: Any) -> vecfl.Algorithm:
    return vecfl.dga(lr=0.1, batches=B3, **kind)


def replayed(examples: int = 9, **kind: Any) -> vecfl.Algorithm:
    return vecfl.replay(
        plain(), simulation("sgd").task, {"x": X[:examples], "y": Y[:examples]}, **kind
    )


@pytest.mark.parametrize("name", PAIRS)
def test_every_number_of_an_algorithm_is_a_fact(name: str) -> None:
    """Tensors fit, arrangement, seeds and data are the same; the line names what is not."""
    one, same, other = (PAIRS[name](x) for x in (0, 0, 1))
    sim = simulation("sgd")
    facts = [known_facts(a, sim.data, sim.task.layout, {}, {}) for a in (one, same, other)]
    assert facts[0] == facts[1]
    different = [fact for fact, value in facts[0].items() if value != facts[2].get(fact)]
    assert len(different) == 1
    fresh = {"w": torch.zeros(2)}
    with pytest.raises(InputError) as caught:
        unpack({"round": 0, "server": fresh, "facts": facts[0]}, fresh, facts[2], False)
    line = str(caught.value)
    assert line.startswith(f"the checkpoint is of another run: {different[0]} ")
    assert "\n" not in line


def test_names_may_have_commas() -> None:
    """Names of what a transform keeps begin with its place, whatever stands in names."""
    mine = replace(vecfl.clip_by_norm(1.0), name="mine, of 1, 2 and 3")
    around = vecfl.chain(vecfl.ema(replace(plain(), name="a, b, c"), 0.5), mine)
    twice = vecfl.chain(around, vecfl.clip_by_norm(1.0))
    assert (around.places, twice.places) == (1, 2)
    assert twice.name == "a, b, c, ema 0.5, mine, of 1, 2 and 3, clip_by_norm 1.0"
    sim = simulation("sgd")
    sim = vecfl.Simulation(sim.task, sim.data, twice, sim.sampler, backend="loop")
    _, told = sim.round(sim.start())
    assert {"train/norm", "train/norm.1"} <= told.keys()


def test_any_fact_counts() -> None:
    content = {"round": 0, "server": {"w": torch.zeros(2)}, "facts": {"clients": 3}}
    fresh = {"w": torch.ones(2)}
    assert unpack(content, fresh, {"clients": 3}, False)["w"].tolist() == [0, 0]
    for facts in ({"clients": 4}, {"clients": 3, "new": 1}):
        with pytest.raises(InputError, match="another run"):
            unpack(content, fresh, facts, False)


def test_a_frozen_layer_comes_back_as_it_was(tmp_path: Path) -> None:
    """It is in the state dict and in no row, no message and no checkpoint's model; evaluation sees
    it, and a checkpoint goes to a run whose layer is frozen, and to no other."""

    def frozen(pattern: str) -> tuple[nn.Sequential, vecfl.Simulation]:
        data = FederatedDataset.from_arrays({"x": X, "y": Y}, [i % 5 for i in range(len(X))])
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        if pattern:
            vecfl.freeze(module, pattern)
        task = vecfl.Task(module, vecfl.cross_entropy, example=data.examples(2))
        algorithm = vecfl.fedavg(lr=0.2, batches=vecfl.Batches(3), server=OPTIMIZERS["adam"])
        return module, vecfl.Simulation(task, data, algorithm, vecfl.uniform(3), backend="loop")

    module, sim = frozen("^0[.]")
    state = rounds(sim, sim.start(), 2)
    trained = sim.state_dict(state)
    assert trained.keys() == module.state_dict().keys()
    same = {name: torch.equal(t, trained[name]) for name, t in module.state_dict().items()}
    assert same == {"0.weight": True, "0.bias": True, "2.weight": False, "2.bias": False}
    assert {name: len(t) for name, t in state.server.items() if t.dim()} == {
        name: 10 for name, t in state.server.items() if t.dim()
    }
    module.load_state_dict(trained)
    with torch.no_grad():
        right = nn.functional.cross_entropy(module(X), Y).item()
    assert sim.evaluate(state, {"x": X, "y": Y})["eval/loss"] == pytest.approx(right, rel=1e-5)
    checkpoint.save(tmp_path / "half", sim.save(state))
    content = checkpoint.load(tmp_path / "half")
    assert content["model"].keys() == {"2.weight", "2.bias"}
    _, other = frozen("^0[.]")
    assert bits(rounds(other, other.load(content), 2)) == bits(rounds(sim, state, 2))
    for pattern in ("", "^2[.]weight"):
        with pytest.raises(InputError, match="the checkpoint is of another"):
            frozen(pattern)[1].load(content)
