"""How long do steps and rounds take on a GPU, against a plain loop over the clients on it?

    python benchmarks/gpu_time.py --budget 240

Two kinds of rows, with TF32 on:

step   one step of the vmap engine for `slots` clients: `host_ms` is what the host spends to launch
       it, the percentiles hold until the GPU is done
round  a round of `cohort` clients, by the tuned plain loop, by vmap and by stacked, these two
       also with captured steps ("vmap graphs")

Each model is measured in a process of its own, within its share of --budget seconds; what would not
fit is left out, and a row says so. Rows are added to benchmarks/results/gpu.jsonl, or to --out.
`benchmarks/gpu.sh` runs it after the tests.

Takes at most --budget seconds.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import vecfl
from benchmarks.common.command import Parser, command, positive
from benchmarks.common.rows import Row, gpu_provenance, quantiles_ms, write
from benchmarks.common.workloads import MODELS, Workload, plain_round, vecfl_round
from vecfl.engine import Slots, make_backend, make_update
from vecfl.schedule import make_plan
from vecfl.tape import Tape

MOST = 50  # timed calls of a measurement
GROWTH = 10  # a size ten times as large may take ten times as long

Timed = tuple[float, float]  # seconds until the host is free, and until the device is
Maker = Callable[[], Callable[[], object]]


def clock(run: Callable[[], object], device: str) -> Timed:
    """Time one call; the device has nothing to do when it starts."""
    wait(device)
    began = time.perf_counter()
    run()
    launched = time.perf_counter()
    wait(device)
    return launched - began, time.perf_counter() - began


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Meter:
    """Times calls for `seconds` each and writes rows, until the deadline."""

    def __init__(self, device: str, seconds: float, budget: float, out: Path) -> None:
        self.device, self.seconds, self.out = device, seconds, out
        self.deadline = time.monotonic() + budget
        self.where = {"tf32": True} | gpu_provenance(device)

    def measure(self, name: Row, make: Maker, last: float) -> list[Timed]:
        """Timed calls of what `make` gives, after a first one; none, and a row, if left out.

        last  seconds of a call at the next smaller size, from which this one's are foreseen
        """
        left = self.deadline - time.monotonic()
        need = 2 * GROWTH * last
        if left < max(need, 1):
            return self.leave_out(name, f"{max(left, 0):.1f} s left, two calls may take {need:.1f}")
        try:
            run, times = make(), list[Timed]()
            clock(run, self.device)
            end = min(time.monotonic() + self.seconds, self.deadline)
            while not times or (time.monotonic() < end and len(times) < MOST):
                times.append(clock(run, self.device))
            return times
        except torch.OutOfMemoryError:
            return self.leave_out(name, "out of memory")
        except vecfl.InputError as error:  # no stacked form
            return self.leave_out(name, str(error))
        finally:
            if self.device == "cuda":
                torch.cuda.empty_cache()  # vecfl looks at the free memory to choose its slots

    def leave_out(self, name: Row, why: str) -> list[Timed]:
        self.write(name | {"skipped": why})
        return []

    def write(self, row: Row) -> None:
        write(self.out, row | self.where)
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)


def engine_steps(work: Workload, device: str) -> Callable[[], None]:
    """The steps of a round by the vmap engine alone, a slot for each client."""
    data = work.data()
    task, rule = work.task(data).to(device, torch.float32), work.algorithm().rule
    w, layout, clients = task.layout.flatten(task.module), task.layout, torch.arange(work.clients)
    slots = Slots(layout, rule, work.clients, torch.device(device), torch.float32)
    slots.start_(clients.to(device), w, None)
    backend = make_backend("vmap", task, data.examples(2))
    update = make_update(rule, layout.param_views(w), 0)
    plan = make_plan(rule.batches, data.offsets, clients, seed=0, round=0)
    tape = Tape(plan, rule.batches, work.clients, seed=0, round=0, draws=task.keyed)
    blocks, columns = list(tape.blocks()), data.to(device).columns

    @torch.no_grad()
    def run() -> None:
        for block in blocks:
            backend.run_(slots, block, columns, update)

    return run


def measure_steps(meter: Meter, model: str, sweep: list[int]) -> None:
    """One row for each number of slots."""
    last = 0.0
    for slots in sweep:
        work = replace(MODELS[model], clients=slots)
        name: Row = {"measure": "step", "workload": model, "slots": slots}
        times = meter.measure(name, partial(engine_steps, work, meter.device), last)
        if not times:
            continue
        steps, last = work.steps // slots, median(total for _, total in times)
        row = name | {"calls": len(times)} | quantiles_ms([total / steps for _, total in times])
        row["host_ms"] = round(median(host for host, _ in times) / steps * 1e3, 3)
        meter.write(row | {"client_steps_per_s": round(work.steps / last)})


def measure_rounds(meter: Meter, model: str, cohorts: list[int]) -> None:
    """One row for each cohort and arrangement."""
    backends = ["vmap", "stacked"]
    graphs = [f"{backend} graphs" for backend in backends] if meter.device == "cuda" else []
    arrangements = [*backends, *graphs]
    last = dict.fromkeys(("tuned", *arrangements), 0.0)
    for cohort in cohorts:
        work, seen = replace(MODELS[model], clients=cohort), dict[str, float]()
        makers: dict[str, Maker] = {
            "tuned": partial(plain_round, work, True, meter.device),
        }
        for arrangement in arrangements:
            backend, *graphs = arrangement.split()
            how: dict[str, Any] = {"backend": backend, "device": meter.device}
            if graphs:
                how["graphs"] = True
            makers[arrangement] = partial(vecfl_round, work, **how)
        for arrangement, make in makers.items():
            name: Row = {"measure": "round", "workload": model, "cohort": cohort}
            name |= {"arrangement": arrangement}
            times = meter.measure(name, make, last[arrangement])
            if not times:
                continue
            totals = [total for _, total in times]
            last[arrangement] = seen[arrangement] = median(totals)
            row = name | {"calls": len(times)} | quantiles_ms(totals)
            if "tuned" in seen:
                row["speedup"] = round(seen["tuned"] / seen[arrangement], 2)
            meter.write(row)


def allow_tf32() -> None:
    """Let float32 products and convolutions use TF32, for the plain loop and for vecfl alike."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]


