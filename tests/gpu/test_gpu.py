"""A GPU gives what the CPU gives: the oracle's results, isolation, masks, evaluation.

Skipped without a CUDA device; VECFL_TEST_DEVICE=cpu runs them on the CPU, which tries their code.
Float32 is compared without TF32, and torch is asked for deterministic operations.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vecfl
from vecfl import Batches, FederatedDataset, Simulation, Task, fedavg
from vecfl.algorithms import Algorithm
from vecfl.data import open_dataset, save
from vecfl.engine import Slots, make_backend, make_update
from vecfl.random import Kind, stream, words
from vecfl.schedule import make_plan
from vecfl.tape import Tape

from ..oracles import bridge, philox
from ..oracles.loop import Columns, Setting, federated_loop
from ..oracles.tasks import (
    AUGMENTED,
    LAYERED,
    PROBLEMS,
    SIZES,
    Cnn,
    Problem,
    classes,
    floats,
    integers,
)

pytestmark = [
    pytest.mark.gpu,
    # Operations that have no deterministic kernel are let pass: equality is asserted below.
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
    # The first product of an autograd thread may find no CUDA context, and makes one.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]
C, LONGEST = len(SIZES), 3
ALL = PROBLEMS | LAYERED
BACKENDS = ["loop", "vmap"]
ON = [(b, p) for b in BACKENDS for p in PROBLEMS]
ON += [("stacked", p) for p in ("linear", "mlp", "cnn", "tokens", *LAYERED)]
ON += [("stacked-each", "cnn"), ("stacked-unfold", "cnn")]
IMAGES = Problem(Cnn, classes, floats(1, 6, 6), integers(3))  # floats, so that one can be NaN
SETTINGS = {
    "sgd": Setting(rounds=2, seed=9, lr=0.1, epochs=2),
    "momentum, wrapped": Setting(rounds=2, seed=9, optimizer="momentum", lr=0.05, last="wrap"),
    "adam, pull, clip": Setting(rounds=2, seed=9, optimizer="adam", lr=0.05, mu=0.2, clip=0.5),
    "fedsgd by tokens": Setting(rounds=2, seed=9, algorithm="fedsgd", weight="tokens"),
    "rows of clients": Setting(rounds=3, seed=9, algorithm="habit"),
    "drawn, capped": Setting(rounds=2, seed=9, cohort=4, sample_seed=3, cap=10, steps=3),
}


def simulation(
    problem: Problem,
    clients: list[Columns],
    algorithm: Algorithm,
    device: str,
    *,
    setting: Setting = SETTINGS["sgd"],
    dtype: torch.dtype = torch.float64,
    **how: object,
) -> Simulation:
    data = bridge.dataset(clients)
    augment = bridge.transforms(setting.augment)
    task = Task(problem.build(), problem.loss, example=data.examples(2), augment=augment)
    cohort = bridge.sampler(setting)
    seeds = {"seed": setting.seed, "sample_seed": setting.sample_seed}
    return Simulation(task, data, algorithm, cohort, device=device, dtype=dtype, **seeds, **how)


def play(
    problem: Problem,
    setting: Setting,
    device: str,
    *,
    clients: list[Columns] | None = None,
    **how: object,
) -> bridge.Run:
    """The rounds of `setting` on the device; results come back to the CPU."""
    run = bridge.Run()
    algorithm = bridge.recorded(bridge.algorithm(setting), run.updates)
    clients = problem.clients() if clients is None else clients
    sim = simulation(problem, clients, algorithm, device, setting=setting, **how)
    state = sim.start()
    for _ in range(setting.rounds):
        run.updates.append({})
        state, metrics = sim.round(state)
        assert metrics["system/backend"] == how["backend"]
        assert metrics["system/slots"] == how.get("slots", metrics["system/slots"])
        assert state.server["w"].device.type == device
        run.models.append({name: t.cpu() for name, t in sim.state_dict(state).items()})
        run.metrics.append(metrics)
    return run


def sent(run: bridge.Run) -> dict[int, Tensor]:
    """What each client sent in the first round."""
    return {k: row.cpu() for k, [(row, _)] in run.updates[0].items()}


def close(a: object, b: object, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("backend, problem", ON)
def test_float64_agrees_with_the_oracle_on_the_cpu(
    backend: str, problem: str, setting: Setting, device: str
) -> None:
    p = ALL[problem]  # its clients have 0, 1, B-1, B, B+1, 2B and 23 examples
    truth = federated_loop(p.build(), p.loss, p.clients(), setting)
    ours = play(p, setting, device, backend=backend, slots=3)
    close(ours.models, truth.models)
    close([m["train/loss"] for m in ours.metrics], truth.loss)


# After two rounds of two epochs weights of order 1 are off by 2e-7 at most on a CPU; TF32, with 10
# bits of mantissa, would be off by 1e-4 or more.
@pytest.mark.parametrize("backend, problem", ON)
def test_float32_agrees_with_the_oracle_to_rounding(
    backend: str, problem: str, device: str
) -> None:
    p, setting = ALL[problem], SETTINGS["sgd"]
    truth = federated_loop(p.build(), p.loss, p.clients(), setting)
    ours = play(p, setting, device, backend=backend, slots=3, dtype=torch.float32)
    for t in range(setting.rounds):
        close(doubled(ours.models[t]), doubled(truth.models[t]), 0, 1e-5)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(
    "backend, problem", [(b, p) for b in BACKENDS for p in AUGMENTED] + [("stacked", "images")]
)
def test_augmented_images_agree_with_the_oracle(
    backend: str, problem: str, setting: Setting, device: str
) -> None:
    p = AUGMENTED[problem]
    setting = replace(setting, augment=p.augment)
    truth = federated_loop(p.build(), p.loss, p.clients(), setting)
    ours = play(p, setting, device, backend=backend, slots=3)
    close(ours.models, truth.models)


def doubled(model: Columns) -> Columns:
    return {name: t.double() for name, t in model.items()}


@pytest.mark.parametrize("backend, problem", ON)
def test_any_number_of_slots_gives_the_same_updates(
    backend: str, problem: str, device: str
) -> None:
    p, setting = ALL[problem], replace(SETTINGS["adam, pull, clip"], rounds=1)
    first = sent(play(p, setting, device, backend=backend, slots=1))
    assert {k: bool(row.any()) for k, row in first.items()} == {k: SIZES[k] > 0 for k in range(C)}
    for slots in (2, C, C + 2):
        close(sent(play(p, setting, device, backend=backend, slots=slots)), first)


def test_slots_are_chosen_by_memory(device: str) -> None:
    run = play(PROBLEMS["mlp"], SETTINGS["sgd"], device, backend="vmap")
    assert run.metrics[0]["system/slots"] == C  # small rows: everyone at the same time


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("problem", [PROBLEMS["mlp"], IMAGES], ids=["mlp", "images"])
@pytest.mark.parametrize("backend, slots", [("loop", 3), ("vmap", 3), ("vmap", C)])
def test_other_clients_keep_their_bits(
    backend: str, slots: int, problem: Problem, dtype: torch.dtype, device: str
) -> None:
    setting = Setting(rounds=1, seed=9, epochs=2, optimizer="momentum", lr=0.05)
    how = {"backend": backend, "slots": slots, "dtype": dtype}
    before = sent(play(problem, setting, device, **how))
    for spoil in (-3.0, float("nan")):
        clients = problem.clients()
        clients[LONGEST]["x"][0] *= spoil  # the first in its slot; idle slots copy its examples
        run = play(problem, setting, device, clients=clients, **how)
        after = sent(run)
        same = {k: torch.equal(before[k], after[k]) for k in range(C)}
        assert same == {k: k != LONGEST for k in range(C)}, spoil
        lost = int(spoil != spoil)
        counts = run.metrics[0]["train/dropped_clients"], run.metrics[0]["train/clients"]
        assert counts == (lost, C - 1 - lost)  # one client has no examples
        assert all(t.isfinite().all() for t in run.models[0].values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cohort_without_examples_leaves_the_model(backend: str, device: str) -> None:
    p = PROBLEMS["mlp"]
    setting = Setting(rounds=1, cohort=2)
    clients = p.clients((0, 0, 4))
    algorithm = bridge.algorithm(setting)
    data = bridge.dataset(clients)
    task = Task(p.build(), p.loss, example=data.examples(2))
    empty = Simulation(
        task, data, algorithm, lambda eligible, seed, round: torch.arange(2), device=device,
        backend=backend, slots=2, dtype=torch.float64,
    )  # fmt: skip
    state, metrics = empty.round(empty.start())
    assert metrics["train/clients"] == metrics["system/client_steps"] == 0
    close({k: t.cpu() for k, t in empty.state_dict(state).items()}, p.build().state_dict(), 0, 0)


class Masked(nn.Module):
    """w times what dropout leaves: the gradient of w is the mask, scaled."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.w, self.drop = nn.Parameter(torch.zeros(37)), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return (self.drop(x) * self.w).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("p", [0.25, 0.3], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_masks_are_those_of_the_contract(
    backend: str, p: float, dtype: torch.dtype, device: str
) -> None:
    # One example of ones, w = 0, lr = 1: a client sends w - w_k = its gradient, the scaled mask.
    problem = Problem(lambda: Masked(p), lambda output, batch: (output, None), floats(37), floats())
    clients = [{"x": torch.ones(1, 37), "y": torch.zeros(1)} for _ in range(5)]
    setting = Setting(rounds=1, seed=2**40 + 7, lr=1.0)
    run = play(problem, setting, device, clients=clients, backend=backend, slots=3, dtype=dtype)
    for k, row in sent(run).items():
        mask = philox.dropout_mask(setting.seed, 0, k, 0, 0, p, (1, 37))
        assert row.tolist() == torch.from_numpy(mask)[0].to(dtype).tolist()
        assert 0 < row.count_nonzero() < 37


