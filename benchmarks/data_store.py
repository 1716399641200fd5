"""Does opening a store, and gathering a cohort from it, depend on the number of clients?

    python benchmarks/data_store.py

Stores of up to a million clients of 8 examples: x, 64 bytes, and y, int64; ids are strings. Each
store is measured by two processes. One is warm: the pages of the store are in memory, where writing
it left them; it repeats. The other is cold: the system has been told to drop these pages, so what
the disk must give is counted in /proc/self/io as read_bytes (which counts the pages of memory maps
too). Both open the store, prefetch and gather the examples of 1,000 clients at random, read an id
and find its client. Times are medians.
Rows are added to benchmarks/results/data_store.jsonl, or to --out. Needs Linux, and 700 MB of disk.

Takes about a minute on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.common.command import Parser, command, positive
from benchmarks.common.rows import Row, provenance, quantiles_ms, write
from vecfl.data import FederatedDataset, open_dataset, save
from vecfl.engine.backend import gather

CLIENTS = [1_000, 10_000, 100_000, 1_000_000]
EXAMPLES, BYTES, COHORT, REPEATS = 8, 64, 1_000, 30
STEPS = ("open", "prefetch", "gather", "id", "find")
Result = TypeVar("Result")


def build(clients: int, folder: Path) -> None:
    """Write a store of random examples."""
    g = torch.Generator().manual_seed(0)
    n = clients * EXAMPLES
    x = torch.randint(256, (n, BYTES), generator=g, dtype=torch.uint8)
    y = torch.randint(10, (n,), generator=g)
    ids = [f"client-{k:07}" for k in range(clients)]
    save(FederatedDataset({"x": x, "y": y}, torch.arange(0, n + 1, EXAMPLES), ids), folder)


def drop(folder: Path) -> None:
    """Have the system forget the pages of a store, which are on disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes() -> int:
    """Bytes that the disk has given this process so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def measure(folder: Path, repeats: int) -> Row:
    """Of opening and the steps of a round: times, and bytes of disk for the first."""
    torch.set_num_threads(1)
    gather({"x": torch.zeros(2, 2)}, torch.zeros(1, 1, dtype=torch.int64))  # loads the operators
    g = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {}
    read: dict[str, int] = {}

    def clock(name: str, step: Callable[[], Result]) -> Result:
        bytes_before, began = read_bytes(), time.perf_counter()
        result = step()
        seconds.setdefault(name, []).append(time.perf_counter() - began)
        read.setdefault(f"{name}_read_bytes", read_bytes() - bytes_before)
        return result

    for _ in range(repeats):
        data = clock("open", lambda: open_dataset(folder))
        cohort = torch.randint(data.num_clients, (min(COHORT, data.num_clients),), generator=g)
        clock("prefetch", partial(data.prefetch, cohort))
        x = clock("gather", partial(gathered, data, cohort))
        assert x.shape == (len(cohort), EXAMPLES, BYTES)
        id_ = clock("id", partial(data.client_ids.__getitem__, int(cohort[0])))
        assert clock("find", partial(data.position, id_)) == cohort[0]
        del data, x  # unmapping is no part of opening
    return {**{name: quantiles_ms(times) for name, times in seconds.items()}, **read}


def gathered(data: FederatedDataset, cohort: Tensor) -> Tensor:
    """x of all examples of the cohort [C, EXAMPLES, BYTES], gathered with y."""
    index = data.offsets[cohort][:, None] + torch.arange(EXAMPLES)
    return gather(data.columns, index)["x"]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--clients",
        nargs="+",
        type=positive,
        default=CLIENTS,
        help="in the stores, one after the other",
    )
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    parser.add_out("data_store")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), int(args.measure[1]))))
        return
    for clients in args.clients:
        with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
            folder = Path(temporary) / "store"
            build(clients, folder)
            size = sum(path.stat().st_size for path in folder.iterdir())
            for pages, repeats in (("warm", REPEATS), ("cold", 1)):
                if pages == "cold":
                    drop(folder)
                command = [sys.executable, __file__, "--measure", str(folder), str(repeats)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                row = {"clients": clients, "store_bytes": size, "pages": pages}
                row |= json.loads(done.stdout)
                write(args.out, row | provenance())
                times = ", ".join(f"{name} {row[name]['p50_ms']}" for name in STEPS)
                total = sum(int(row[f"{name}_read_bytes"]) for name in STEPS)
                print(f"{clients:9,} clients, {pages}: ms {times}; disk {total:,} bytes")


if __name__ == "__main__":
    command(main)
