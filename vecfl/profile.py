"""Where the time of a round goes: a table of its parts and a trace, after some rounds to warm up.

The parts are wrapped while they are timed, so that a run without a profile pays for nothing.
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch

import vecfl.one_batch as one_batch
import vecfl.simulation as simulation
from vecfl.cohorts import Cohorts
from vecfl.engine import loop, stacked, vmap
from vecfl.errors import InputError
from vecfl.mesh import Mesh
from vecfl.roof import executed, shares, step_bytes, step_flops, wait
from vecfl.simulation import Simulation
from vecfl.tape import Tape
from vecfl.worker import Worker

WARM, TIMED = 1, 2  # rounds; one more is traced
ROUNDS = WARM + TIMED + 1
PARTS: dict[str, list[tuple[Any, str]]] = {  # whose calls count; what runs inside of one does not
    "plan and tape": [(Cohorts, "take"), (Tape, "__init__"), (Tape, "blocks")],
    "seating clients": [(Worker, "_seat")],
    "gather": [(loop, "gather"), (vmap, "gathered"), (stacked, "gathered"), (one_batch, "gather")],
    "step": [
        *((b, "run_") for b in (loop.LoopBackend, vmap.VmapBackend, stacked.StackedBackend)),
        (one_batch.OneBatch, "train"),
    ],
    "folding messages": [(Worker, "_commit")],
    "metrics": [(simulation, "tally")],
    "all-reduce": [(Mesh, "sum")],
    "server": [],  # the algorithm's
    "evaluation": [(Simulation, "evaluate"), (Simulation, "evaluate_clients")],
}
LATER = ("gathered", "blocks")  # these give what does the work


class Clock:
    """Seconds by part, without those of the parts inside it; of `workers` threads their mean."""

    def __init__(self, workers: int) -> None:
        self.workers, self.seconds = workers, Counter[str]()
        self.lock, self.own = threading.Lock(), threading.local()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        inside = self.own.__dict__.setdefault("inside", [])
        inside.append(0.0)
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            alone = threading.current_thread() is threading.main_thread()
            with self.lock:
                self.seconds[name] += (took - inside.pop()) / (1 if alone else self.workers)
            if inside:
                inside[-1] += took

    def timed(self, name: str, function: Callable) -> Callable:
        """`function`, whose calls count for a part; of an iterator, what it takes to go on."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if function.__name__ not in LATER:
                with self.part(name):
                    return function(*args, **kwargs)
            found = function(*args, **kwargs)
            return (
                self.steps(name, found) if isinstance(found, Iterator) else self.timed(name, found)
            )

        return call

    def steps(self, name: str, found: Iterator[Any]) -> Iterator[Any]:
        end = object()
        while True:
            with self.part(name):
                one = next(found, end)
            if one is end:
                return
            yield one


class Profile:
    """A tracker (`vecfl.track`) that profiles rounds 2 to 4 of a run.

    It prints a table, and writes `trace.json`, for chrome://tracing or Perfetto, into `folder`,
    which is made where it is not there. Raises InputError where it cannot be.
    """

    def __init__(self, sim: Simulation, folder: str | Path) -> None:
        self.sim, self.path, self.seen = sim, Path(folder) / "trace.json", 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()  # torch would only print that it cannot write
            self.path.unlink()
        except OSError as error:
            why = error.strerror or error
            raise InputError(f"{folder}: no folder for a trace: {why}") from None
        self.clock = Clock(sim.arrangement.workers)
        self.wrapped = ExitStack()
        self.tracer: torch.profiler.profile | None = None
        self.metrics: list[Mapping[str, Any]] = []

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Look at the time after a round, its evaluation included."""
        if not metrics["round"] or self.seen == ROUNDS:
            return
        self.seen += 1
        if self.seen == WARM:
            wrap(self.wrapped, self.clock, self.sim)
            self.began = time.perf_counter()
        elif self.seen <= WARM + TIMED:
            self.metrics.append(metrics)
        if self.seen == WARM + TIMED:
            wait(self.sim.device)
            self.seconds = time.perf_counter() - self.began
            self.wrapped.close()
            self.tracer = torch.profiler.profile()
            self.tracer.start()
        elif self.seen == ROUNDS and self.tracer is not None:
            wait(self.sim.device)
            self.tracer.stop()
            self.tracer.export_chrome_trace(str(self.path))
            print("\n".join([*self.table(self.tracer), *self.trace()]))

    def close(self) -> None:
        """Leave things as they were; a run that ended before there was a table says so."""
        self.wrapped.close()
        if self.seen < ROUNDS:
            if self.tracer is not None:
                self.tracer.stop()
            print(f"no profile: it takes {ROUNDS} rounds, there were {self.seen}", file=sys.stderr)

    def table(self, tracer: torch.profiler.profile) -> list[str]:
        """The lines of the table: means of a round."""
        sim, rounds, wall = self.sim, len(self.metrics), self.seconds / len(self.metrics)
        parts = {name: self.clock.seconds[name] / rounds for name in PARTS}
        parts["other"] = wall - sum(parts.values())
        lines = [f"{'a round':18}{wall * 1e3:10.2f} ms"]
        lines += [f"  {name:16}{s * 1e3:10.2f} ms {s / wall:6.1%}" for name, s in parts.items()]
        steps = sum(m["system/client_steps"] for m in self.metrics) / rounds
        slot_steps = max(sum(map(executed, self.metrics)) / rounds, 1)
        busy, workers = max(parts["step"] + parts["gather"], 1e-9), sim.arrangement.workers
        lines += [
            f"{'slot-steps':18}{slot_steps:10.0f}, clients take {steps / slot_steps:.1%} of them",
            f"{'':18}a slot is a place where a client trains; idle ones that step count, too",
            f"{'host':18}{busy * workers / slot_steps * 1e6:10.2f} us a slot-step",
        ]
        if sim.device.type == "cuda":
            busy = sum(e.self_device_time_total for e in tracer.key_averages()) / 1e6
            lines += [f"{'device':18}{busy / slot_steps * 1e6:10.2f} us a slot-step"]
        moved, flops = slot_steps * step_bytes(sim), slot_steps * step_flops(sim)
        return lines + shares(busy, moved, flops, sim)

    def trace(self) -> list[str]:
        """Where the trace is, and what is not in it."""
        lines = [f"{'trace':18}{self.path if self.path.is_file() else f'not written: {self.path}'}"]
        forks = self.sim.arrangement.processes - 1
        if forks:
            lines += [
                f"{'':18}like the parts above it is of this process alone; what runs in its forks "
                f"({forks}) is missing"
            ]
        return lines


def wrap(restore: ExitStack, clock: Clock, sim: Simulation) -> None:
    """Time the parts of rounds until `restore` is closed."""
    for part, calls in PARTS.items():
        for owner, name in calls:
            plain = getattr(owner, name)
            restore.callback(setattr, owner, name, plain)
            setattr(owner, name, clock.timed(part, plain))
    restore.callback(setattr, sim, "algorithm", sim.algorithm)
    sim.algorithm = replace(sim.algorithm, server=clock.timed("server", sim.algorithm.server))
