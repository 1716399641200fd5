"""How does a round scale in cohort, slots, parameters, population and workers?

    python benchmarks/scaling.py

One axis is varied at a time, the others stay as in `Setting`: FedAvg by the stacked backend on one
core, clients of 60 examples in batches of 10, a network with one hidden layer or none. The examples
are overlapping windows of one vector, so that a million clients take 120 MB. The settings of an
axis take turns, round by round, in one process. A row holds percentiles of the round and what is
done in a second of the median one. Rows are added to benchmarks/results/scaling.jsonl, or to --out.
Ranks are measured by benchmarks/ranks.py, 50,000 of a million clients by benchmarks/scale.py.

Takes some minutes on two cores.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import vecfl
from benchmarks.common.command import Parser, command, positive
from benchmarks.common.rows import Row, provenance, quantiles_ms, write
from vecfl.data import FederatedDataset

EXAMPLES, BATCH, PIXELS, CLASSES, WARM = 60, 10, 784, 10, 2
ONE_CORE: dict[str, Any] = {"backend": "stacked", "workers": 1, "threads": 1}


@dataclass(frozen=True)
class Setting:
    """What a round is: hidden units (0: logistic regression), clients drawn, clients that there
    are, and further arguments of `vecfl.Simulation`; `value` is its name on the axis (hidden units
    on that of parameters)."""

    value: int | str
    hidden: int = 0
    cohort: int = 100
    population: int = 1_000
    how: dict[str, Any] = field(default_factory=dict)


def by_cohort(n: int) -> Setting:
    return Setting(n, cohort=n, population=max(n, 1_000))


def by_slots(n: int) -> Setting:
    return Setting(n, cohort=1_000, how={"slots": n})


def by_hidden(n: int) -> Setting:
    return Setting(n, hidden=n, cohort=20)


def by_population(n: int) -> Setting:
    return Setting(n, population=n, cohort=min(100, n))


WORKERS: dict[str, dict[str, Any]] = {
    "1": {},
    "2 threads": {"workers": 2},
    "2 processes": {"workers": 2, "processes": 2},
}
AXES: dict[str, list[Setting]] = {
    "cohort": [by_cohort(n) for n in (10, 100, 1_000, 10_000)],
    "slots": [by_slots(n) for n in (1, 4, 16, 64, 250, 1_000)],
    "parameters": [by_hidden(n) for n in (4, 32, 256, 1_024)],
    "population": [by_population(n) for n in (1_000, 10_000, 100_000, 1_000_000)],
    "workers": [Setting(name, cohort=1_000, how=how) for name, how in WORKERS.items()],
}


def network(hidden: int) -> nn.Module:
    torch.manual_seed(0)
    if not hidden:
        return nn.Linear(PIXELS, CLASSES)
    return nn.Sequential(nn.Linear(PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


def windows(clients: int) -> FederatedDataset:
    """Clients whose examples are views of one vector."""
    n, g = clients * EXAMPLES, torch.Generator().manual_seed(0)
    x = torch.randint(256, (n + PIXELS - 1,), generator=g, dtype=torch.uint8)
    y = torch.randint(CLASSES, (n,), generator=g, dtype=torch.uint8)
    columns = {"x": x.unfold(0, PIXELS, 1), "y": y}
    return FederatedDataset(columns, torch.arange(0, n + 1, EXAMPLES))


def simulation(setting: Setting) -> vecfl.Simulation:
    data = windows(setting.population)
    task = vecfl.Task(network(setting.hidden), vecfl.cross_entropy, example=data.examples(2))
    algorithm = vecfl.fedavg(lr=0.05, batches=vecfl.Batches(BATCH))
    how = ONE_CORE | setting.how
    return vecfl.Simulation(task, data, algorithm, vecfl.uniform(setting.cohort), **how)


def measure(axis: str, settings: list[Setting], rounds: int) -> list[Row]:
    """A row for each setting; they take turns."""
    sims = [simulation(setting) for setting in settings]
    states, took = [sim.start() for sim in sims], [list[float]() for _ in sims]
    for i in range(WARM + rounds):
        for k, sim in enumerate(sims):
            began = time.perf_counter()
            states[k], _ = sim.round(states[k])
            if i >= WARM:
                took[k].append(time.perf_counter() - began)
    return [row_of(axis, *found) for found in zip(settings, sims, took, strict=True)]


def row_of(axis: str, setting: Setting, sim: vecfl.Simulation, took: list[float]) -> Row:
    times, ran = quantiles_ms(took), sim.arrangement
    per_s = setting.cohort / times["p50_ms"] * 1e3
    return {
        **{"axis": axis, "value": setting.value, "parameters": sim.task.layout.size},
        **{"cohort": setting.cohort, "population": setting.population},
        **{"slots": ran.slots, "workers": ran.workers, "processes": ran.processes},
        **{"rounds": len(took), **times},
        "clients_per_s": round(per_s, 1),
        "client_steps_per_s": round(per_s * (EXAMPLES // BATCH), 1),
    }


def is_above(value: int | str, most: int | None) -> bool:
    return most is not None and isinstance(value, int) and value > most


def main() -> None:
    parser = Parser(__doc__)
    parser.add_some("--axes", AXES, "that are varied")
    parser.add_argument("--most", type=positive, help="leave out larger values")
    parser.add_argument("--rounds", type=positive, default=7, help="timed rounds of each setting")
    parser.add_out("scaling")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for axis in args.axes:
        settings = [s for s in AXES[axis] if not is_above(s.value, args.most)]
        for row in measure(axis, settings, args.rounds):
            write(args.out, row | provenance())
            line = "{axis} {value}: {p50_ms} ms ({p20_ms} to {p80_ms}), {clients_per_s} clients/s"
            print(line.format(**row), flush=True)


if __name__ == "__main__":
    command(main)
