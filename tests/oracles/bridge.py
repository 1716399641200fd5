"""Runs an oracle `Setting` on vecfl, so that both can be compared."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import vecfl
from vecfl import FederatedDataset, Simulation, Task
from vecfl.algorithms import Algorithm, Finished, Upload
from vecfl.augment import Transform
from vecfl.optim import ClientOptimizer

from .augment import Transforms
from .loop import Columns, Loss, Setting
from .toy import habit


@dataclass
class Run:
    """What vecfl made of a setting, one entry a round."""

    models: list[Columns] = field(default_factory=list)
    updates: list[dict[int, list[tuple[Tensor, float]]]] = field(default_factory=list)
    metrics: list[dict] = field(default_factory=list)
    rows: list[dict[str, Tensor]] = field(default_factory=list)  # of all clients, where they keep


def dataset(clients: list[Columns]) -> FederatedDataset:
    """The clients' columns, one after the other; values are not looked at."""
    sizes = torch.tensor([0] + [len(c["x"]) for c in clients])
    names = next(c for c in clients if len(c["x"])).keys()
    columns = {name: torch.cat([c[name] for c in clients if len(c["x"])]) for name in names}
    return FederatedDataset(columns, sizes.cumsum(0), range(len(clients)))


def transforms(names: Transforms) -> list[Transform]:
    """What vecfl calls these transforms."""
    return [getattr(vecfl, name)(*arguments) for name, *arguments in names]


def optimizer(s: Setting) -> ClientOptimizer:
    return {
        "sgd": vecfl.sgd(),
        "momentum": vecfl.momentum(s.momentum),
        "nesterov": vecfl.momentum(s.momentum, nesterov=True),
        "adam": vecfl.adam(s.betas, s.eps),
        "adamw": vecfl.adamw(s.betas, s.eps, s.weight_decay),
    }[s.optimizer]


def algorithm(s: Setting) -> Algorithm:
    weights = {
        "examples": vecfl.by_examples,
        "uniform": vecfl.uniform_weights,
        "capped": vecfl.capped(s.weight_cap or 1),
        "tokens": vecfl.by_tokens,
    }[s.weight]
    if s.algorithm == "fedsgd":
        return vecfl.fedsgd(lr=s.server_lr, size=s.batch, max_examples=s.cap, weights=weights)
    batches = vecfl.Batches(
        s.batch,
        epochs=s.epochs if s.steps is None else None,
        steps=s.steps,
        last=s.last,
        full=s.full,
        max_examples=s.cap,
    )
    common = {
        "lr": s.lr,
        "batches": batches,
        "optimizer": optimizer(s),
        "clip": s.clip,
        "weights": weights,
        "server": vecfl.server_sgd(s.server_lr),
    }
    if s.algorithm == "habit":
        return habit(**common)
    return vecfl.fedprox(mu=s.mu, **common) if s.mu else vecfl.fedavg(**common)


def recorded(algorithm: Algorithm, updates: list[dict]) -> Algorithm:
    """`algorithm`, with what every client sends written down in the last entry of `updates`.

    A client sends as often as it stands in the cohort.
    """
    from dataclasses import replace

    def upload(state: dict, done: Finished) -> Upload:
        sent = algorithm.upload(state, done)
        rows = zip(done.client.tolist(), sent.update.clone(), sent.weight.tolist(), strict=True)
        for k, row, weight in rows:
            updates[-1].setdefault(k, []).append((row, weight))
        return sent

    return replace(algorithm, upload=upload)


def sampler(s: Setting) -> vecfl.sampling.Sampler:
    if s.cohort is None:
        return vecfl.everyone()
    if isinstance(s.cohort, int):
        return vecfl.uniform(s.cohort)
    cohorts = [torch.tensor(cohort, dtype=torch.int64) for cohort in s.cohort]
    return lambda eligible, seed, round: cohorts[round]


def run_vecfl(
    module: nn.Module,
    loss: Loss,
    clients: list[Columns],
    s: Setting,
    *,
    backend: str,
    slots: int | None,
    workers: int = 1,
    dtype: torch.dtype = torch.float64,
    table: Path | None = None,
) -> Run:
    """The rounds of `s`; asserts that these backend, slots and workers really ran."""
    data, result = dataset(clients), Run()
    task = Task(module, loss, example=data.examples(2), augment=transforms(s.augment))
    sim = Simulation(
        task,
        data,
        recorded(algorithm(s), result.updates),
        sampler(s),
        backend=backend,
        workers=workers,
        slots=slots,
        seed=s.seed,
        sample_seed=s.sample_seed,
        dtype=dtype,
        table=table,
        statistics=len(clients) * 4,
    )
    state = sim.start()
    for _ in range(s.rounds):
        result.updates.append({})
        state, metrics = sim.round(state)
        assert metrics["system/backend"] == backend
        assert metrics["system/workers"] == workers
        assert slots is None or metrics["system/slots"] == slots
        result.models.append(sim.state_dict(state))
        result.metrics.append(metrics)
        if state.table is not None:
            result.rows.append(state.table.gather(torch.arange(len(clients))))
    return result