def test_words_have_the_bits_of_the_contract(device: str) -> None:
    seed, clients = 2**62 + 12345, torch.tensor([0, 1, 2**32 - 1])
    streams = stream(Kind.DROPOUT, client=clients, round=5, step=9).to(device)
    ours = words(seed, streams, 101)
    assert ours.device.type == device
    for row, client in zip(ours.tolist(), clients.tolist(), strict=True):
        expected = philox.words(seed, int(Kind.DROPOUT), 101, client=client, t=5, step=9)
        assert row == expected.tolist()


@pytest.mark.parametrize("problem", PROBLEMS)
def test_evaluation_and_state_dict(problem: str, device: str) -> None:
    p, setting = ALL[problem], SETTINGS["sgd"]
    found, models = [], []
    for where in (device, "cpu"):
        sim = simulation(p, p.clients(), bridge.algorithm(setting), where, slots=3)
        state, _ = sim.round(sim.start())
        other = bridge.dataset(p.clients((2, 0, 5)))
        metrics = sim.evaluate(state, other.columns) | sim.evaluate_clients(state)
        found.append(metrics | {"other": sim.evaluate_clients(state, other)["client/loss_p90"]})
        models.append(sim.state_dict(state))
    close(found[0], found[1])
    module = p.build()
    module.load_state_dict(models[0])  # a module on the CPU takes the tensors of a GPU
    close(module.state_dict(), models[1])


