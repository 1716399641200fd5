"""What does a checkpoint after a round cost?

    python benchmarks/checkpoint.py

Models of one layer with 8 thousand to 11 million parameters, in float32; the server is plain (the
checkpoint holds the model) or Adam (with two moments in float64 beside it). Of each, medians of
taking the state, of writing it with a sync of the file and its folder, of a plain `torch.save` to
the same disk without any, and of reading it back with its checksum. The disk is that of --folder.
Rows are added to benchmarks/results/checkpoint.jsonl, or to --out.

Takes a minute or two on two cores.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vecfl
from benchmarks.common.command import Parser, command, positive
from benchmarks.common.rows import provenance, quantiles_ms, write
from vecfl.checkpoint import load, save
from vecfl.data import FederatedDataset

SIDES = {
    8_000: (799, 10),
    130_000: (799, 160),
    1_200_000: (1_087, 1_100),
    11_000_000: (3_320, 3_313),
}
SERVERS = {"plain": None, "adam": vecfl.server_adam(lr=0.1)}


def simulation(shape: tuple[int, int], server: str) -> vecfl.Simulation:
    data = FederatedDataset.from_arrays(
        {"x": torch.rand(4, shape[0]), "y": torch.arange(4)}, [0, 0, 1, 1]
    )
    task = vecfl.Task(nn.Linear(*shape), vecfl.cross_entropy, example=data.examples(2))
    algorithm = vecfl.fedavg(lr=0.1, batches=vecfl.Batches(size=2), server=SERVERS[server])
    return vecfl.Simulation(task, data, algorithm, vecfl.everyone(), backend="loop", slots=1)


def clock(act: Callable[[], object], repeats: int) -> dict[str, float]:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    return quantiles_ms(seconds)


def measure(size: int, server: str, folder: Path, repeats: int) -> dict[str, Any]:
    sim = simulation(SIDES[size], server)
    state = sim.start()
    content, path = sim.save(state), folder / "round-000001.ckpt"
    save(path, content)
    return {
        "parameters": sim.task.layout.size,
        "server": server,
        "bytes": path.stat().st_size,
        "take": clock(partial(sim.save, state), repeats),
        "save": clock(partial(save, path, content), repeats),
        "bare": clock(partial(torch.save, content["server"], folder / "bare.pt"), repeats),
        "load": clock(partial(load, path), repeats),
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        default=list(SIDES),
        choices=SIDES,
        help="parameters of the models",
    )
    parser.add_argument(
        "--repeats", type=positive, default=15, help="times that each step is taken"
    )
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    parser.add_out("checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for size in args.sizes:
        for server in SERVERS:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                row = measure(size, server, Path(folder), args.repeats)
            write(args.out, row | provenance())
            times = ", ".join(f"{k} {row[k]['p50_ms']}" for k in ("take", "save", "bare", "load"))
            print(
                f"{row['parameters']:10,} parameters, {server}: {row['bytes']:,} bytes; ms {times}"
            )


if __name__ == "__main__":
    command(main)
