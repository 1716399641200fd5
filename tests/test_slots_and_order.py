"""Slots and order are no part of a result: what a client sends is the same wherever it sat.

Rows are compared by their bits where the arithmetic of a client is the same, and to 1e-9 in float64
where it is not: another backend, or vmap with a single slot, where torch multiplies matrices by
another routine (the tied and the convolutional model differ in the last bit there). Slots bound the
memory of a round, too.
"""

import json
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vecfl
from vecfl import Batches, FederatedDataset, Simulation, Task, fedavg, fedsgd, tape
from vecfl.algorithms import Algorithm, Begin, Finished, Starting, Upload
from vecfl.engine import LocalRule

from .oracles.bridge import algorithm as algorithm_of
from .oracles.bridge import dataset, recorded, run_vecfl
from .oracles.loop import Columns, Setting, federated_loop
from .oracles.tasks import PROBLEMS, SIZES
from .oracles.tiny import SETTLED, STEEP, Line, client, squared

Rows = dict[int, Tensor]
C = len(SIZES)
DENSE = [name for name in PROBLEMS if name != "cnn"]
DTYPES = [torch.float32, torch.float64]
SETTING = Setting(rounds=1, seed=2**35 + 1, optimizer="adam", lr=0.05, epochs=2, mu=0.2)


def rows(
    problem: str, backend: str, slots: int, dtype: torch.dtype, clip: float | None = None
) -> Rows:
    """What each of the ragged clients sends; run_vecfl asserts backend and slots."""
    p, setting = PROBLEMS[problem], replace(SETTING, clip=clip)
    kind = {"backend": backend, "slots": slots, "dtype": dtype}
    (sent,) = run_vecfl(p.build(), p.loss, p.clients(), setting, **kind).updates
    assert len(sent) == C and all(sent[k][0][0].any() == (n > 0) for k, n in enumerate(SIZES))
    return {k: row for k, [(row, _)] in sent.items()}


