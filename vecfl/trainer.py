"""How a cohort is laid out on the machine: workers, their threads, and the order of their sums."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from threading import Event

import numpy as np
import torch
from torch import Tensor

from vecfl.algorithms import Algorithm
from vecfl.arrangement import Arrangement, check
from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.job import Fold, Job
from vecfl.precision import lowered, products
from vecfl.processes import Crew
from vecfl.schedule import Plan, make_plan, share
from vecfl.task import Task
from vecfl.trial import first_line
from vecfl.worker import Worker

log = logging.getLogger("vecfl")


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
    """Trains cohorts: `trainer.train(Job(server, round, trainer.plan(cohort), columns))`.

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
        check(arrangement, device, algorithm, task.layout)
        self.task = lowered(task, arrangement.precision)
        self.data, self.algorithm, self.seed = data, algorithm, seed
        self.pool = ThreadPoolExecutor(arrangement.workers, "vecfl-worker")
        self.stop, self.workers, self.halved = Event(), list[Worker](), False
        self.crew: Crew | None = None
        self.before: Trainer | None = None
        self.rearrange(arrangement)
        if algorithm.before is not None:  # on slots of its own
            self.before = Trainer(task, data, algorithm.before, arrangement, seed)

    def rearrange(self, arrangement: Arrangement) -> None:
        """Make the workers of `arrangement`; the memory of those before is free first."""
        self.workers.clear()
        if self.before is not None:
            self.before.rearrange(arrangement)
        self.arrangement = arrangement
        example = self.data.examples(3 * self.algorithm.rule.batches.size)
        self.workers += [
            Worker(
                self.task,
                example,
                self.algorithm,
                backend=arrangement.backend,
                slots=arrangement.slots,
                seed=self.seed,
                clients=self.data.num_clients,
                graphs=arrangement.graphs,
            )
            for _ in range(arrangement.workers)
        ]

    @property
    def told(self) -> dict[str, int | str]:
        """The arrangement; where the backend replaces layers, how many are fused and by vmap."""
        layers = self.workers[0].backend.layers
        return asdict(self.arrangement) | {how: len(paths) for how, paths in layers.items()}

    def alone(self) -> AbstractContextManager[None]:
        """Where workers are processes, one operator thread for all that this one does in a round.

        OpenMP's others would go on waiting for work, at full speed, on the processes' cores.
        """
        return operator_threads(1) if self.arrangement.processes > 1 else nullcontext()

    def evaluating(self) -> AbstractContextManager[None]:
        """The operator threads of all workers, for an evaluation, but no more than torch has.

        Torch has those of OMP_NUM_THREADS or torch.set_num_threads, else one for each core.
        """
        return operator_threads(min(self.arrangement.cores, torch.get_num_threads()))

    def tell(self) -> None:
        """Log which modules the stacked backend runs by vmap."""
        if by_vmap := self.workers[0].backend.layers.get("by_vmap"):
            log.info("without a stacked form, hence by vmap: %s", ", ".join(by_vmap))

    def plan(self, cohort: Tensor) -> Plan:
        """What the clients of `cohort` [C] do in the first round."""
        batches, offsets = self.algorithm.rule.batches, self.data.offsets
        return make_plan(batches, offsets, cohort, seed=self.seed, round=0)

    def train(self, job: Job) -> Fold:
        """Train the clients of a job.

        Where it has a table, whose round then begins, ending it is left to the caller. InputError
        for a client that comes twice and keeps a row.

        Each worker's clients, and the order in which the workers' sums are added, depend on the
        plan alone: a round that is repeated has the same bits.
        """
        self._require_once(job)
        if job.table is not None:
            job.table.begin(job.round, job.clients)
        earlier = None
        if self.before is not None:
            rows: dict[int, Tensor] = {}
            plan = job.plan.once(self.before.algorithm.rule.batches.size)
            part = replace(job, plan=plan, table=None, sampled=None, keep=rows)
            earlier, job = self.before.train(part), replace(job, before=rows)
        rule = self.algorithm.local(job.server, self.algorithm.rule)
        job = replace(job, numbers=rule.numbers(job.round))
        jobs = [job.of(members) for members in self.share(job.plan)]
        how = self.arrangement
        with operator_threads(how.threads), products(how.precision):
            if how.processes > 1 and self.crew is None:
                self.crew = Crew([worker.train for worker in self.workers], job.columns)
            do = self._do if self.crew is None else self.crew.train
            try:
                first, *others = do(jobs)
            except BaseException:
                self.crew = None  # its processes may still be at it
                raise
        for fold in others:
            first.merge_(fold)
        if earlier is not None:  # its time counts, not its steps
            first.began = earlier.began
            first.busy = [a + b for a, b in zip(first.busy, earlier.busy, strict=True)]
        return first

    def train_or_halve(self, job: Job) -> Fold:
        """As `train`, but where a GPU's memory runs out, slots are halved: once, and said so.

        InputError where that is not enough.
        """
        try:
            return self.train(job)
        except torch.OutOfMemoryError as error:
            what = f"round {job.round + 1}: {self.arrangement}: {first_line(error)}"
            if self.halved or self.arrangement.slots == 1:
                raise InputError(f"{what}; give fewer slots, or smaller batches") from error
        self.halved, half = True, self.arrangement.slots // 2
        log.warning("%s; going on with %d slots", what, half)
        self.rearrange(replace(self.arrangement, slots=half))
        return self.train_or_halve(job)

    def _require_once(self, job: Job) -> None:
        """InputError for a client that comes twice, where it has one row or one clipped message."""
        plan, name = job.plan, self.algorithm.name
        rows, private = job.table is not None, self.algorithm.privacy is not None
        if (rows or private) and plan.occurrence.any():
            twice = self.data.client_ids[int(plan.client[plan.occurrence.argmax()])]
            why = f"{name} keeps one row for each client" if rows else f"{name} counts it once"
            raise InputError(
                f"round {job.round + 1}: client {twice!r} stands more than once in the cohort, and "
                f"{why}; draw without replacement"
            )

    def share(self, plan: Plan) -> list[np.ndarray]:
        """Which clients each worker trains, as positions in the cohort; longest first.

        Where slots take their steps together, the longest slot counts, else the sum of steps.
        """
        together = 1 if self.arrangement.backend == "loop" else self.arrangement.slots
        return share(plan.steps, len(self.workers), together)

    def _do(self, jobs: Sequence[Job]) -> list[Fold]:
        """What comes of the jobs, each done by a thread; where one fails, the others stop too."""
        self.stop.clear()
        if len(jobs) == 1:
            return [self.workers[0].train(jobs[0], self.stop)]
        pairs = zip(self.workers, jobs, strict=True)
        futures = [self.pool.submit(worker.train, job, self.stop) for worker, job in pairs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            self.stop.set()
            return [future.result() for future in futures]
        finally:
            self.stop.set()
            wait(futures)
