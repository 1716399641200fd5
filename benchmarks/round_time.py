"""How long does a round take, against a plain loop over the clients?

    python benchmarks/round_time.py --workloads logistic-100 lstm-10 --passes 5

A workload is a model and a cohort. Every arrangement runs in a process of its own (threads that one
leaves spinning would slow the next). The first pass goes round all arrangements, later ones round
those that may be the fastest. A row holds the median, the 20th and 80th percentile of all timed
rounds, the ratio to the tuned loop on one thread, what is done in a second of the median round, the
<<<<<<< HEAD
highest resident memory of the process with what its forks have of their own, and the loss that the
model reached: all begin with the same one and do the same work, in another order. An arrangement
that cannot train a model has a row that says why. Rows are added to
benchmarks/results/round_time.jsonl, or to --out. With --profile nothing is compared: each
arrangement of vecfl prints where the time of its rounds goes.
=======
highest resident memory of the process, and the loss that the model reached: all begin with the same
one and do the same work, in another order. An arrangement that cannot train a model has a row that
says why. Rows are added to benchmarks/results/round_time.jsonl, or to --out. With --profile nothing
is compared: each arrangement of vecfl prints where the time of its rounds goes, and leaves a trace
of one in --traces.

Takes some hours on two cores for all workloads, and some minutes for logistic-100 alone.
>>>>>>> h4
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import vecfl
from benchmarks.common.command import KERNELS, Parser, command, positive
from benchmarks.common.rows import ROOT, Row, peak_mib, provenance, quantiles_ms, write
from benchmarks.common.workloads import (
    COHORTS,
    MODELS,
    Workload,
    plain_round,
    simulation,
    vecfl_round,
)
from vecfl import profile

WORKLOADS = [f"{name}-{n}" for name, cohorts in COHORTS.items() for n in cohorts]
ROUNDS = 5  # timed rounds of a process, after two that are not
FEW = {"pfl_cnn": 2, "resnet": 2}  # of models whose rounds take seconds
MARGIN = 1.5  # who takes so many times as long as the fastest in the first pass has no other
BASELINE = "tuned 1"


@dataclass(frozen=True)
class Arrangement:
    """Who trains: a plain loop ("tuned" or "written"), or vecfl with arguments of its own.

    threads    operator threads of the process; None: as many as torch takes by itself
    processes  of a plain loop, which share the clients
    """

    kind: str
    threads: int | None = 1
    processes: int = 1
    simulation: dict[str, Any] = field(default_factory=dict)


TWO_PROCESSES = {"workers": 2, "processes": 2, "threads": 1}
ARRANGEMENTS = {
    "tuned 1": Arrangement("tuned"),
    "tuned 2": Arrangement("tuned", 2),
    "tuned 2 processes": Arrangement("tuned", 1, 2),
    "written 1": Arrangement("written"),
    "written 2": Arrangement("written", 2),
    "loop 1": Arrangement("vecfl", 1, simulation={"backend": "loop"}),
    "loop 2": Arrangement("vecfl", 2, simulation={"backend": "loop"}),
    "loop 2 workers": Arrangement(
        "vecfl", 1, simulation={"backend": "loop", "workers": 2, "threads": 1}
    ),
    "loop 2 processes": Arrangement("vecfl", 1, simulation={"backend": "loop"} | TWO_PROCESSES),
    "vmap 1": Arrangement("vecfl", 1, simulation={"backend": "vmap"}),
    "vmap 2": Arrangement("vecfl", 2, simulation={"backend": "vmap"}),
    "vmap 2 workers": Arrangement(
        "vecfl", 1, simulation={"backend": "vmap", "workers": 2, "threads": 1}
    ),
    "stacked 1": Arrangement("vecfl", 1, simulation={"backend": "stacked"}),
    "stacked 2": Arrangement("vecfl", 2, simulation={"backend": "stacked"}),
    "stacked 2 workers": Arrangement(
        "vecfl", 1, simulation={"backend": "stacked", "workers": 2, "threads": 1}
    ),
    "stacked 2 processes": Arrangement(
        "vecfl", 1, simulation={"backend": "stacked"} | TWO_PROCESSES
    ),
    "auto": Arrangement(
        "vecfl", None, simulation={"backend": "auto", "workers": "auto", "slots": "auto"}
    ),
}
# What vecfl says it ran on; where it stacks layers, how many of them are fused and run by vmap.
RAN = ("backend", "workers", "processes", "threads", "slots", "fused", "by_vmap")


def workload(text: str) -> Workload:
    """That of "model-cohort"; ArgumentTypeError if there is none."""
    name, _, cohort = text.rpartition("-")
    if name not in MODELS or not cohort.isdecimal() or not int(cohort):
        raise argparse.ArgumentTypeError(f"{text}: expected a model of {[*MODELS]} and a cohort")
    return replace(MODELS[name], clients=int(cohort))


def checked(text: str) -> str:
    """The same text, if it names a workload."""
    workload(text)
    return text


def measure(text: str, arrangement: str) -> dict[str, Any]:
    """What this process finds of a workload: seconds of each timed round, loss, memory, and what
    vecfl ran on; or why it cannot train the model that way."""
    work, how = workload(text), ARRANGEMENTS[arrangement]
    if how.threads is not None:
        torch.set_num_threads(how.threads)
    try:
        player = (
            vecfl_round(work, **how.simulation)
            if how.kind == "vecfl"
            else plain_round(work, how.kind == "tuned", processes=how.processes)
        )
    except vecfl.InputError as error:
        if str(error).startswith(KERNELS):  # no fact about the model
            raise
        return {"skipped": str(error)}
    seconds = []
    for _ in range(FEW.get(text.rpartition("-")[0], ROUNDS) + 2):
        began = time.perf_counter()
        told = player()
        seconds.append(time.perf_counter() - began)
    peak = peak_mib()  # before an evaluation adds to it
    ran = {key: told[f"system/{key}"] for key in RAN if f"system/{key}" in told}
    return {"seconds": seconds[2:], "ran": ran, "peak_mib": peak, "loss": player.loss()}


def measure_apart(text: str, arrangement: str) -> dict[str, Any]:
    """`measure` in a fresh process, where the arrangement alone decides on threads."""
    command = [sys.executable, __file__, "--measure", text, arrangement]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=env).stdout)


def row_of(text: str, found: list[dict[str, Any]], baseline: float | None) -> Row:
    """What is told of the passes of an arrangement; `baseline`: the median of the tuned loop."""
    work, seconds = workload(text), [s for one in found for s in one["seconds"]]
    times = quantiles_ms(seconds)
    row: Row = {"workload": text, "examples": work.examples, "batch": work.batch}
    row |= {"spread": work.spread} if work.spread else {}
    row |= {"passes": len(found), "rounds": len(seconds), **times}
    if baseline is not None:
        row["speedup"] = round(baseline / times["p50_ms"], 2)
    done = {"samples": work.samples, "client_steps": work.steps}
    done["clients"] = work.clients
    for name, n in done.items():
        row[f"{name}_per_s"] = round(n / times["p50_ms"] * 1e3, 1)
    row["peak_mib"] = round(max(one["peak_mib"] for one in found), 1)
    row["loss"] = round(median(one["loss"] for one in found), 4)
    ran = [dict(one) for one in dict.fromkeys(tuple(one["ran"].items()) for one in found)]
    return row | ({"ran": ran} if ran != [{}] else {})  # "auto" may choose anew in each process


def contenders(found: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Who goes on after the first pass: the baseline, and who is within MARGIN of the fastest."""
    times = {n: median(one[0]["seconds"]) for n, one in found.items() if "seconds" in one[0]}
    limit = MARGIN * min(times.values(), default=0.0)
    return [name for name, time in times.items() if time <= limit or name == BASELINE]


