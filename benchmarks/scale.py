"""What does a round cost for 50,000 of a million clients?

    python benchmarks/scale.py

A store on disk holds 1,000,000 clients of three images of 28 x 28 bytes (2.4 GB; written once into
--folder, or into a temporary one). Logistic regression takes three local steps, the small CNN one.
Each cohort has a process of its own; they take turns, round by round, on the arrangement that
"auto" found once for the smallest cohort, so that the slots are the same. A row holds percentiles
of the round, time a client and its ratio to that of the smallest cohort, and the anonymous memory
of the processes of a run together (RssAnon of /proc/self/status: what is not a page of a file),
looked at every 20 ms: at most, and by how much more that is than with the smallest cohort, a client
that came on top. The store is read once before, so its pages come from memory as far as they fit
there. Rows are added to benchmarks/results/scale.jsonl, or to --out. Linux only.

Takes some minutes on two cores, and 2.4 GB of disk for the store that it builds.
"""

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import vecfl
from benchmarks.common.apart import family
from benchmarks.common.command import Parser, command, positive
from benchmarks.common.rows import Row, provenance, quantiles_ms, write
from vecfl.data import FederatedDataset, open_dataset, save
from vecfl.models import small_cnn

COHORTS, EXAMPLES, SHAPE, CLASSES = [1_000, 5_000, 10_000, 50_000], 3, (1, 28, 28), 10
WARM, EVERY, FLAT = 2, 0.02, 0.1
IMAGES = 10_000  # different ones


def logistic() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, CLASSES))


MODELS = {"logistic": (logistic, 1), "small_cnn": (small_cnn, EXAMPLES)}  # with the batch


def build(clients: int, folder: Path) -> None:
    """Write the store: pictures of classes, half covered by noise."""
    g, n = torch.Generator().manual_seed(0), clients * EXAMPLES
    pictures, label = torch.rand(CLASSES, *SHAPE, generator=g), torch.arange(IMAGES) % CLASSES
    images = torch.rand(IMAGES, *SHAPE, generator=g).lerp_(pictures[label], 0.5)
    which = torch.randint(IMAGES, (n,), generator=g)
    columns = {"x": (images * 255).byte()[which], "y": label.byte()[which]}
    save(FederatedDataset(columns, torch.arange(0, n + 1, EXAMPLES)), folder)


