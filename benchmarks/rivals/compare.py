"""Who trains clients fastest on this machine?

    python benchmarks/rivals/compare.py

vecfl, a plain loop, pfl, Flower, BlazeFL and FedJAX train the same clients on the same data from
the same model by FedAvg; README.md beside this file tells how, and install.sh makes their
environments. Each (rival, setting) runs in processes of its own, and they take turns. The first
turn is everybody's; later ones are for the settings that came within --margin of their rival's
best. A row holds percentiles of all rounds but the first of each process, and the loss after the
last, which says whether the work was the same. Rows are added to benchmarks/results/rivals.jsonl,
or to --out. With --check nothing is timed: the rivals' models after three rounds of full batches
without dropout are compared with those of the plain loop.

Takes an hour or two on two cores.
"""

import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.apart import Failed, run_apart
from benchmarks.common.command import Parser, command, positive
from benchmarks.common.contest import WORKLOADS, Workload, load, make, save
from benchmarks.common.contest_torch import probe_loss
from benchmarks.common.rows import ROOT, Row, provenance, quantiles_ms, write

ROUNDS = {"logistic": 6, "emnist": 3, "cifar": 2, "lstm": 2}  # of a process, the first not timed
LIMIT = 300.0  # seconds that a process may take
BASELINE = ("plain", "1 thread")
SAME_WORK = 0.1  # losses may differ by this part of what the plain loop gained
AGREE = 1e-4  # and models in --check by this much, or this part of how far they moved, times 100


@dataclass(frozen=True)
class Setting:
    """How a rival runs: flags of its script, processes that torchrun starts, what it can train."""

    flags: str = ""
    processes: int = 1
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    env: tuple[tuple[str, str], ...] = ()


ONE_THREAD = (("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false"),)
CONTESTANTS = {
    BASELINE: Setting("--threads 1"),
    ("plain", "2 threads"): Setting("--threads 2"),
    ("plain", "1 thread, as written"): Setting("--threads 1 --written"),
    ("plain", "2 threads, as written"): Setting("--threads 2 --written"),
    ("vecfl", "auto"): Setting(),
    ("pfl", "1 process, 1 thread"): Setting("--threads 1"),
    ("pfl", "1 process, 2 threads"): Setting("--threads 2"),
    ("pfl", "2 processes"): Setting("--threads 1", processes=2),
    ("flower", "1 actor, 2 threads"): Setting("--actors 1 --threads 2"),
    ("flower", "2 actors"): Setting("--actors 2 --threads 1"),
    ("blazefl", "1 client thread"): Setting("--pool threads --workers 1 --threads 1"),
    ("blazefl", "1 client thread, 2 threads"): Setting("--pool threads --workers 1 --threads 2"),
    ("blazefl", "2 client threads"): Setting("--pool threads --workers 2 --threads 1"),
    ("blazefl", "2 processes"): Setting("--pool processes --workers 2 --threads 1"),
    ("fedjax", "jit"): Setting(),
    ("fedjax", "jit, 1 thread"): Setting(env=ONE_THREAD),
    ("jax", "vmap by hand"): Setting("--vmap", workloads=("logistic",)),
}
SCRIPTS = {"jax": "fedjax"}  # it runs in FedJAX's environment, from the same script
HERE = ("plain", "vecfl")  # they run in this environment
Name = tuple[str, str]


def python_of(rival: str) -> Path:
    """The interpreter of a rival's environment, below the folder that RIVALS names."""
    if rival in HERE:
        return Path(sys.executable)
    envs = Path(os.environ.get("RIVALS") or ROOT / ".rivals").absolute()
    return envs / SCRIPTS.get(rival, rival) / "bin" / "python"


