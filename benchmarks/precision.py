"""What do lower precisions of products cost in accuracy, and what do they gain?

    python benchmarks/precision.py

A round of --clients clients of `benchmarks/common/workloads.py`, one step or an epoch of six each,
by every precision in turn. A row holds the time of a round, its ratio to float32, and how far what
the round changes in the model is from float64, relative to its norm. Rows are added to
benchmarks/results/precision.jsonl, or to --out.

Takes about a minute on two cores.
"""

import time
from dataclasses import replace

import torch
from torch import Tensor

import vecfl
from benchmarks.common.command import Parser, command, positive
from benchmarks.common.rows import gpu_provenance, quantiles_ms, write
from benchmarks.common.workloads import MODELS, Workload, simulation


def make(work: Workload, backend: str, precision: str, device: str) -> vecfl.Simulation:
    torch.manual_seed(0)
    exact = precision == "float64"
    return simulation(
        work,
        backend=backend,
        device=device,
        dtype=torch.float64 if exact else torch.float32,
        precision="float32" if exact else precision,
    )


def compare(work: Workload, backend: str, device: str, passes: int) -> dict[str, dict]:
    """Seconds and error by precision."""
    names = ["float64", "float32", "bf16"] + ["tf32"] * (device == "cuda")
    sims = {name: make(work, backend, name, device) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    changes: dict[str, Tensor] = {}
    for _ in range(passes + 1):
        for name, sim in sims.items():
            state, began = sim.start(), time.perf_counter()
            after, _ = sim.round(state)
            w = after.server["w"].cpu()  # waits for a GPU
            seconds[name].append(time.perf_counter() - began)
            changes[name] = w.double() - state.server["w"].cpu().double()
    right = changes["float64"]
    times = {name: quantiles_ms(taken[1:]) for name, taken in seconds.items()}
    return {
        name: times[name]
        | {
            "speedup": round(times["float32"]["p50_ms"] / times[name]["p50_ms"], 2),
            "error": float((changes[name] - right).norm() / right.norm()),
        }
        for name in names
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_device("where clients train")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["mlp", "cnn"], help="that are trained"
    )
    parser.add_argument(
        "--backends", nargs="+", default=["loop", "vmap"], help="of vecfl that train them"
    )
    parser.add_argument("--clients", type=positive, default=4, help="of a round")
    parser.add_argument("--passes", type=positive, default=7, help="timed rounds of each precision")
    parser.add_out("precision")
    args = parser.parse_args()
    where = gpu_provenance(args.device)
    for model in args.models:
        for steps in (1, 6):
            work = replace(MODELS[model], clients=args.clients, examples=10 * steps)
            for backend in args.backends:
                found = compare(work, backend, args.device, args.passes)
                for name, row in found.items():
                    row = {"workload": model, "steps": steps, "backend": backend} | row
                    row |= {"precision": name}
                    write(args.out, row | where)
                    print(*(f"{key}={value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    command(main)