def warm(folder: Path) -> None:
    """Read all files of a store."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def simulation(model: str, cohort: int, folder: Path, **how: Any) -> vecfl.Simulation:
    torch.manual_seed(0)
    make, batch = MODELS[model]
    data = open_dataset(folder)
    task = vecfl.Task(make(), vecfl.cross_entropy, example=data.examples(2))
    algorithm = vecfl.fedavg(lr=0.05, batches=vecfl.Batches(batch))
    return vecfl.Simulation(task, data, algorithm, vecfl.uniform(cohort), **how)


def choose(model: str, cohort: int, folder: Path) -> None:
    """Print the arrangement that "auto" takes."""
    how = {"backend": "auto", "workers": "auto", "slots": "auto"}
    print(json.dumps(asdict(simulation(model, cohort, folder, **how).arrangement)))


def play(model: str, cohort: int, folder: Path, arrangement: str) -> None:
    """Play a round for each line that comes, and print what it took."""
    how = json.loads(arrangement)
    torch.set_num_threads(how["threads"])
    sim = simulation(model, cohort, folder, **how)
    state = sim.start()
    print(flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        state, told = sim.round(state)
        told["seconds"] = time.perf_counter() - began
        print(json.dumps(told), flush=True)


def this_script(*words: object) -> list[str]:
    return [sys.executable, __file__, *map(str, words)]


class Run:
    """A process that plays rounds with one cohort; `peak` is its memory in MiB at most."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process, self.peak, self.told = process, 0.0, list[dict[str, Any]]()
        self.answer()

    def round(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.told.append(json.loads(self.answer()))

    def answer(self) -> str:
        """The next line of the process, whose memory is looked at meanwhile."""
        out = self.process.stdout
        assert out is not None
        while not select.select([out], [], [], EVERY)[0]:
            self.peak = max(self.peak, anonymous_mib(self.process.pid))
        if not (line := out.readline()):  # it has ended, and said why
            raise subprocess.CalledProcessError(self.process.wait(), self.process.args)
        return str(line)


@contextmanager
def run(*words: object) -> Iterator[Run]:
    pipe = subprocess.PIPE
    with subprocess.Popen(this_script(*words), stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Run(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()


def anonymous_mib(pid: int) -> float:
    """Anonymous memory of a process and its children; pages that forks share count for each."""
    total = 0
    for one in (pid, *family(pid)):
        try:
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return total / 1024


def compare(model: str, cohorts: list[int], folder: Path, rounds: int) -> list[Row]:
    """A row for each cohort."""
    with tempfile.TemporaryDirectory() as cache:  # nothing that was measured before counts
        found = subprocess.run(
            this_script("--choose", model, min(cohorts), folder),
            check=True,
            stdout=subprocess.PIPE,
            env=os.environ | {"XDG_CACHE_HOME": cache},
        ).stdout.decode()
    with ExitStack() as stack:
        runs = [
            stack.enter_context(run("--play", model, cohort, folder, found)) for cohort in cohorts
        ]
        for _ in range(WARM + rounds):
            for one in runs:
                one.round()
    ran = json.loads(found)
    rows = [row_of(model, n, one, ran) for n, one in zip(cohorts, runs, strict=True)]
    least = rows[cohorts.index(min(cohorts))]
    for row in rows:
        each, more = row["ms_per_client"], int(str(row["cohort"])) - min(cohorts)
        row["of_smallest"] = round(each / least["ms_per_client"], 3)
        grown = (row["anon_peak_mib"] - least["anon_peak_mib"]) * 2**20
        row["grown_bytes_per_client"] = round(grown / more) if more else 0
    return rows


def row_of(model: str, cohort: int, one: Run, ran: dict[str, Any]) -> dict[str, Any]:
    """What a run says of itself."""
    told = one.told[WARM:]
    times = quantiles_ms([t["seconds"] for t in told])
    per_s = 1e3 / times["p50_ms"]
    return {
        **{"workload": model, "cohort": cohort, "rounds": len(told), **times},
        "ms_per_client": round(times["p50_ms"] / cohort, 5),
        "clients_per_s": round(cohort * per_s, 1),
        "client_steps_per_s": round(told[-1]["system/client_steps"] * per_s, 1),
        "wait_ms": round(median(t["system/wait_s"] for t in told) * 1e3, 3),
        "aggregate_ms": round(median(t["system/aggregate_s"] for t in told) * 1e3, 3),
        "anon_peak_mib": round(one.peak, 1),
        "loss": round(told[-1]["train/loss"], 4),
        "ran": ran,
    }


def said(row: dict[str, Any], parameters: int) -> str:
    """A row as a line to read."""
    times, grown = row["of_smallest"], row["grown_bytes_per_client"]
    flat = (
        "more" if times > 1 + FLAT else "less" if times < 1 - FLAT else f"flat (within {FLAT:.0%})"
    )
    return (
        "{workload:9} {cohort:6,} clients: {p50_ms} ms ({p20_ms} to {p80_ms}), "
        f"{{ms_per_client}} ms a client, x{times} of that in the smallest cohort: {flat}; "
        "{clients_per_s} clients/s, {anon_peak_mib} MiB; a further client takes "
        f"{grown:,} bytes of memory (a copy of the model has {4 * parameters:,})"
    ).format(**row)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_some("--models", MODELS, "that are trained")
    parser.add_argument(
        "--cohorts", nargs="+", type=positive, default=COHORTS, help="clients of a round"
    )
    parser.add_argument(
        "--clients", type=positive, default=1_000_000, help="of the store, 2.4 kB each"
    )
    parser.add_argument("--rounds", type=positive, default=7, help="timed rounds of each cohort")
    parser.add_argument("--folder", type=Path, help="where the store is kept, and found again")
    parser.add_out("scale")
    parser.add_argument("--build", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--choose", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--play", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        return build(int(args.build[0]), Path(args.build[1]))
    if args.choose or args.play:
        model, cohort, folder, *how = args.choose or args.play
        return (play if how else choose)(model, int(cohort), Path(folder), *how)
    if (most := max(args.cohorts)) > args.clients:
        raise vecfl.InputError(f"--cohorts {most}: the store has {args.clients:,} clients")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)) / f"clients-{args.clients}"
        if not folder.exists():  # what writing takes is no memory of this process
            subprocess.run(this_script("--build", args.clients, folder), check=True)
        warm(folder)
        for model in args.models:
            size = sum(p.numel() for p in MODELS[model][0]().parameters())
            for row in compare(model, args.cohorts, folder, args.rounds):
                about: Row = {"population": args.clients, "parameters": size}
                write(args.out, row | about | provenance())
                print(said(row, size), flush=True)


if __name__ == "__main__":
    command(main)
