"""What does privacy add to the time of a round?

    python benchmarks/private_rounds.py

Rounds of FedAvg with uniform weights, of the workloads in `benchmarks/common/workloads.py`, with
privacy and without. Of clients, `vecfl.private` with a norm that clips every message and with an
adaptive one: cohorts are those of the workload. Of examples, `vecfl.dp_sgd`: of --few clients. All
take turns in one process, on one thread, with the slots of the plain rounds in the same backend. A
row holds the time of a round and, as medians over turns, its ratio to the plain round of the same
backend and to that of the fastest. Rows are added to benchmarks/results/private_rounds.jsonl, or to
--out.

Takes about three and a half minutes on a core.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import vecfl
from benchmarks.common.command import Parser, command, positive
from benchmarks.common.rows import Row, provenance, quantiles_ms, write
from benchmarks.common.workloads import MODELS, Workload

PLAIN, DELTA = "none", 1e-5
Around = Callable[[vecfl.Algorithm, int], vecfl.Algorithm]


@dataclass(frozen=True)
class Unit:
    """What is protected: by which mechanisms, and in which backends it and plain rounds run.

    mechanisms  (plain algorithm, cohort) -> private one
    """

    mechanisms: dict[str, Around]
    backends: tuple[str, ...]
    plain: tuple[str, ...]


def clipped(clip: vecfl.Transform) -> Around:
    def around(algorithm: vecfl.Algorithm, cohort: int) -> vecfl.Algorithm:
        return vecfl.private(algorithm, clip, noise_multiplier=1.0, cohort=cohort, delta=DELTA)

    return around


def by_steps(algorithm: vecfl.Algorithm, cohort: int) -> vecfl.Algorithm:
    return vecfl.dp_sgd(algorithm, clip=1.0, noise_multiplier=1.0, delta=DELTA)


UNITS = {
    "client": Unit(
        {
            "clip_by_norm": clipped(vecfl.clip_by_norm(1e-3)),
            "adaptive_clip": clipped(vecfl.adaptive_clip(0.1, count_noise=5.0)),
        },
        backends=("stacked", "vmap"),
        plain=("stacked", "vmap"),
    ),
    "example": Unit({"dp_sgd": by_steps}, ("vmap", "loop"), ("stacked", "vmap", "loop")),
}


class Rounds:
    """The rounds of an algorithm, one after the other, each timed."""

    def __init__(self, work: Workload, algorithm: vecfl.Algorithm, **how: Any) -> None:
        data = work.data()
        self.sim = vecfl.Simulation(
            work.task(data), data, algorithm, vecfl.everyone(), threads=1, **how
        )
        self.state = self.sim.start()
        self.seconds: list[float] = []
        self.metrics: dict[str, float | int | str] = {}

    def play(self) -> None:
        began = time.perf_counter()
        self.state, self.metrics = self.sim.round(self.state)
        self.seconds.append(time.perf_counter() - began)


def rounds_of(work: Workload, unit: Unit) -> dict[tuple[str, str], Rounds]:
    """Whoever takes turns, by mechanism and backend."""
    batches = vecfl.Batches(work.batch)
    plain = vecfl.fedavg(lr=work.lr, batches=batches, weights=vecfl.uniform_weights)
    found = {(PLAIN, name): Rounds(work, plain, backend=name) for name in unit.plain}
    for backend in unit.backends:
        slots = found[PLAIN, backend].sim.arrangement.slots
        for name, around in unit.mechanisms.items():
            algorithm = around(plain, work.clients)
            found[name, backend] = Rounds(work, algorithm, backend=backend, slots=slots)
    return found


def compare(work: Workload, unit: Unit, passes: int, seconds: float) -> list[Row]:
    """A row of each, of at least `passes` turns and `seconds`; a first turn is left out."""
    players, began, turns = rounds_of(work, unit), time.perf_counter(), 0
    while turns <= passes or time.perf_counter() - began < seconds:
        turns += 1
        for player in players.values():
            player.play()
    took = {key: np.array(player.seconds[1:]) for key, player in players.items()}
    fastest = min(unit.plain, key=lambda name: float(np.median(took[PLAIN, name])))
    rows = []
    for (name, backend), times in took.items():
        sim, metrics = players[name, backend].sim, players[name, backend].metrics
        row: Row = {"mechanism": name, "backend": backend, "slots": sim.arrangement.slots}
        row |= {"passes": len(times), **quantiles_ms(times.tolist()), "fastest": fastest}
        for what, base in (("of_plain", backend), ("of_fastest", fastest)):
            low, median, high = np.percentile(times / took[PLAIN, base], (20, 50, 80)).round(3)
            row |= {what: median, f"{what}_p20": low, f"{what}_p80": high}
        clipped = {"clipped": metrics["train/clipped"]} if "train/clipped" in metrics else {}
        rows.append(row | clipped)
    return rows


def main() -> None:
    parser = Parser(__doc__)
    parser.add_some("--units", UNITS, "that are protected")
    usual = ["logistic", "mlp", "small_cnn", "cnn"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=usual, help="that train")
    parser.add_argument("--cohort", type=positive, help="clients [those of the workload]")
    parser.add_argument("--few", type=positive, default=4, help="clients of dp_sgd")
    parser.add_argument("--passes", type=positive, default=3, help="timed rounds of each at least")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of all turns of a workload at least"
    )
    parser.add_out("private_rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for model in args.models:
        for unit in args.units:
            clients = args.few if unit == "example" else args.cohort or MODELS[model].clients
            work = replace(MODELS[model], clients=clients)
            for row in compare(work, UNITS[unit], args.passes, args.seconds):
                row = {"workload": model, "unit": unit, "cohort": clients} | row
                write(args.out, row | provenance())
                ratios = f"x{row['of_plain']} of plain, x{row['of_fastest']} of the fastest plain"
                about = f"{model}-{clients} {unit} {row['mechanism']} {row['backend']}"
                print(f"{about}: {row['p50_ms']} ms, {ratios}", flush=True)


if __name__ == "__main__":
    command(main)
