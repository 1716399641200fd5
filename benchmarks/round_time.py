"""How long does a round take, against a plain loop over the clients?

    python benchmarks/round_time.py --workloads logistic-100 --passes 5

Every arrangement runs in a process of its own (threads that one leaves spinning would slow the
next), the passes go round all arrangements, and a row holds the median, the 20th and 80th
percentile of all timed rounds, and the ratio to the tuned loop on one thread. Data are random:
only time is measured. Rows are added to benchmarks/results/round_time.jsonl.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import vecfl
from vecfl.data import FederatedDataset

RESULTS = Path(__file__).parent / "results" / "round_time.jsonl"
ROUNDS = 5  # timed rounds of a process, after two that are not


@dataclass(frozen=True)
class Workload:
    """`clients` clients of `examples` examples each, one epoch in batches of `batch`."""

    module: Callable[[], nn.Module]
    shape: tuple[int, ...]
    clients: int
    examples: int = 60
    batch: int = 10

    @property
    def steps(self) -> int:
        return self.clients * -(-self.examples // self.batch)

    def data(self) -> FederatedDataset:
        n = self.clients * self.examples
        g = torch.Generator().manual_seed(0)
        x, y = torch.rand(n, *self.shape, generator=g), torch.randint(10, (n,), generator=g)
        offsets = torch.arange(0, n + 1, self.examples)
        return FederatedDataset({"x": x, "y": y}, offsets)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


WORKLOADS = {
    "logistic-100": Workload(lambda: nn.Linear(784, 10), (784,), 100),
    "logistic-1000": Workload(lambda: nn.Linear(784, 10), (784,), 1000),
    "mlp-100": Workload(mlp, (784,), 100),
}
ARRANGEMENTS = [f"{what} {n}" for what in ("tuned", "written", "loop", "vmap") for n in (1, 2)]


def plain_round(work: Workload, tuned: bool) -> Callable[[], object]:
    """A round by a plain loop: shuffle, local steps, float32 mean of the updates."""
    data, module = work.data(), work.module()
    params: list[torch.Tensor] = list(module.parameters())
    clients = [data.client(k) for k in range(data.num_clients)]

    def train_tuned(x: torch.Tensor, y: torch.Tensor) -> None:
        for i in range(0, len(x), work.batch):
            loss = F.cross_entropy(module(x[i : i + work.batch]), y[i : i + work.batch])
            grads = torch.autograd.grad(loss, params)
            with torch.no_grad():
                torch._foreach_add_(params, grads, alpha=-0.1)

    def train_written(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer = torch.optim.SGD(params, lr=0.1)
        for i in range(0, len(x), work.batch):
            optimizer.zero_grad()
            F.cross_entropy(module(x[i : i + work.batch]), y[i : i + work.batch]).backward()
            optimizer.step()

    train = train_tuned if tuned else train_written

    def run() -> None:
        start = [p.detach().clone() for p in params]
        total = [torch.zeros_like(p) for p in params]
        for client in clients:
            with torch.no_grad():
                torch._foreach_copy_(params, start)
            order = torch.randperm(len(client["x"]))
            train(client["x"][order], client["y"][order])
            with torch.no_grad():
                torch._foreach_add_(total, params)
        with torch.no_grad():
            torch._foreach_copy_(params, torch._foreach_div(total, len(clients)))

    return run


def vecfl_round(work: Workload, backend: str) -> Callable[[], object]:
    """The same round by vecfl, with as many slots as it chooses itself."""
    data = work.data()
    task = vecfl.Task(work.module(), vecfl.cross_entropy, example=data.examples(2))
    algorithm = vecfl.fedavg(lr=0.1, batches=vecfl.Batches(work.batch))
    sim = vecfl.Simulation(task, data, algorithm, vecfl.everyone(), backend=backend)
    state = sim.start()

    def run() -> None:
        nonlocal state
        state, metrics = sim.round(state)
        assert metrics["system/backend"] == backend
        assert metrics["system/client_steps"] == work.steps

    return run


def measure(workload: str, arrangement: str) -> list[float]:
    """Seconds of each timed round, in this process."""
    what, threads = arrangement.split()
    torch.set_num_threads(int(threads))
    work = WORKLOADS[workload]
    plain = what in ("tuned", "written")
    run = plain_round(work, what == "tuned") if plain else vecfl_round(work, what)
    seconds = []
    for _ in range(ROUNDS + 2):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


def measure_apart(workload: str, arrangement: str) -> list[float]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--measure", workload, arrangement]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def provenance() -> dict[str, object]:
    """Where and from what a row was measured."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(": ")[1] for x in lines if x.startswith("model name")), cpu)
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "cores": cores,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": str(date.today()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--threads", nargs="+", choices="12", default=["1", "2"])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    RESULTS.parent.mkdir(exist_ok=True)
    for workload in args.workloads:
        names = [name for name in ARRANGEMENTS if name[-1] in {"1", *args.threads}]
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(args.passes):
            for name in names:
                times[name] += measure_apart(workload, name)
        baseline = float(np.median(times["tuned 1"]))
        for name, seconds in times.items():
            low, median, high = np.percentile(seconds, (20, 50, 80)) * 1e3
            row: dict[str, object] = {
                "workload": workload,
                "arrangement": name,
                "rounds": len(seconds),
            }
            row |= {"p20_ms": round(low, 2), "p50_ms": round(median, 2), "p80_ms": round(high, 2)}
            row |= {"speedup": round(baseline * 1e3 / median, 2)} | provenance()
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{workload:15} {name:10} {median:8.1f} ms ({low:.1f} to {high:.1f})", end="")
            print(f"   x{row['speedup']}", flush=True)


if __name__ == "__main__":
    main()
