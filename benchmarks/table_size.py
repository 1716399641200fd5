"""Is the memory of a run bounded where its clients keep many large rows on disk?

    python benchmarks/table_size.py

SCAFFOLD on 10,000 clients with a multilayer perceptron of 1.2 million parameters: a table of
44 GiB, a sparse file that takes room where clients have trained, 20 in each of three rounds. While
they train, the anonymous memory of the process (RssAnon of /proc/self/status: what cannot be
dropped and read again from a file) is looked at every 5 ms. Prints a line, and adds a row, for each
round to benchmarks/results/table_size.jsonl, or to --out. Linux only.

Takes less than a minute on two cores.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import torch
from torch import nn

import vecfl
from benchmarks.common.command import Parser, command, positive
from benchmarks.common.rows import Row, provenance, write

PIXELS, EXAMPLES, STATUS = 784, 20, Path("/proc/self/status")


def anonymous_mib() -> float:
    """Anonymous memory of this process that is resident now."""
    lines = STATUS.read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


@contextmanager
def watched(found: list[float]) -> Iterator[None]:
    """Look at the anonymous memory until the block ends."""
    over = Event()

    def watch() -> None:
        while not over.wait(0.005):
            found.append(anonymous_mib())

    thread = Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def simulation(args: argparse.Namespace, folder: Path) -> vecfl.Simulation:
    n, g = args.clients * EXAMPLES, torch.Generator().manual_seed(0)
    x = torch.rand(n + PIXELS - 1, generator=g).unfold(0, PIXELS, 1)  # windows of one vector
    columns = {"x": x, "y": torch.randint(10, (n,), generator=g, dtype=torch.uint8)}
    data = vecfl.FederatedDataset(columns, torch.arange(0, n + 1, EXAMPLES))
    module = nn.Sequential(
        *(nn.Linear(PIXELS, args.width), nn.ReLU(), nn.Linear(args.width, 200)),
        *(nn.ReLU(), nn.Linear(200, 10)),
    )
    task = vecfl.Task(module, vecfl.cross_entropy, example=data.examples(2))
    batches = vecfl.Batches(10)
    algorithm = vecfl.scaffold(lr=0.05, option=args.option, batches=batches)
    sampler = vecfl.uniform(args.cohort)
    return vecfl.Simulation(task, data, algorithm, sampler, backend="stacked", table=folder)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--clients", type=positive, default=10_000, help="that have a row")
    parser.add_argument("--width", type=positive, default=1_200, help="of the first layer")
    parser.add_argument("--cohort", type=positive, default=20, help="clients of a round")
    parser.add_argument(
        "--rounds", type=positive, default=3, help="that are played, each with a row"
    )
    parser.add_argument("--option", type=int, default=2, choices=(1, 2), help="of SCAFFOLD")
    parser.add_argument("--folder", type=Path, help="on which disk (default: the temporary one)")
    parser.add_out("table_size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        sim = simulation(args, Path(folder) / "rows")
        state, before = sim.start(), anonymous_mib()
        for _ in range(args.rounds):
            found, began = [before], time.perf_counter()
            with watched(found):
                state, metrics = sim.round(state)
            found.append(anonymous_mib())
            files = [path.stat() for path in Path(folder).rglob("column_*.npy")]
            row: Row = {"clients": args.clients, "cohort": args.cohort, "option": args.option}
            row |= {"parameters": sim.task.layout.size, "slots": metrics["system/slots"]}
            row |= {"round": state.round, "round_s": round(time.perf_counter() - began, 2)}
            row["table_gib"] = round(sum(file.st_size for file in files) / 2**30, 3)
            row["on_disk_mib"] = round(sum(file.st_blocks for file in files) / 2**11, 1)
            row |= {"anon_start_mib": round(before, 1), "anon_peak_mib": round(max(found), 1)}
            row["anon_end_mib"] = round(found[-1], 1)
            write(args.out, row | provenance())
            print(
                f"round {state.round}: {row['anon_peak_mib']} MiB of anonymous memory at most, "
                f"{row['anon_end_mib']} MiB at the end; table {row['table_gib']} GiB, of which "
                f"{row['on_disk_mib']} MiB on disk; {row['round_s']} s",
                flush=True,
            )


if __name__ == "__main__":
    command(main)
