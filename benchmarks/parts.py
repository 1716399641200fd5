"""What do algorithms, transforms and delays cost beside a round of FedAvg?

    python benchmarks/parts.py

Rounds of an MLP of 1.2 M numbers, --clients clients of two batches of ten each, all by the stacked
backend on one thread. They take turns in one process. A row holds percentiles of the time of a
round, the ratio of the medians to FedAvg, and the megabytes of the server's state as it stands in a
checkpoint. Rows are added to benchmarks/results/parts.jsonl, or to --out.

Takes about a minute on two cores.
"""

import io
import time
from typing import Any

import torch
from torch import nn

import vecfl
from benchmarks.common.command import Parser, command, positive
from benchmarks.common.rows import Row, provenance, quantiles_ms, write
from vecfl.algorithms import Algorithm

B = vecfl.Batches(10)
WORK: dict[str, Any] = {"lr": 0.01, "batches": B}


def late(most: int) -> Algorithm:
    """Messages that are 0 to `most` rounds late, all as likely."""
    return vecfl.delayed(vecfl.fedavg(**WORK), vecfl.drawn_delay([1 / (most + 1)] * (most + 1)))


def parts() -> dict[str, Algorithm]:
    """What is measured, by name; the first is what others are compared with."""
    fedavg = vecfl.fedavg(**WORK)
    feedback = vecfl.error_feedback(vecfl.top_k(0.01))
    return {
        "fedavg": fedavg,
        "dga": vecfl.dga(**WORK),
        "dga by rms": vecfl.dga(weighting="rms", **WORK),
        "scaffold": vecfl.scaffold(**WORK),
        "feddyn": vecfl.feddyn(alpha=0.1, **WORK),
        "fednova": vecfl.fednova(**WORK),
        "clip": vecfl.chain(fedavg, vecfl.clip_by_norm(0.1)),
        "top-k, feedback": vecfl.chain(fedavg, feedback),
        "server adam": vecfl.fedavg(server=vecfl.server_adam(0.01), **WORK),
        "ema": vecfl.ema(fedavg, 0.9),
        "median": vecfl.aggregated_by(fedavg, vecfl.coordinate_median()),
        "late by 0 to 1": late(1),
        "late by 0 to 3": late(3),
        "late by 0 to 10": late(10),
    }


def simulations(clients: int, width: int) -> dict[str, vecfl.Simulation]:
    """A simulation of each part, on the same data."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(clients).repeat_interleave(2 * B.size)
    x = torch.randn(len(owner), 784, generator=generator)
    columns = {"x": x, "y": torch.randint(0, 10, (len(owner),), generator=generator)}
    data = vecfl.FederatedDataset.from_arrays(columns, owner, num_clients=clients)
    torch.manual_seed(0)
    hidden = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 400), nn.ReLU()]
    module = nn.Sequential(*hidden, nn.Linear(400, 10))
    task = vecfl.Task(module, vecfl.cross_entropy, example=data.examples(2))
    how: dict[str, Any] = {"backend": "stacked", "slots": 5}
    return {
        name: vecfl.Simulation(task, data, algorithm, vecfl.everyone(), **how)
        for name, algorithm in parts().items()
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--clients", type=positive, default=10, help="of a round")
    parser.add_argument("--width", type=positive, default=1024, help="of both hidden layers")
    parser.add_argument("--rounds", type=positive, default=15, help="timed rounds of each part")
    parser.add_out("parts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sims = simulations(args.clients, args.width)
    states = {name: sim.start() for name, sim in sims.items()}
    took: dict[str, list[float]] = {name: [] for name in sims}
    for _ in range(args.rounds + 2):
        for name, sim in sims.items():
            began = time.perf_counter()
            states[name], _ = sim.round(states[name])
            took[name].append(time.perf_counter() - began)
    first = 0.0
    for name, times in took.items():
        found, file = quantiles_ms(times[2:]), io.BytesIO()
        first = first or found["p50_ms"]
        torch.save(states[name].server, file)
        row: Row = {"part": name, "clients": args.clients, **found}
        row |= {"numbers": sims[name].task.layout.size, "state_mb": round(file.tell() / 1e6, 3)}
        row |= {"rounds_of_fedavg": round(found["p50_ms"] / first, 2)}
        write(args.out, row | provenance())
        print(f"{name}: {found['p50_ms']} ms, {row['rounds_of_fedavg']} of fedavg", flush=True)


if __name__ == "__main__":
    command(main)
