"""How long a round takes by an arrangement: short parts of the first, on the real task and data."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vecfl.algorithms import Algorithm
from vecfl.arrangement import Arrangement, no_processes
from vecfl.choices import machine
from vecfl.data import FederatedDataset
from vecfl.engine import CACHE, LocalRule, VmapBackend, slot_count
from vecfl.errors import InputError
from vecfl.feed import Examples
from vecfl.job import Job
from vecfl.schedule import Plan, assign
from vecfl.task import Task
from vecfl.trainer import Trainer
from vecfl.trial import first_line

log = logging.getLogger("vecfl")

LONG = 0.3  # seconds: a part of a round that takes as long is timed once, shorter ones three times


@dataclass
class Probe:
    """What an arrangement is tried on: everything of a simulation, and its first cohort [C].

    fetch    gives the examples of a cohort on the device; measurements do not count it
    seconds  what a round is expected to take, for the arrangements tried
    """

    task: Task
    data: FederatedDataset
    algorithm: Algorithm
    cohort: Tensor
    seed: int
    fetch: Callable[[Tensor], Examples]
    seconds: dict[Arrangement, float] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(self.task.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.task.module.parameters()).dtype

    @property
    def cores(self) -> int:
        """Threads that torch may use; on a GPU one, which launches."""
        return torch.get_num_threads() if self.device.type == "cpu" else 1

    @property
    def forks(self) -> bool:
        """Whether workers can be processes."""
        return not no_processes(self.algorithm, self.task.layout)

    def slots(self, backend: str, workers: int) -> int:
        """The slots of each worker by the rule: what the CPU's cache or the GPU's memory holds."""
        on_gpu = self.device.type == "cuda" and backend != "loop"
        return slot_count(
            self.task,
            self.algorithm.rule,
            -(-len(self.cohort) // workers),
            self.data.examples(2),
            cache=None if on_gpu else CACHE[backend],
            before=self.before,
        )

    @property
    def before(self) -> LocalRule | None:
        """How clients pass over their examples before they train."""
        return None if self.algorithm.before is None else self.algorithm.before.rule

    def facts(self) -> dict[str, object]:
        """What the fastest arrangement may depend on; no seed and no learning rate is among it."""
        columns = {name: (c.dtype, c.shape[1:]) for name, c in self.data.columns.items()}
        return (
            machine(self.device)
            | {
                "model": repr(self.task.module),
                "row": self.task.layout,
                "loss": getattr(self.task.loss, "__qualname__", ""),
                "dtype": self.dtype,
                "augment": [
                    getattr(t, "__qualname__", type(t).__qualname__) for t in self.task.augment
                ],
                "columns": columns,
                "population": (self.data.num_clients, int(self.data.offsets[-1])),
                "cohort": 1 << (len(self.cohort) - 1).bit_length(),  # sizes vary, by the seed too
                "rule": replace(self.algorithm.rule, lr=0.0),
                "before": self.before,
            }
            | ({} if (noise := self.algorithm.rule.examples) is None else {"examples": noise})
        )

    def fastest(self) -> Arrangement:
        """The best of those tried."""
        return min(self.seconds, key=self.seconds.__getitem__)

    def drop(self, backend: str) -> None:
        """Forget what was measured with a backend."""
        self.seconds = {a: s for a, s in self.seconds.items() if a.backend != backend}

    @cached_property
    def examples(self) -> Examples:
        """Those of the cohort."""
        return self.fetch(self.cohort)

    def plan(self, trainer: Trainer) -> Plan:
        """What the cohort does in a round."""
        return replace(trainer.plan(self.cohort), first=self.examples.first)

    def trainer(self, arrangement: Arrangement) -> Trainer:
        return Trainer(self.task, self.data, self.algorithm, arrangement, self.seed)

    def require_rules(self, backend: str) -> None:
        """InputError, in torch's words, where vmap would take an operator client by client."""
        if backend == "vmap":
            rule = self.algorithm.rule
            slow = VmapBackend(self.task, self.data.examples(3), rule.examples).slow
            if slow:
                raise InputError(slow[0])

    def time(self, arrangement: Arrangement) -> None:
        """Time growing parts of the first round, and scale to the slot-steps of all of it.

        What fails is out, and said so, if another was timed before: the first must not fail.
        """
        if arrangement in self.seconds:
            return
        trainer = self.trainer(arrangement)
        rate = math.nan
        try:
            with torch.no_grad():
                for plan, work in self._parts(trainer):
                    if rate * work > LONG:
                        break
                    rate = self._clock(trainer, plan) / work
        except torch.OutOfMemoryError:  # too many slots for this GPU
            rate = math.inf
        except Exception as error:
            if not self.seconds:
                raise
            log.info("%s is out: %s", arrangement, first_line(error))
            return
        self.seconds[arrangement] = rate * slot_steps(trainer, self.plan(trainer))

    def _parts(self, trainer: Trainer) -> Iterator[tuple[Plan, int]]:
        """Two steps of a client for each slot, all steps of these, the whole cohort."""
        plan = self.plan(trainer)
        seats = trainer.arrangement.workers * trainer.arrangement.slots
        few = plan.of(np.flatnonzero(plan.steps)[:seats])
        for part in (replace(few, steps=few.steps.clip(max=2)), few, plan):
            yield part, max(1, slot_steps(trainer, part))

    def _clock(self, trainer: Trainer, plan: Plan) -> float:
        """Seconds that a part takes, without what only the first call pays."""
        weight = self.task.layout.flatten(self.task.module)
        server, shortest = self.algorithm.init(weight, self.task.layout), math.inf
        for _ in range(3):
            began = time.perf_counter()
            trainer.train(Job(server, 0, plan, self.examples.columns))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            shortest = min(shortest, time.perf_counter() - began)
            if shortest > LONG:
                break
        return shortest

    def disagreement(self, arrangement: Arrangement) -> float:
        """How far it is from the loop on one worker, in float64, relative to the largest number.

        Two clients a worker take two steps, or an epoch where gradients accumulate that long.
        """
        task, sums = self.task.to(self.device, torch.float64), []
        most = np.iinfo(np.int64).max if self.algorithm.rule.batches.full else 2
        for a in (replace(arrangement, slots=2), Arrangement("loop", 1, 1, 1)):
            trainer = Trainer(task, self.data, self.algorithm, a, self.seed)
            plan = self.plan(trainer)
            few = plan.of(np.flatnonzero(plan.steps)[: 2 * arrangement.workers])
            part = replace(few, steps=few.steps.clip(max=most))
            server = self.algorithm.init(task.layout.flatten(task.module), task.layout)
            job = Job(server, 0, part, self.examples.columns)
            with torch.no_grad():
                sums.append(trainer.train(job).aggregate.total)
        found, right = sums
        largest = right.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        return float((found - right).abs().max() / largest)


def slot_steps(trainer: Trainer, plan: Plan) -> int:
    """Steps that the slots execute.

    Those of clients; where slots step together, of a second one beside the last client, and under
    graphs of all slots, until the last client ends.
    """
    how, idle = trainer.arrangement, 0
    if how.backend == "loop":
        return int(plan.steps.sum())
    for members in trainer.share(plan):
        steps, ends = plan.steps[members], np.zeros(how.slots, np.int64)
        slot, begin = assign(steps, how.slots)
        np.maximum.at(ends, slot[slot >= 0], (begin + steps)[slot >= 0])
        ends.sort()
        idle += int(ends[-1] * how.slots - ends.sum() if how.graphs else ends[-1] - ends[-2:][0])
    return int(plan.steps.sum()) + idle
