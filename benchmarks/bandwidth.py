"""How close is what follows training to a plain copy of the same bytes?

    python benchmarks/bandwidth.py

Norms, clipping, weighted sums, noise, stochastic rounding and optimizer steps on float32 rows of
--numbers numbers, in plain torch and, on a GPU, by the Triton kernels too. They take turns in one
process. A row holds percentiles of the time, the bytes that must move at least once (what is read
and what is written), bytes a second, and their ratio to those of a copy of the rows. Rows are added
to benchmarks/results/bandwidth.jsonl, or to --out.

Takes half a minute on two cores.
"""

import os
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

import vecfl
from benchmarks.common.command import Parser, command, positive
from benchmarks.common.rows import Row, gpu_provenance, quantiles_ms, write
from vecfl.layout import Entry, Layout
from vecfl.optim import Rows
from vecfl.random import Kind
from vecfl.rows import lengths
from vecfl.transforms.clip import clip_factors, clip_rows
from vecfl_kernels import (
    Levels,
    Multiples,
    add_noise_,
    round_to_levels,
    round_to_multiples,
    scaled_weighted_sum_,
    weighted_sum_,
)

Work = dict[str, tuple[Callable[[], object], int]]
LIMIT, STREAM = 1.0, (0, 0, int(Kind.NOISE) << 28)


def sums(rows: Tensor) -> Work:
    """What makes a cohort's rows one vector: each with its bytes."""
    k, m = rows.shape
    n, copy = rows.nbytes, torch.empty_like(rows)
    total, weight = rows.new_zeros(m, dtype=torch.float64), torch.ones(k, device=rows.device)
    weight = weight.double()

    def clipped_sum() -> None:
        norm = lengths(rows)
        over = ~(norm <= LIMIT)
        scaled_weighted_sum_(total, rows, weight, *clip_factors(rows, norm, LIMIT), over)

    def noise() -> None:
        add_noise_(total, 0.1, 9, STREAM)

    def clipped_sum_and_noise() -> None:
        clipped_sum()
        noise()

    both = 2 * total.nbytes
    return {
        "copy": (lambda: copy.copy_(rows), 2 * n),
        "norms": (lambda: lengths(rows), n),
        "sum": (lambda: weighted_sum_(total, rows, weight), n + both),
        "clip": (lambda: clip_rows(rows, LIMIT), 3 * n),
        "clip and sum": (clipped_sum, 2 * n + both),
        "noise": (noise, both),
        "clip, sum and noise": (clipped_sum_and_noise, 2 * n + 2 * both),
    }


def rounding(rows: Tensor) -> Work:
    """Stochastic rounding, whose levels are known: a number is read once and written once."""
    client = torch.arange(len(rows), device=rows.device)
    streams = torch.stack((client, 0 * client, 0 * client + (int(Kind.CODEC) << 28)), 1)
    levels = Levels.of(rows, 8)
    multiples = Multiples(lengths(rows)[:, None].float(), 127)
    return {
        "levels": (lambda: round_to_levels(rows, levels, 9, streams), 2 * rows.nbytes),
        "multiples": (lambda: round_to_multiples(rows, multiples, 9, streams), 2 * rows.nbytes),
    }


def steps(rows: Tensor) -> Work:
    """Optimizer steps on rows of two tensors: w, its state and the gradient are read, the first two
    written."""
    k, m = rows.shape
    cut = m // 8
    layout = Layout((Entry("a", (cut,), 0, rows.dtype), Entry("b", (m - cut,), cut, rows.dtype)))
    grads = layout.param_views(rows)
    work: Work = {}
    for optimizer in (vecfl.momentum(0.9), vecfl.adam()):
        w, states = torch.zeros_like(rows), [torch.zeros_like(rows) for _ in range(2)]
        at = Rows(
            w=layout.param_views(w),
            state=[layout.param_views(t) for t in states[: optimizer.states]],
            bias=None,
            total=None,
            count=None,
            steps=torch.zeros(k, device=rows.device),
        )

        def step(at: Rows = at, step_: Callable = optimizer.step_) -> None:
            step_(at, grads, 0.01)

        work[optimizer.name] = step, (3 + 2 * optimizer.states) * rows.nbytes
    return work


def times_of(work: Work, passes: int, device: torch.device) -> dict[tuple[str, str], list[float]]:
    """Seconds of each, by implementation and name; they take turns, two unseen ones first."""
    ways = ["reference"]
    if device.type == "cuda" and find_spec("triton") is not None:
        ways.append("triton")
    took: dict[tuple[str, str], list[float]] = {}
    for turn in range(passes + 2):
        for way in ways:
            os.environ["VECFL_KERNELS"] = way
            for name, (one, _) in work.items():
                wait(device)
                began = time.perf_counter()
                one()
                wait(device)
                if turn >= 2:
                    took.setdefault((way, name), []).append(time.perf_counter() - began)
    return took


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_device("where the rows lie")
    parser.add_argument(
        "--numbers", type=positive, nargs="+", default=[7_850, 1_206_590], help="numbers in a row"
    )
    parser.add_argument("--cells", type=positive, help="numbers of all rows [1e7; on a GPU 1e8]")
    parser.add_argument("--passes", type=positive, default=11, help="timed turns of each operation")
    parser.add_out("bandwidth")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    cells = args.cells or (100_000_000 if device.type == "cuda" else 10_000_000)
    for numbers in args.numbers:
        generator = torch.Generator(device).manual_seed(0)
        shape = max(1, cells // numbers), numbers
        rows = torch.randn(shape, generator=generator, device=device)
        work = sums(rows) | rounding(rows) | steps(rows)
        took = times_of(work, args.passes, device)
        copied = quantiles_ms(took["reference", "copy"])["p50_ms"] / work["copy"][1]
        for (way, name), seconds in took.items():
            found, moved = quantiles_ms(seconds), work[name][1]
            row: Row = {"operation": name, "kernels": way, "numbers": numbers, "rows": len(rows)}
            row |= {"bytes": moved, **found, "gb_s": round(moved / found["p50_ms"] / 1e6, 3)}
            row |= {"of_a_copy": round(moved * copied / found["p50_ms"], 3)}
            write(args.out, row | {"device": args.device} | gpu_provenance(args.device))
            said = f"{row['gb_s']} GB/s, {row['of_a_copy']} of a copy"
            print(f"{numbers} {way} {name}: {found['p50_ms']} ms, {said}", flush=True)


if __name__ == "__main__":
    command(main)