def same_bits(a: Rows, b: Rows) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def close(a: Rows, b: Rows) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_loop_rows_have_the_same_bits_in_any_number_of_slots(
    problem: str, dtype: torch.dtype
) -> None:
    alone = rows(problem, "loop", 1, dtype, clip=0.5)
    for slots in (3, C, C + 2):
        same_bits(rows(problem, "loop", slots, dtype, clip=0.5), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", DENSE)
def test_vmap_rows_have_the_same_bits_in_two_slots_or_more(
    problem: str, dtype: torch.dtype
) -> None:
    pair = rows(problem, "vmap", 2, dtype)
    for slots in (3, C, C + 2):
        same_bits(rows(problem, "vmap", slots, dtype), pair)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_backends_and_slots_agree(problem: str) -> None:
    reference = rows(problem, "loop", 1, torch.float64, clip=0.5)
    for slots in (1, 2, C, C + 2):
        close(rows(problem, "vmap", slots, torch.float64, clip=0.5), reference)


@pytest.mark.parametrize("backend, slots", [("loop", 2), ("vmap", 3)])
@pytest.mark.parametrize("problem", ["mlp", "cnn", "tokens"])
def test_a_tape_cut_into_windows_has_the_same_bits(
    problem: str, backend: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows(problem, backend, slots, torch.float32)
    for entries in (1, 30):  # one step at a time; two or three
        monkeypatch.setattr(tape, "WINDOW", entries)
        same_bits(rows(problem, backend, slots, torch.float32), whole)


def run_in_order(
    order: Sequence[int],
    algorithm: Algorithm,
    *,
    backend: str,
    slots: int,
    clients: list[Columns],
    problem: str = "mlp",
    module: nn.Module | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Rows, dict[str, Tensor], dict]:
    """One round of the clients `order` in this order: rows, model, metrics."""
    p, data, sent = PROBLEMS[problem], dataset(clients), [{}]
    module, loss = (p.build(), p.loss) if module is None else (module, squared)
    sim = Simulation(
        Task(module, loss, example=data.examples(2)),
        data,
        recorded(algorithm, sent),
        lambda eligible, seed, round: torch.tensor(order),
        backend=backend,
        slots=slots,
        seed=77,
        dtype=dtype,
    )
    state, metrics = sim.round(sim.start())
    assert (metrics["system/backend"], metrics["system/slots"]) == (backend, slots)
    assert sorted(sent[0]) == sorted(order)
    return {k: row for k, [(row, _)] in sent[0].items()}, sim.state_dict(state), metrics


ORDERS = [(6, 5, 4, 3, 2, 1, 0), (3, 0, 6, 2, 5, 1, 4)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", ["mlp", "cnn"])
@pytest.mark.parametrize("backend, slots", [("loop", 1), ("loop", 3), ("vmap", 3)])
def test_order_of_the_cohort(backend: str, slots: int, problem: str, dtype: torch.dtype) -> None:
    algorithm = fedavg(lr=0.05, batches=Batches(4, epochs=2), optimizer=vecfl.adam())
    clients = PROBLEMS[problem].clients()
    kind = {"backend": backend, "slots": slots, "clients": clients, "problem": problem}
    first, model, _ = run_in_order(range(C), algorithm, dtype=dtype, **kind)
    for order in ORDERS:
        sent, moved, _ = run_in_order(order, algorithm, dtype=dtype, **kind)
        same_bits(sent, first)
        rtol = 1e-12 if dtype == torch.float64 else 1e-6  # one rounding of the float64 mean
        torch.testing.assert_close(moved, model, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_a_drawn_cohort_agrees_with_the_oracle(backend: str) -> None:
    # Whose draws are whose: a client's place in the cohort is not its place in the dataset.
    p, setting = PROBLEMS["mlp"], Setting(seed=8, cohort=4, sample_seed=3, epochs=2)
    truth = federated_loop(p.build(), p.loss, p.clients(), setting)
    ours = run_vecfl(p.build(), p.loss, p.clients(), setting, backend=backend, slots=2)
    for t in range(setting.rounds):
        members = [k for k, _, _ in truth.updates[t]]
        assert members != sorted(members) and ours.updates[t].keys() == set(members)
        torch.testing.assert_close(ours.models[t], truth.models[t], rtol=1e-9, atol=1e-12)


OWN_WORK = {
    "by client": {"epochs": (3, 2, 1, 1, 4, 0, 2)},
    "random": {"random_epochs": (0, 3, 0.8)},
    "token cap": {"epochs": 2, "token_cap": 25},
}


@pytest.mark.parametrize("work", OWN_WORK)
@pytest.mark.parametrize("backend, slots", [("loop", 1), ("loop", 3), ("vmap", 3)])
def test_work_of_their_own_goes_with_clients(backend: str, slots: int, work: str) -> None:
    p = PROBLEMS["tokens"]
    setting = replace(SETTING, factor=lambda step: 0.9**step, **OWN_WORK[work])
    clients, kind = p.clients(), {"backend": backend, "slots": slots, "problem": "tokens"}
    ours = algorithm_of(setting, dataset(clients).columns)
    first, _, metrics = run_in_order(range(C), ours, clients=clients, **kind)
    for order in ORDERS:
        sent, _, again = run_in_order(order, ours, clients=clients, **kind)
        same_bits(sent, first)
        assert again["system/client_steps"] == metrics["system/client_steps"]
    truth = federated_loop(p.build(), p.loss, clients, replace(setting, seed=77))
    close(first, {k: update for k, update, _ in truth.updates[0]})


OPTIMIZERS = {"momentum": vecfl.momentum(0.9), "nesterov": vecfl.momentum(0.9, nesterov=True)}
OPTIMIZERS |= {"adam": vecfl.adam(), "adamw": vecfl.adamw()}
OPTIMIZERS |= {"rmsprop": vecfl.rmsprop(momentum=0.5, centered=True, weight_decay=0.1)}
OPTIMIZERS |= {"scheduled": vecfl.within_round(vecfl.sgd(), lambda step: 1 / (1 + step))}
LONG, SHORT = 3, 6  # 23 and 8 of SIZES: the longest client goes first


def check_refill(algorithm: Algorithm, problem: str, backend: str, epochs: int) -> None:
    """SHORT sends the same bits alone and after LONG; they have 2 and 6 batches an epoch."""
    clients = PROBLEMS[problem].clients()
    kind = {"backend": backend, "slots": 1, "clients": clients, "problem": problem}
    alone, _, short = run_in_order([SHORT], algorithm, **kind)
    after, _, both = run_in_order([SHORT, LONG], algorithm, **kind)
    assert (short["system/client_steps"], both["system/client_steps"]) == (2 * epochs, 8 * epochs)
    assert torch.equal(after[SHORT], alone[SHORT]) and alone[SHORT].any()


@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("problem", ["linear", "cnn", "buffers"])
def test_a_refilled_slot_starts_afresh(problem: str, optimizer: str, backend: str) -> None:
    batches = Batches(4, epochs=2)
    algorithm = fedavg(lr=0.05, batches=batches, optimizer=OPTIMIZERS[optimizer])
    check_refill(algorithm, problem, backend, epochs=2)


@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize("problem", ["mlp", "tokens"])
def test_a_refilled_slot_accumulates_from_zero(problem: str, backend: str) -> None:
    check_refill(fedsgd(lr=0.1, size=4), problem, backend, epochs=1)
    check_refill(fedavg(lr=0.1, batches=Batches(4, full=True)), problem, backend, epochs=1)


def drifting(bias: Tensor, clip: float | None = None) -> Algorithm:
    """FedAvg with lr 1/2 whose client k adds bias[k] to each gradient, and sends bias / 4 more."""
    rule = LocalRule(vecfl.sgd(), Batches(1), lr=0.5, clip=clip, bias=True)
    plain = fedavg(lr=0.5, batches=Batches(1))

    def begin(state: dict[str, Tensor], starting: Starting) -> Begin:
        return Begin(state["w"], bias[starting.client])

    def upload(state: dict[str, Tensor], done: Finished) -> Upload:
        assert done.bias is not None
        sent = plain.upload(state, done)
        return Upload(sent.update + done.bias / 4, sent.weight)

    return Algorithm("drifting", rule, plain.init, begin, upload, plain.server)


# w = 1, lr = 1/2, bias (2, 4, -8, 1); a client sends w - w_k + bias / 4.
# SETTLED: g = 0 + 2, w_k = 0, sends 1 + 1/2.
# STEEP: g = 4 + 4, w_k = -3, sends 4 + 1. Clipped: g = 1 + 4, w_k = -1.5, sends 2.5 + 1.
# SETTLED twice: g = 0 - 8, w_k = 5; g = 4 - 8, w_k = 7, sends -6 - 2.
#     Clipped: g = 0 - 8, w_k = 5; g = 1 - 8, w_k = 8.5, sends -7.5 - 2.
# Without examples: no step, sends 0 + 1/4 with weight 0.
# Means: (1.5 + 5 - 2 * 8) / 4 = -2.375 and (1.5 + 3.5 - 2 * 9.5) / 4 = -3.5.
@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize(
    "clip, sent, w", [(None, [1.5, 5.0, -8.0, 0.25], 3.375), (1.0, [1.5, 3.5, -9.5, 0.25], 4.5)]
)
def test_every_client_has_its_own_bias_row(
    backend: str, slots: int, clip: float | None, sent: list[float], w: float
) -> None:
    clients = [client(SETTLED), client(STEEP), client(SETTLED, SETTLED), client()]
    algorithm = drifting(torch.tensor([2, 4, -8, 1], dtype=torch.float64)[:, None], clip)
    kind = {"backend": backend, "slots": slots, "clients": clients, "module": Line()}
    rows, model, _ = run_in_order(range(4), algorithm, **kind)
    assert [rows[k].tolist() for k in range(4)] == [[value] for value in sent]
    assert model["w"].tolist() == [w]


def peaks(backend: str, cohort: int, folder: Path) -> tuple[int, int]:
    """Most bytes of tensors, and of all else, that a round of `cohort` equal clients adds."""
    columns = {"x": torch.randn(1000, 128), "y": torch.zeros(1000, dtype=torch.int64)}
    data = FederatedDataset(columns, torch.arange(1001))
    task = Task(nn.Linear(128, 128), vecfl.cross_entropy, example=data.examples(2))
    algorithm = fedavg(lr=0.1, batches=Batches(1))
    sim = Simulation(task, data, algorithm, vecfl.uniform(cohort), backend=backend, slots=20)
    state, _ = sim.round(sim.start())
    tracemalloc.start()
    with torch.profiler.profile(profile_memory=True) as profiler:
        sim.round(state)
    _, rest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return max(e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]"), rest


# A row is 64.5 KiB: 950 more clients may take the room of two rows, and 1 KiB each for the plan.
@pytest.mark.parametrize("backend", ["vmap", pytest.param("loop", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_cohort(backend: str, tmp_path: Path) -> None:
    few, many = peaks(backend, 50, tmp_path), peaks(backend, 1000, tmp_path)
    row = 4 * (128 * 128 + 128)
    assert few[0] > 20 * row  # the gradients of all slots, say: it was measured at all
    assert many[0] - few[0] < 2 * row
    assert many[1] - few[1] < 1 << 20
