"""An arrangement: on what a cohort is laid out, what is wished of it, and what cannot be."""

import sys
from dataclasses import dataclass

import torch

from vecfl.algorithms import Algorithm
from vecfl.errors import InputError, is_integer
from vecfl.layout import Layout
from vecfl.processes import possible

IDLE = 100  # threads or slots for each client of a cohort: more are a mistake
BACKENDS = ("loop", "vmap", "stacked")
FORMULATIONS = ("stacked-each", "stacked-grouped", "stacked-unfold")  # of convolutions
BY_RULE: dict[str, tuple[str | None, ...]] = {
    "workers": ("auto",),
    "threads": (None,),
    "slots": ("auto", None),
    "processes": (None,),
}


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


@dataclass(frozen=True)
class Wanted:
    """What is wished of an arrangement: a value, "auto" to measure it, None for the rule."""

    backend: str
    workers: int | str
    threads: int | None
    slots: int | str | None
    processes: int | None = None
    precision: str = "float32"
    graphs: bool = False

    def __post_init__(self) -> None:
        if self.backend not in (*BACKENDS, *FORMULATIONS, "auto"):
            raise InputError(
                f"backend {self.backend!r} is not known; choose loop, vmap, stacked or auto"
            )
        for name, by_rule in BY_RULE.items():
            value = getattr(self, name)
            if value not in by_rule and not (is_integer(value) and value >= 1):
                raise InputError(f"{name} must be an integer of at least 1, not {value!r}")
        if self.processes in (None, 1):
            return
        if self.processes != self.count:
            raise InputError(
                f"processes={self.processes} with workers={self.workers}: give "
                f"workers={self.processes} or auto, or leave out processes"
            )
        if self.threads not in (None, 1):
            raise InputError(one_thread(self.processes))

    @property
    def count(self) -> int | str:
        """Of workers: "auto" is the number of processes where these are several."""
        if self.workers == "auto" and self.processes is not None and self.processes > 1:
            return self.processes
        return self.workers

    @property
    def measured(self) -> bool:
        return "auto" in (self.backend, self.count, self.slots)

    def check(self, most: int) -> None:
        """InputError for more processes than the clients that a cohort can have.

        Some threads and slots may idle; memory for far too many would end in the allocator's error.
        """
        several = self.processes is not None and self.processes > 1
        limits = {"workers": most if several else IDLE * most, "slots": IDLE * most}
        for name, value in (("workers", self.count), ("slots", self.slots)):
            if value not in ("auto", None) and int(value) > limits[name]:
                raise InputError(f"{name}={value}: give at most {most}, the clients of a cohort")


def has_device(name: str | torch.device) -> bool:
    """Whether tensors can be made on this device here."""
    if str(name) == "cuda":  # which GPU is a rank's own matter: none is touched
        return torch.cuda.is_available()
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError):  # asserts without CUDA
        return False
    return True


def require_device(name: str | torch.device) -> torch.device:
    """The device of this name; InputError where this machine has none."""
    if not has_device(name):
        raise InputError(f"device={str(name)!r}: expected a device of this machine, such as cpu")
    return torch.device(name)


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
        raise InputError(one_thread(processes))


def one_thread(processes: int) -> str:
    """Why operator threads of processes are refused."""
    return f"processes={processes}: each has one operator thread; give threads=1"


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