def train(name: Name, job: Path, rounds: int, model: Path, cache: Path) -> dict[str, Any]:
    """What a contestant said of the rounds; its model afterwards is at `model`. Raises Failed."""
    rival, how = name[0], CONTESTANTS[name]
    command = [str(python_of(rival))]
    if how.processes > 1:
        torchrun = "-m torch.distributed.run --standalone --nproc-per-node"
        command += [*torchrun.split(), str(how.processes)]
    command += [f"{ROOT}/benchmarks/rivals/run_{SCRIPTS.get(rival, rival)}.py", str(job)]
    command += ["--rounds", str(rounds), "--out", str(model), *how.flags.split()]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    # What vecfl measures is kept for this comparison, and nothing from before counts.
    env = {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    return run_apart(command, env | dict(how.env), LIMIT)


def compare(workload: str, names: list[Name], repeats: int, margin: float, out: Path) -> None:
    """Let the contestants take turns; write and print a row for each."""
    found: dict[Name, list[dict[str, Any]]] = defaultdict(list)
    failed: dict[Name, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        job, model = Path(folder) / "job.npz", Path(folder) / "model.npz"
        save(job, make(WORKLOADS[workload]))
        start = probe_loss(job, load(job).start)
        for turn in range(repeats):
            for name in names if turn == 0 else contenders(found, margin):
                try:
                    said = train(name, job, ROUNDS[workload], model, Path(folder))
                except Failed as why:
                    failed[name] = str(why)
                    continue
                with np.load(model) as after:
                    said["loss"] = probe_loss(job, dict(after))
                found[name].append(said)
    table = rows(workload, found, start)
    where = provenance()
    for row in table:
        write(out, row | where)
    for line in lines(table):
        print(line, flush=True)
    for (rival, setting), reason in failed.items():
        print(f"{workload:9} {rival}, {setting}: failed: {reason}", flush=True)


def contenders(found: dict[Name, list[dict[str, Any]]], margin: float) -> list[Name]:
    """Who goes on: at first at most `margin` times slower than the best setting of its rival."""
    first = {name: statistics.median(seconds(said[:1])) for name, said in found.items()}
    best: dict[str, float] = defaultdict(lambda: float("inf"))
    for (rival, _), value in first.items():
        best[rival] = min(best[rival], value)
    return [n for n, value in first.items() if n == BASELINE or value <= margin * best[n[0]]]


def seconds(said: Iterable[dict[str, Any]]) -> list[float]:
    """Of every round but the first of each process."""
    return [b - a for one in said for a, b in zip(one["times"][1:], one["times"][2:], strict=False)]


def rows(workload: str, found: dict[Name, list[dict[str, Any]]], start: float) -> list[Row]:
    """A row for each contestant, the fastest first."""
    work, table = WORKLOADS[workload], []
    reference = found.get(BASELINE)
    for (rival, setting), said in found.items():
        times = quantiles_ms(seconds(said))
        per_s = 1e3 / times["p50_ms"]
        loss = statistics.median(one["loss"] for one in said)
        row: Row = {"workload": workload, "rival": rival, "setting": setting}
        row |= {"repeats": len(said), "rounds": len(seconds(said)), **times}
        row |= {"clients_per_s": round(work.clients * per_s, 2)}
        row |= {"samples_per_s": round(work.clients * work.examples * per_s, 1)}
        row |= {"client_steps_per_s": round(work.steps * per_s, 1)}
        if reference:
            aim = statistics.median(one["loss"] for one in reference)
            row["speedup"] = round(quantiles_ms(seconds(reference))["p50_ms"] / times["p50_ms"], 2)
            row["same_work"] = abs(loss - aim) <= SAME_WORK * (start - aim)
        row |= {"loss_at_start": round(start, 5), "loss": round(loss, 5)}
        row["startup_s"] = round(statistics.median(one["startup_s"] for one in said), 2)
        peaks = [one["peak_mib"] for one in said if one["peak_mib"]]
        row |= {"peak_mib": max(peaks, default=None), "versions": said[-1]["versions"]}
        if "ran" in said[-1]:
            row["ran"] = sorted({one["ran"] for one in said})
        table.append(row)
    return sorted(table, key=lambda row: float(str(row["p50_ms"])))


def lines(table: list[Row]) -> list[str]:
    """The rows as a table to read."""
    head = f"{'workload':9} {'rival':8} {'setting':27} {'ms a round (p20 to p80)':>28}"
    printed = [f"{head} {'clients/s':>10} {'x plain':>8} {'loss':>7} {'MiB':>6} {'start s':>8}"]
    for row in table:
        spread = f"({row['p20_ms']:.0f} to {row['p80_ms']:.0f})"
        line = f"{row['workload']:9} {row['rival']:8} {row['setting']:27}"
        line += f" {row['p50_ms']:10.1f} {spread:>17} {row['clients_per_s']:10.1f}"
        line += f" {row.get('speedup', '?'):>8} {row['loss']:7.4f} {row['peak_mib'] or 0:6.0f}"
        line += f" {row['startup_s']:8.1f}  {row.get('ran', '')}"
        printed.append(line if row.get("same_work", True) else f"{line}  NOT THE SAME WORK")
    return printed


def small(work: Workload) -> Workload:
    """Four clients, full batches, no dropout: nothing is left to chance."""
    return replace(work, clients=4, batch=work.examples, dropout=False)


def check(workload: str, names: list[Name]) -> bool:
    """Whether all models after three rounds are those of the plain loop; a line for each."""
    with tempfile.TemporaryDirectory() as folder:
        job, model = Path(folder) / "job.npz", Path(folder) / "model.npz"
        save(job, made := make(small(WORKLOADS[workload])))
        models: dict[Name, dict[str, np.ndarray]] = {}
        agreed = True
        for name in [BASELINE, *(n for n in names if n != BASELINE)]:
            try:
                train(name, job, 3, model, Path(folder))
                with np.load(model) as after:
                    models[name] = dict(after)
                moved = furthest(models[BASELINE], made.start)
                apart = furthest(models[name], models[BASELINE])
                agrees = apart <= AGREE and apart <= 100 * AGREE * moved
                said = f"{apart:.1e} apart, moved by {moved:.1e}"
            except Failed as why:
                agrees, said = False, f"failed: {why}"
            agreed &= agrees
            word = "agrees" if agrees else "DISAGREES"
            print(f"{workload:9} {name[0]:8} {name[1]:27} {word:9} {said}", flush=True)
    return agreed


def furthest(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """The largest difference of two models with the same parameters."""
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def main() -> None:
    parser = Parser(__doc__)
    rivals = list(dict.fromkeys(rival for rival, _ in CONTESTANTS))
    parser.add_some("--workloads", WORKLOADS, "that are trained")
    parser.add_some("--rivals", rivals, "who takes part")
    parser.add_argument("--repeats", type=positive, default=5, help="turns of each setting")
    parser.add_argument("--margin", type=float, default=1.1, help="inf: all settings, all turns")
    parser.add_argument("--check", action="store_true", help="compare models, time nothing")
    parser.add_out("rivals")
    args = parser.parse_args()
    for rival in args.rivals:
        if not python_of(rival).exists():
            print(f"{rival} is left out: not installed, no {python_of(rival)} (install.sh)")
    here = [n for n in CONTESTANTS if n[0] in args.rivals and python_of(n[0]).exists()]
    agreed = True
    for workload in args.workloads:
        names = [name for name in here if workload in CONTESTANTS[name].workloads]
        if not names:
            continue
        if args.check:
            agreed &= check(workload, names)
        else:
            compare(workload, names, args.repeats, args.margin, args.out)
    sys.exit(not agreed)


if __name__ == "__main__":
    command(main)
