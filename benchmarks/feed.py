"""How long does a round wait for its examples, where the data lie on the device and on the host?

    python benchmarks/feed.py

Rounds of `cohort` clients of 60 examples, 28 x 28 bytes and a label, out of a population in memory
and in a store, by the stacked backend on logistic regression (short rounds, so that fetching has
little time to hide in) and on a dense network. Resident and streamed take turns, round by round, in
one process. A row holds percentiles of the round, of the wait in it (the draw of a cohort is part
of it), and of a fetch that nothing hides. Rows are added to benchmarks/results/feed.jsonl, or to
--out; --device cuda is for a machine with a GPU.

Takes some minutes on two cores.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import vecfl
from benchmarks.common.command import Parser, command, positive
from benchmarks.common.rows import Row, gpu_provenance, quantiles_ms, write
from benchmarks.common.workloads import mlp
from vecfl.data import FederatedDataset, open_dataset, save

EXAMPLES, PIXELS, WARM = 60, 784, 2
MODELS = {"logistic": lambda: nn.Linear(PIXELS, 10), "mlp": mlp}


def population(clients: int) -> FederatedDataset:
    """Random images and labels."""
    n, g = clients * EXAMPLES, torch.Generator().manual_seed(0)
    x = torch.randint(256, (n, PIXELS), generator=g, dtype=torch.uint8)
    y = torch.randint(10, (n,), generator=g)
    return FederatedDataset({"x": x, "y": y}, torch.arange(0, n + 1, EXAMPLES))


@contextmanager
def placed(data: FederatedDataset, where: str) -> Iterator[FederatedDataset]:
    """The data in memory, or in a store that is there for a while."""
    if where == "memory":
        yield data
        return
    with tempfile.TemporaryDirectory() as folder:
        save(data, Path(folder) / "store")
        yield open_dataset(Path(folder) / "store")


def simulation(
    data: FederatedDataset, model: str, cohort: int, device: str, resident: bool
) -> vecfl.Simulation:
    task = vecfl.Task(MODELS[model](), vecfl.cross_entropy, example=data.examples(2))
    algorithm, sampler = vecfl.fedavg(lr=0.05, batches=vecfl.Batches(10)), vecfl.uniform(cohort)
    return vecfl.Simulation(
        task, data, algorithm, sampler, device=device, backend="stacked", resident=resident
    )


def measure(sims: list[vecfl.Simulation], rounds: int) -> list[dict[str, dict[str, float]]]:
    """Percentiles of each simulation's rounds, waits and fetches; they take turns."""
    states = [sim.start() for sim in sims]
    took: list[dict[str, list[float]]] = [{"round": [], "wait": [], "fetch": []} for _ in sims]
    for i in range(WARM + rounds):
        for k, sim in enumerate(sims):
            states[k], metrics = sim.round(states[k])
            if i >= WARM:
                for name in ("round", "wait"):
                    took[k][name].append(float(metrics[f"system/{name}_s"]))
    for i in range(rounds):
        for k, sim in enumerate(sims):
            clients = sim.cohort(WARM + i)
            began = time.perf_counter()
            sim.source.fetch(clients)
            took[k]["fetch"].append(time.perf_counter() - began)
    return [{name: quantiles_ms(times) for name, times in row.items()} for row in took]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_device("where clients train")
    parser.add_some("--models", MODELS, "that are trained")
    parser.add_argument("--clients", type=positive, default=10_000, help="in the population")
    parser.add_argument(
        "--cohorts", nargs="+", type=positive, default=[100, 1_000], help="clients of a round"
    )
    parser.add_argument("--rounds", type=positive, default=10, help="timed rounds of each setting")
    parser.add_out("feed")
    args = parser.parse_args()
    data = population(args.clients)
    for where in ("memory", "store"):
        with placed(data, where) as given:
            for model in args.models:
                for cohort in args.cohorts:
                    sims = [
                        simulation(given, model, cohort, args.device, resident)
                        for resident in (True, False)
                    ]
                    for sim, row in zip(sims, measure(sims, args.rounds), strict=True):
                        name: Row = {"workload": model, "cohort": cohort, "clients": args.clients}
                        name |= {"from": where, "data": sim.source.name, "device": args.device}
                        write(args.out, name | dict(row) | gpu_provenance(args.device))
                        times = ", ".join(f"{key} {row[key]['p50_ms']} ms" for key in row)
                        print(f"{model} {cohort}, {where}, {sim.source.name}: {times}", flush=True)


if __name__ == "__main__":
    command(main)
