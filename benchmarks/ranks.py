"""How long do a round and its all-reduce take on 1 and 2 ranks?

    python benchmarks/ranks.py

Rounds of FedAvg over models of 8 thousand to 11 million parameters, the loop backend on one core of
each rank; every rank is a process of this machine, started by torchrun, and they meet over gloo. A
row holds percentiles of the round; for one rank of that with exact sums, too, which takes turns
with the plain one; for more, of an all-reduce of the model's length when all are there. Rows are
added to benchmarks/results/ranks.jsonl, or to --out.

Takes some minutes on two cores.
"""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import vecfl
from benchmarks.common.command import Parser, command, positive
from benchmarks.common.rows import ROOT, Row, provenance, quantiles_ms, write
from benchmarks.common.workloads import MODELS, Workload
from vecfl.mesh import join

WARM = 2


def wide() -> nn.Module:
    """11.2 million parameters."""
    return nn.Sequential(
        nn.Linear(784, 2900), nn.ReLU(), nn.Linear(2900, 3070), nn.ReLU(), nn.Linear(3070, 10)
    )


WORK = {  # clients that take two steps each
    "logistic": replace(MODELS["logistic"], clients=100, examples=20),
    "mlp": replace(MODELS["mlp"], clients=40, examples=20),
    "cnn": replace(MODELS["cnn"], clients=4, examples=20, batch=10),
    "wide": Workload(wide, (784,), clients=4, examples=20),
}


def measure(name: str, rounds: int, out: Path) -> None:
    """Time a model on the ranks that there are; rank 0 writes the row."""
    work, mesh = WORK[name], join()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = work.data()
    sims = [
        vecfl.Simulation(
            work.task(data),
            data,
            work.algorithm(),
            vecfl.everyone(),
            backend="loop",
            threads=1,
            slots=1,
            exact_sums=exact,
        )
        for exact in ((False, True) if mesh.size == 1 else (False,))
    ]
    states, took = [sim.start() for sim in sims], [list[float]() for _ in sims]
    for i in range(WARM + rounds):
        for k, sim in enumerate(sims):
            states[k], metrics = sim.round(states[k])
            if i >= WARM:
                took[k].append(float(metrics["system/round_s"]))
    length = states[0].server["w"].numel()
    row: Row = {"workload": name, "parameters": length, "cohort": work.clients, "ranks": mesh.size}
    row["round"] = quantiles_ms(took[0])
    if mesh.size == 1:
        row["exact_round"] = quantiles_ms(took[1])
    else:
        row["sum"] = quantiles_ms(sums(length, rounds))
    if mesh.rank == 0:
        write(out, row | provenance())
        times = ", ".join(f"{k} {v['p50_ms']} ms" for k, v in row.items() if isinstance(v, dict))
        print(f"{name}, {length:,} parameters, ranks {mesh.size}: {times}", flush=True)


def sums(length: int, times: int) -> list[float]:
    """Seconds of an all-reduce of so many numbers, from when all ranks are there."""
    mesh, numbers, took = join(), torch.ones(length, dtype=torch.float64), list[float]()
    for _ in range(WARM + times):
        mesh.sum(torch.zeros(1))
        began = time.perf_counter()
        mesh.sum(numbers)
        took.append(time.perf_counter() - began)
    return took[WARM:]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_some("--models", WORK, "that are trained")
    parser.add_argument(
        "--ranks", nargs="+", type=positive, default=[1, 2], help="processes that share a round"
    )
    parser.add_argument("--rounds", type=positive, default=15, help="timed rounds of each")
    parser.add_out("ranks")
    args = parser.parse_args()
    if "RANK" in os.environ:
        for name in args.models:
            measure(name, args.rounds, args.out)
        return
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    for ranks in args.ranks:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        subprocess.run(
            [sys.executable, *launch, __file__, *sys.argv[1:]],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            check=True,
        )


if __name__ == "__main__":
    command(main)