def each_apart(args: argparse.Namespace) -> bool:
    """Measure each model in a process of its own; whether all went well."""
    ended, well = time.monotonic() + args.budget, True
    for i, model in enumerate(args.models):
        share = (ended - time.monotonic()) / (len(args.models) - i)
        options = [f"--model={model}", f"--budget={share - 5}"]  # 5 s: to start, and to end a call
        command = [sys.executable, __file__, *sys.argv[1:], *options]
        try:
            well &= subprocess.run(command, timeout=share).returncode == 0
        except subprocess.TimeoutExpired:
            row: Row = {"workload": model, "skipped": f"stopped after {share:.0f} s"}
            write(args.out, row | gpu_provenance(args.device))
            print(f"{model}: {row['skipped']}")
    return well


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where to train")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=["logistic", "mlp", "cnn"],
        help="that are trained",
    )
    parser.add_argument(
        "--cohorts", nargs="+", type=positive, default=[10, 100, 1000], help="clients of a round"
    )
    parser.add_argument(
        "--slots",
        nargs="+",
        type=positive,
        default=[1, 10, 100, 1000, 4000],
        help="clients of a step",
    )
    parser.add_argument("--seconds", type=float, default=2, help="for one measurement")
    parser.add_argument("--budget", type=float, default=240, help="seconds for everything")
    parser.add_out("gpu")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing to time (--device cpu tries the script)")
        return
    if args.model is None:
        sys.exit(not each_apart(args))
    allow_tf32()
    meter = Meter(args.device, args.seconds, args.budget, args.out)
    measure_steps(meter, args.model, args.slots)
    measure_rounds(meter, args.model, args.cohorts)


if __name__ == "__main__":
    command(main)