SERVERS = {
    "momentum": vecfl.server_momentum(0.5),
    "adam": vecfl.server_adam(0.1),
    "yogi": vecfl.fedopt_yogi(0.1),
}


@pytest.mark.parametrize("server", SERVERS)
def test_server_optimizers(server: str, device: str) -> None:
    p, models = PROBLEMS["mlp"], []
    for where in (device, "cpu"):
        algorithm = fedavg(lr=0.1, batches=Batches(4), server=SERVERS[server])
        sim = simulation(p, p.clients(), algorithm, where, slots=3)
        state = sim.start()
        for _ in range(3):
            state, _ = sim.round(state)
        models.append({name: t.cpu() for name, t in sim.state_dict(state).items()})
    close(models[0], models[1])


def test_data_and_module_may_lie_on_the_device(device: str) -> None:
    p, models = PROBLEMS["mlp"], []
    algorithm = fedavg(lr=0.1, batches=Batches(4))
    for where in (device, "cpu"):
        data: FederatedDataset = bridge.dataset(p.clients()).to(where)
        task = Task(p.build().to(where), p.loss, example=data.examples(2))
        for run_on in (device, "cpu"):
            everyone = vecfl.everyone()
            sim = Simulation(task, data, algorithm, everyone, device=run_on, dtype=torch.float64)
            state, _ = sim.round(sim.start())
            models.append({name: t.cpu() for name, t in sim.state_dict(state).items()})
            sim.evaluate(state, data.columns)
    for model in models[:-1]:
        close(model, models[-1])


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "store"])
@pytest.mark.parametrize("backend, problem", ON)
def test_data_that_stay_on_the_host_give_the_same(
    backend: str, problem: str, stored: bool, device: str, tmp_path: Path
) -> None:
    p, setting, found = ALL[problem], SETTINGS["drawn, capped"], []
    for resident in (True, False):
        algorithm, data = bridge.algorithm(setting), bridge.dataset(p.clients())
        if stored:
            save(data, tmp_path / str(resident))
            data = open_dataset(tmp_path / str(resident))
        task = Task(p.build(), p.loss, example=data.examples(2))
        how = {"backend": backend, "slots": 3, "dtype": torch.float64, "resident": resident}
        sim = Simulation(task, data, algorithm, vecfl.uniform(4), device=device, **how)
        state, where = sim.start(), "resident" if resident else "streamed"
        for _ in range(4):
            state, metrics = sim.round(state)
            assert metrics["system/data"] == where
        assert sim.data.columns["x"].device.type == (device if resident else "cpu")
        evaluated = sim.evaluate(state, data.columns) | sim.evaluate_clients(state)
        found.append((state.server["w"], metrics["train/loss"], evaluated))
    close(*found)


@pytest.mark.parametrize("problem", ["mlp", "cnn", "tokens", "buffers", "augmented"])
def test_a_block_is_launched_without_waiting(problem: str, device: str) -> None:
    p, batches = (PROBLEMS | AUGMENTED)[problem], Batches(4, epochs=2)
    data = bridge.dataset(p.clients((8, 5, 8)))
    augment = bridge.transforms(p.augment)
    task = Task(p.build(), p.loss, example=data.examples(2), augment=augment)
    task = task.to(device, torch.float32)
    w, rule = task.layout.flatten(task.module), fedavg(lr=0.1, batches=batches).rule
    slots = Slots(task.layout, rule, 3, torch.device(device), torch.float32)
    slots.start_(torch.arange(3, device=device), w, None)
    backend, columns = make_backend("vmap", task, data.examples(2)), data.to(device).columns
    update = make_update(rule, task.layout.param_views(w), 0)
    plan = make_plan(batches, data.offsets, torch.arange(3))
    (block,) = Tape(plan, batches, 3, seed=0, round=0, draws=task.keyed).blocks()
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")  # whatever waits for the GPU raises
    try:
        with torch.no_grad():
            backend.run_(slots, block, columns, update)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert slots.seen.tolist() == [16, 10, 16]
