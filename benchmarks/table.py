"""What does it cost a round that its clients keep rows, in memory and on disk?

    python benchmarks/table.py

Rounds of logistic regression 784-10 on clients of 60 examples, in batches of 10, stacked, by FedAvg
and by an algorithm that keeps a row of the model's 7,850 numbers for each client, as SCAFFOLD does,
and only copies them. The three take turns, round by round, in one process. A row holds percentiles
of a round, the same of the parts of it that a bare table takes (the journal, reading twice, as
clients start and finish, and writing), and of its part of a checkpoint, each --every rounds. Rows
are added to benchmarks/results/table.jsonl, or to --out.

Takes less than a minute on two cores.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import vecfl
from benchmarks.common.command import Parser, command, positive
from benchmarks.common.rows import Row, provenance, quantiles_ms, write
from vecfl.algorithms import Algorithm, Finished, Upload
from vecfl.table import Tables

PIXELS, EXAMPLES, WARM = 784, 60, 2
ROW = 10 * PIXELS + 10


def keeping(plain: Algorithm) -> Algorithm:
    """`plain`, whose clients keep their last update."""

    def upload(server: dict[str, Tensor], done: Finished) -> Upload:
        return replace(sent := plain.upload(server, done), table={"c": sent.update})

    return replace(plain, upload=upload, table=lambda layout: {"c": (layout.size,)})


def simulation(cohort: int, clients: int, keeps: bool, folder: Path | None) -> vecfl.Simulation:
    n, g = clients * EXAMPLES, torch.Generator().manual_seed(0)
    x = torch.randint(256, (EXAMPLES, PIXELS), generator=g, dtype=torch.uint8)
    y = torch.randint(10, (EXAMPLES,), generator=g)
    columns = {"x": x.repeat(clients, 1), "y": y.repeat(clients)}
    data = vecfl.FederatedDataset(columns, torch.arange(0, n + 1, EXAMPLES))
    task = vecfl.Task(nn.Linear(PIXELS, 10), vecfl.cross_entropy, example=data.examples(2))
    plain = vecfl.fedavg(lr=0.05, batches=vecfl.Batches(10))
    algorithm, sampler = keeping(plain) if keeps else plain, vecfl.uniform(cohort)
    return vecfl.Simulation(task, data, algorithm, sampler, backend="stacked", table=folder)


def round_times(sims: dict[str, vecfl.Simulation], rounds: int) -> dict[str, list[float]]:
    """Seconds of the rounds of each; they take turns."""
    states = {name: sim.start() for name, sim in sims.items()}
    took: dict[str, list[float]] = {name: [] for name in sims}
    for i in range(WARM + rounds):
        for name, sim in sims.items():
            states[name], metrics = sim.round(states[name])
            if i >= WARM:
                took[name].append(float(metrics["system/round_s"]))
    return took


@contextmanager
def clock(times: list[float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    times.append(time.perf_counter() - began)


def part_times(
    cohort: int, clients: int, folder: Path | None, rounds: int, every: int
) -> dict[str, list[float]]:
    """Seconds of what a round asks of a table, and of what a checkpoint every so often asks."""
    table = Tables({"c": (ROW,)}, clients, torch.float32, folder).at(0)
    assert table is not None
    took: dict[str, list[float]] = {"journal": [], "read": [], "write": [], "checkpoint": []}
    for t in range(WARM + rounds):
        some = torch.randperm(clients, generator=torch.Generator().manual_seed(t))[:cohort]
        with clock(took["journal"]):
            table.begin(t, some)
        with clock(took["read"]):
            table.gather(some)
            rows = table.gather(some)
        with clock(took["write"]):
            table.scatter(some, rows)
        table.end()
        if (t + 1) % every == 0:
            with clock(took["checkpoint"]):
                table.content(t + 1)
                table.checkpointed(t + 1)
    return {name: times[WARM if name != "checkpoint" else 0 :] for name, times in took.items()}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--cohort", type=positive, default=100, help="clients of a round")
    parser.add_argument("--clients", type=positive, default=1_000, help="in the population")
    parser.add_argument("--rounds", type=positive, default=100, help="timed rounds of each table")
    parser.add_argument("--every", type=positive, default=10, help="rounds between two checkpoints")
    parser.add_argument("--folder", type=Path, help="on which disk (default: the temporary one)")
    parser.add_out("table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        where = {"none": None, "memory": None, "disk": Path(folder) / "rounds"}
        rounds = round_times(
            {n: simulation(args.cohort, args.clients, n != "none", p) for n, p in where.items()},
            args.rounds,
        )
        for name in where:
            row: Row = {"cohort": args.cohort, "clients": args.clients, "row_numbers": ROW}
            row |= {"table": name, "round": quantiles_ms(rounds[name])}
            if name != "none":
                path = Path(folder) / "parts" if name == "disk" else None
                parts = part_times(args.cohort, args.clients, path, args.rounds, args.every)
                row |= {part: quantiles_ms(times) for part, times in parts.items()}
            write(args.out, row | provenance())
            times = (f"{k} {v['p50_ms']} ms" for k, v in row.items() if isinstance(v, dict))
            print(f"table {name}: {', '.join(times)}", flush=True)


if __name__ == "__main__":
    command(main)