def compare(text: str, arrangements: list[str], passes: int, out: Path) -> None:
    """Measure the arrangements in turn, `passes` times, and write and print a row for each."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arrangements}
    for one in range(passes):
        for name in arrangements if not one else contenders(found):
            found[name].append(measure_apart(text, name))
    where, baseline = provenance(), None
    if BASELINE in arrangements:
        baseline = quantiles_ms([s for one in found[BASELINE] for s in one["seconds"]])["p50_ms"]
    for name in arrangements:
        what: Row = {"workload": text, "arrangement": name}
        if "skipped" in found[name][0]:
            write(out, what | found[name][0] | where)
            print(f"{text:15} {name:19} {found[name][0]['skipped']}", flush=True)
            continue
        row = what | row_of(text, found[name], baseline)
        write(out, row | where)
        times = "{p50_ms:8} ms ({p20_ms} to {p80_ms})".format(**row)
        print(f"{text:15} {name:19} {times}   x{row.get('speedup', '?')}", end="")
        print("   {clients_per_s} clients/s, {peak_mib} MiB, loss {loss}".format(**row), end="")
        print(f"   {row.get('ran', '')}", flush=True)


def show(text: str, arrangement: str, traces: Path) -> None:
    """Profile some rounds in this process; the trace goes to a folder below `traces`."""
    how = ARRANGEMENTS[arrangement]
    if how.threads is not None:
        torch.set_num_threads(how.threads)
    print(f"{text}, {arrangement}", flush=True)
    sim = simulation(workload(text), **how.simulation)
    folder = traces / f"{text}-{arrangement.replace(' ', '-')}"
    folder.mkdir(parents=True, exist_ok=True)
    state, seen = sim.start(), profile.Profile(sim, folder)
    for _ in range(profile.ROUNDS):
        state, metrics = sim.round(state)
        seen.log(metrics)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--workloads", nargs="+", type=checked, default=WORKLOADS, help="model-cohort"
    )
    names = list(ARRANGEMENTS)
    parser.add_some("--arrangements", names, "who trains, and on what")
    parser.add_argument("--passes", type=positive, default=5, help="turns of each arrangement")
    parser.add_out("round_time")
    parser.add_argument("--profile", action="store_true", help="print the parts of a round")
    traces = ROOT / "runs" / "traces"
    parser.add_argument("--traces", type=Path, default=traces, help="where --profile leaves traces")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    for text in args.workloads:
        if args.profile:
            for name in args.arrangements:
                if ARRANGEMENTS[name].kind == "vecfl":
                    show(text, name, args.traces)
            continue
        compare(text, args.arrangements, args.passes, args.out)


if __name__ == "__main__":
    command(main)
