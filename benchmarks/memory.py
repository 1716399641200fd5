"""Does the memory of a round grow with the cohort?

    python benchmarks/memory.py

Logistic regression on up to 50,000 clients of 60 examples, every cohort in a process of its own.
The examples are overlapping windows of one short random vector, so that three million of them
take 12 MB. A process first plays a round of `WARM` clients, which makes the slots and warms the
allocator; what the measured round adds to the highest resident memory so far is its growth. It is
measured with glibc's malloc as it comes, which keeps much of what was freed, and told to give
freed blocks back at once, which shows what is alive. Rows are added to
benchmarks/results/memory.jsonl, or to --out.

Takes about a minute on two cores.
"""

import argparse
import json
import os
import subprocess
import sys

import torch
from torch import Tensor, nn

import vecfl
from benchmarks.common.command import Parser, command, positive
from benchmarks.common.rows import peak_mib, provenance, write

COHORTS = [1_000, 10_000, 50_000]
MALLOC = {
    "default": {},
    "returning": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
}
WARM, EXAMPLES, BATCH, PIXELS, CLASSES = 1_000, 60, 10, 784, 10


def windows(clients: int) -> vecfl.FederatedDataset:
    """`clients` clients of EXAMPLES examples each, all views of one vector."""
    n = clients * EXAMPLES
    g = torch.Generator().manual_seed(0)
    x = torch.rand(n + PIXELS - 1, generator=g).unfold(0, PIXELS, 1)
    y = torch.randint(CLASSES, (n,), generator=g, dtype=torch.uint8)
    return vecfl.FederatedDataset({"x": x, "y": y}, torch.arange(0, n + 1, EXAMPLES))


def measure(cohort: int) -> dict[str, object]:
    """Peaks of a round of WARM clients and of one of `cohort` clients after it."""
    torch.set_num_threads(1)

    def sampler(eligible: Tensor, seed: int, round: int) -> Tensor:
        return torch.arange(cohort if round else min(cohort, WARM))

    data = windows(cohort)
    task = vecfl.Task(nn.Linear(PIXELS, CLASSES), vecfl.cross_entropy, example=data.examples(2))
    algorithm = vecfl.fedavg(lr=0.05, batches=vecfl.Batches(BATCH))
    sim = vecfl.Simulation(task, data, algorithm, sampler)
    state, _ = sim.round(sim.start())
    before = peak_mib()
    state, metrics = sim.round(state)
    assert metrics["system/client_steps"] == cohort * EXAMPLES // BATCH
    after = peak_mib()
    return {
        "slots": metrics["system/slots"],
        "peak_mib": round(after, 1),
        "growth_mib": round(after - before, 1),
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--cohorts", nargs="+", type=positive, default=COHORTS, help="clients of the measured round"
    )
    parser.add_out("memory")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    for cohort in args.cohorts:
        for malloc, settings in MALLOC.items():
            command = [sys.executable, __file__, "--measure", str(cohort)]
            env = os.environ | settings
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=env)
            row = {"workload": "logistic", "cohort": cohort, "malloc": malloc}
            row |= json.loads(done.stdout)
            write(args.out, row | provenance())
            peak, growth = row["peak_mib"], row["growth_mib"]
            print(f"cohort {cohort:6,}, malloc {malloc:9}: peak {peak} MiB, growth {growth} MiB")


if __name__ == "__main__":
    command(main)
