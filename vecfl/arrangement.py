"""An arrangement: on what a cohort is laid out, and what of it cannot be."""

import sys
from dataclasses import dataclass

import torch

from vecfl.algorithms import Algorithm
from vecfl.errors import InputError
from vecfl.layout import Layout
from vecfl.processes import possible


@dataclass(frozen=True)
class Arrangement:
    """How a cohort is laid out on the machine.

    backend  "vmap" or "stacked" (clients side by side), "loop" (one after the other)
    workers  threads or processes that train clients, each with slots and a module of its own
    threads  operator threads of each worker
    slots    clients in training at a time on each worker
    processes  1, or as many as workers: one for each (`vecfl.processes`)
    precision  of products: see `vecfl.precision`
    graphs   whether steps are captured and replayed: see `vecfl.engine.graphs`
    """

    backend: str
    workers: int
    threads: int
    slots: int
    processes: int = 1
    precision: str = "float32"
    graphs: bool = False

    @property
    def cores(self) -> int:
        """Operator threads of all workers together."""
        return self.workers * self.threads

    def __str__(self) -> str:
        kind = "process" if self.processes > 1 else "worker"
        workers = f"{self.workers} {kind}{('es' if kind[0] == 'p' else 's') * (self.workers > 1)}"
        threads = f"{self.threads} operator thread{'s' * (self.threads > 1)}"
        precision = f", {self.precision}" * (self.precision != "float32")
        how = self.backend + precision + ", graphs" * self.graphs
        return f"{how}, {workers} of {self.slots} slots and {threads}"


def check(
    arrangement: Arrangement, device: torch.device, algorithm: Algorithm, layout: Layout
) -> None:
    """InputError for workers that this device, system or algorithm cannot have."""
    workers, processes = arrangement.workers, arrangement.processes
    if workers > 1 and device.type != "cpu":
        raise InputError(
            f"{workers} workers on {device}: workers are for the cores of a CPU, a GPU takes one"
        )
    if processes == 1:
        return
    if processes != workers:
        raise InputError(f"processes={processes} for workers={workers}: give 1, or as many")
    if why := no_processes(algorithm, layout):
        raise InputError(f"processes={processes}: {why}; use threads (processes=1)")
    if arrangement.threads > 1:
        raise InputError(f"processes={processes}: each has one operator thread; give threads=1")


def no_processes(algorithm: Algorithm, layout: Layout) -> str:
    """Why workers cannot be processes; "" where they can."""
    if not possible():
        return f"on {sys.platform} torch's threads do not outlive a fork"
    if torch.accelerator.device_count():  # starts no CUDA where NVML answers
        return (
            "torch lets no fork train where it sees an accelerator "
            f"({torch.accelerator.current_accelerator()}; CUDA_VISIBLE_DEVICES= hides NVIDIA's)"
        )
    if algorithm.table(layout) or algorithm.before is not None:
        return f"{algorithm.name} keeps rows of clients, which processes do not share"
    return ""
