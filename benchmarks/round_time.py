"""How long does a round take, against a plain loop over the clients?

    python benchmarks/round_time.py --workloads logistic-100 --passes 5

Every arrangement runs in a process of its own (threads that one leaves spinning would slow the
next), the passes go round all arrangements, and a row holds the median, the 20th and 80th
percentile of all timed rounds, and the ratio to the tuned loop on one thread. Data are random:
only time is measured. Rows are added to benchmarks/results/round_time.jsonl, or to --out. With
--profile nothing is compared: each arrangement of vecfl prints where the time of its rounds goes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.rows import RESULTS, provenance, quantiles_ms, write
from benchmarks.common.workloads import MODELS, plain_round, simulation, vecfl_round
from vecfl import profile

COHORTS = (("logistic", 100), ("logistic", 1000), ("mlp", 100), ("cnn", 10))
WORKLOADS = {f"{name}-{n}": replace(MODELS[name], clients=n) for name, n in COHORTS}
ROUNDS = 5  # timed rounds of a process, after two that are not
BASELINE = "tuned 1"


@dataclass(frozen=True)
class Arrangement:
    """Who trains: a plain loop ("tuned" or "written"), or vecfl with arguments of its own.

    threads  operator threads of the process; None: as many as torch takes by itself
    """

    kind: str
    threads: int | None = 1
    simulation: dict[str, Any] = field(default_factory=dict)


ARRANGEMENTS = {
    "tuned 1": Arrangement("tuned"),
    "tuned 2": Arrangement("tuned", 2),
    "written 1": Arrangement("written"),
    "written 2": Arrangement("written", 2),
    "loop 1": Arrangement("vecfl", 1, {"backend": "loop"}),
    "loop 2": Arrangement("vecfl", 2, {"backend": "loop"}),
    "loop 2 workers": Arrangement("vecfl", 1, {"backend": "loop", "workers": 2, "threads": 1}),
    "vmap 1": Arrangement("vecfl", 1, {"backend": "vmap"}),
    "vmap 2": Arrangement("vecfl", 2, {"backend": "vmap"}),
    "vmap 2 workers": Arrangement("vecfl", 1, {"backend": "vmap", "workers": 2, "threads": 1}),
    "stacked 1": Arrangement("vecfl", 1, {"backend": "stacked"}),
    "stacked 2": Arrangement("vecfl", 2, {"backend": "stacked"}),
    "stacked 2 workers": Arrangement(
        "vecfl", 1, {"backend": "stacked", "workers": 2, "threads": 1}
    ),
    "auto": Arrangement("vecfl", None, {"backend": "auto", "workers": "auto", "slots": "auto"}),
}
RAN = ("backend", "workers", "threads", "slots")  # what vecfl says it ran on


def measure(workload: str, arrangement: str) -> dict[str, Any]:
    """Seconds of each timed round in this process, and what vecfl ran on."""
    work, how = WORKLOADS[workload], ARRANGEMENTS[arrangement]
    if how.threads is not None:
        torch.set_num_threads(how.threads)
    run: Callable[[], Any] = (
        vecfl_round(work, **how.simulation)
        if how.kind == "vecfl"
        else plain_round(work, tuned=how.kind == "tuned")
    )
    seconds = []
    for _ in range(ROUNDS + 2):
        began = time.perf_counter()
        metrics = run()
        seconds.append(time.perf_counter() - began)
    ran = {key: metrics[f"system/{key}"] for key in RAN if f"system/{key}" in (metrics or {})}
    return {"seconds": seconds[2:], "ran": ran}


def measure_apart(workload: str, arrangement: str) -> dict[str, Any]:
    """`measure` in a fresh process, where the arrangement alone decides on threads."""
    command = [sys.executable, __file__, "--measure", workload, arrangement]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=env).stdout)


def compare(workload: str, arrangements: list[str], passes: int, out: Path) -> None:
    """Measure the arrangements in turn, `passes` times, and write and print a row for each."""
    seconds: dict[str, list[float]] = {name: [] for name in arrangements}
    ran: dict[str, list[dict[str, Any]]] = {name: [] for name in arrangements}
    for _ in range(passes):
        for name in arrangements:
            found = measure_apart(workload, name)
            seconds[name] += found["seconds"]
            if found["ran"] not in ran[name]:
                ran[name].append(found["ran"])
    where = provenance()
    for name in arrangements:
        times = quantiles_ms(seconds[name])
        row = {"workload": workload, "arrangement": name, "rounds": len(seconds[name])} | times
        if BASELINE in arrangements:
            baseline = quantiles_ms(seconds[BASELINE])["p50_ms"]
            row["speedup"] = round(baseline / times["p50_ms"], 2)
        if ran[name] != [{}]:
            row["ran"] = ran[name]  # a list: "auto" may choose anew in each process
        write(out, row | where)
        low, median, high = times.values()
        print(f"{workload:15} {name:17} {median:8.1f} ms ({low:.1f} to {high:.1f})", end="")
        print(f"   x{row.get('speedup', '?')}   {row.get('ran', '')}", flush=True)


def show(workload: str, arrangement: str) -> None:
    """Profile some rounds in this process; the trace goes to a temporary folder."""
    how = ARRANGEMENTS[arrangement]
    if how.threads is not None:
        torch.set_num_threads(how.threads)
    print(f"{workload}, {arrangement}", flush=True)
    sim = simulation(WORKLOADS[workload], **how.simulation)
    state, seen = sim.start(), profile.Profile(sim, Path(tempfile.mkdtemp(prefix="vecfl-")))
    for _ in range(profile.ROUNDS):
        state, metrics = sim.round(state)
        seen.log(metrics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    names = list(ARRANGEMENTS)
    parser.add_argument("--arrangements", nargs="+", choices=names, default=names)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "round_time.jsonl")
    parser.add_argument("--profile", action="store_true", help="print the parts of a round")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    for workload in args.workloads:
        convolves = workload.startswith("cnn")  # no stacked form
        some = [name for name in args.arrangements if not (convolves and "stacked" in name)]
        if args.profile:
            for name in some:
                if ARRANGEMENTS[name].kind == "vecfl":
                    show(workload, name)
            continue
        compare(workload, some, args.passes, args.out)


if __name__ == "__main__":
    main()
