"""How a cohort is laid out on the machine: workers, their threads, and the order of their sums."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Event

import numpy as np
import torch
from torch import Tensor

from vecfl.algorithms import Algorithm
from vecfl.algorithms.base import Server
from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.losses import Batch
from vecfl.schedule import Plan, make_plan, share
from vecfl.task import Task
from vecfl.worker import Fold, Worker


@dataclass(frozen=True)
class Arrangement:
    """How a cohort is laid out on the machine.

    backend  "vmap" or "stacked" (clients side by side), "loop" (one after the other)
    workers  threads that train clients, each with slots and a module of its own
    threads  operator threads of each worker
    slots    clients in training at a time on each worker
    """

    backend: str
    workers: int
    threads: int
    slots: int

    def __str__(self) -> str:
        workers = f"{self.workers} worker{'s' * (self.workers > 1)}"
        threads = f"{self.threads} operator thread{'s' * (self.threads > 1)}"
        return f"{self.backend}, {workers} of {self.slots} slots and {threads}"


@contextmanager
def operator_threads(number: int) -> Iterator[None]:
    """Operators of this thread, and of threads that first use one inside, use `number` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Trainer:
    """Trains cohorts: `trainer.train(server, round, cohort, trainer.plan(cohort), columns)`.

    task is on the device already; data say where clients begin, and give an example. Raises
    InputError for several workers on a GPU, and where the backend cannot train the module.
    """

    def __init__(
        self,
        task: Task,
        data: FederatedDataset,
        algorithm: Algorithm,
        arrangement: Arrangement,
        seed: int,
    ) -> None:
        device = next(task.module.parameters()).device
        if arrangement.workers > 1 and device.type != "cpu":
            raise InputError(
                f"{arrangement.workers} workers on {device}: workers are threads for the cores of "
                "a CPU, a GPU takes one"
            )
        self.data, self.batches, self.arrangement = data, algorithm.rule.batches, arrangement
        backend, slots = arrangement.backend, arrangement.slots
        example = data.examples(3 * algorithm.rule.batches.size)
        self.workers = [
            Worker(task, example, algorithm, backend=backend, slots=slots, seed=seed)
            for _ in range(arrangement.workers)
        ]
        self.pool = ThreadPoolExecutor(arrangement.workers, "vecfl-worker")
        self.stop = Event()

    def plan(self, cohort: Tensor) -> Plan:
        """What the clients of `cohort` [C] do in a round."""
        return make_plan(self.batches, self.data.offsets, cohort)

    def train(
        self,
        server: Server,
        round: int,
        cohort: Tensor,
        plan: Plan,
        columns: Batch,
        grid: float | None = None,
    ) -> Fold:
        """Train `cohort` [C] (positions in the dataset) by its plan, from the server's state.

        columns [n, ...] are on the device; `plan.first` says where those of a client begin. `grid`
        makes sums exact (`vecfl.aggregate.exact_grid`).

        Each worker's clients, and the order in which the workers' sums are added, depend on the
        plan alone: a round that is repeated has the same bits.
        """
        jobs = [
            partial(
                worker.train, server, round, cohort[mine], plan.of(mine), columns, grid, self.stop
            )
            for worker, mine in zip(self.workers, self.share(plan), strict=True)
        ]
        with operator_threads(self.arrangement.threads):
            first, *others = self._do(jobs)
        for fold in others:
            first.merge_(fold)
        return first

    def share(self, plan: Plan) -> list[np.ndarray]:
        """Which clients each worker trains, as positions in the cohort; longest first.

        Where slots take their steps together, the longest slot counts, else the sum of steps.
        """
        together = 1 if self.arrangement.backend == "loop" else self.arrangement.slots
        return share(plan.steps, len(self.workers), together)

    def _do(self, jobs: Sequence[Callable[[], Fold]]) -> list[Fold]:
        """What the jobs return, each run by a thread; where one fails, the others stop too."""
        self.stop.clear()
        if len(jobs) == 1:
            return [jobs[0]()]
        futures = [self.pool.submit(job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            self.stop.set()
            return [future.result() for future in futures]
        finally:
            self.stop.set()
            wait(futures)
