"""A worker: one thread's slots and backend, which train clients and fold what they send."""

import time
from dataclasses import dataclass, field, replace
from threading import Event

import numpy as np
import torch
from torch import Tensor

from vecfl.aggregate import Aggregate, add_, add_extra_, empty, merge_
from vecfl.algorithms import Algorithm, Finished, Round, Starting, Upload
from vecfl.algorithms.base import Server
from vecfl.engine import Slots, make_backend, make_update
from vecfl.geometry import Part, measure
from vecfl.losses import Batch
from vecfl.schedule import Plan
from vecfl.table import Table
from vecfl.tape import Tape
from vecfl.task import Task

# Bytes of finished rows that are folded at a time: they stay in a CPU's cache, or take little of a
# GPU's memory.
COMMIT = {"cpu": 1 << 22, "cuda": 1 << 28}


@dataclass(frozen=True)
class Job:
    """Clients to train in a round.

    server   the state that they begin from; round: from 0
    plan     who they are and what they do
    columns  [n, ...] on the device; `plan.first` says where the examples of a client begin
    grid     what makes sums exact (`vecfl.aggregate.exact_grid`), None for plain ones
    table    what clients keep; without one their rows are zero, and nobody keeps the new ones
    sampled  [C] of the cohort, by place, whose updates are kept; None: updates are not measured
    """

    server: Server
    round: int
    plan: Plan
    columns: Batch
    grid: float | None = None
    table: Table | None = None
    sampled: np.ndarray | None = None

    @property
    def clients(self) -> Tensor:
        """Positions [C] in the dataset."""
        return torch.from_numpy(self.plan.client)

    def of(self, members: np.ndarray) -> "Job":
        """The part of some clients, given as positions [k] in the plan."""
        return replace(self, plan=self.plan.of(members))


@dataclass
class Fold:
    """What a round gathers while clients finish: the aggregate, and small tensors per commit.

    clients, ok   [K] positions in the dataset, and whether loss and update were finite
    sums, weight  [K, 2] loss and loss weight, [K] weight in the aggregate
    executed      slot-steps, idle ones included
    updates       what is measured of them, if the job asks for it
    bytes         [K] int64 of what they sent, finite or not
    began, busy   when the first worker began, and the seconds of each
    """

    aggregate: Aggregate
    clients: list[Tensor] = field(default_factory=list)
    ok: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    weight: list[Tensor] = field(default_factory=list)
    executed: int = 0
    updates: list[Part] = field(default_factory=list)
    bytes: list[Tensor] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    busy: list[float] = field(default_factory=list)

    def merge_(self, other: "Fold") -> None:
        """Take in what another worker gathered."""
        merge_(self.aggregate, other.aggregate)
        self.clients += other.clients
        self.ok += other.ok
        self.sums += other.sums
        self.weight += other.weight
        self.executed += other.executed
        self.updates += other.updates
        self.bytes += other.bytes
        self.began = min(self.began, other.began)
        self.busy += other.busy


class Worker:
    """Trains clients in `slots` slots; its module is its own, so it serves one thread at a time.

    task is on the device; example holds three batches, which the backend may try. Raises InputError
    if it cannot train the module.
    """

    def __init__(
        self,
        task: Task,
        example: Batch,
        algorithm: Algorithm,
        *,
        backend: str,
        slots: int,
        seed: int,
    ) -> None:
        self.algorithm, self.seed = algorithm, seed
        self.layout, self.draws = task.layout, task.keyed
        weight = next(task.module.parameters())
        self.device = weight.device
        self.slots = Slots(task.layout, algorithm.rule, slots, self.device, weight.dtype)
        self.backend = make_backend(backend, task, example)
        row = self.layout.size * weight.element_size()
        self.rows = max(1, COMMIT.get(self.device.type, 1 << 28) // row)
        self.kept = algorithm.table(task.layout.size)

    @torch.no_grad()  # grad mode belongs to a thread
    def train(self, job: Job, stop: Event | None = None) -> Fold:
        """Train the clients of `job`; ends between two blocks when `stop` is set."""
        began = time.perf_counter()
        rule, slots = self.algorithm.local(job.server, self.algorithm.rule), self.slots
        seed, draws = self.seed, self.draws
        tape = Tape(job.plan, rule.batches, slots.number, seed=seed, round=job.round, draws=draws)
        update = make_update(rule, self.layout.param_views(job.server["w"]), job.round)
        fold = Fold(empty(self.layout.size, self.device, job.grid), began=began)
        for idle in torch.from_numpy(tape.idle).split(slots.number):
            seats = torch.arange(len(idle))
            self._seat(job, seats, idle)
            self._commit(job, seats, idle, fold)
        for block in tape.blocks():
            if stop is not None and stop.is_set():
                break
            seats, members = map(torch.from_numpy, block.starts)
            if len(seats):
                self._seat(job, seats, members)
            fold.executed += self.backend.run_(slots, block, job.columns, update)
            seats, members = map(torch.from_numpy, block.finishes)
            if len(seats):
                self._commit(job, seats, members, fold)
        fold.busy.append(time.perf_counter() - began)
        return fold

    def _seat(self, job: Job, seats: Tensor, members: Tensor) -> None:
        """Let clients, at `members` [k] in the plan, begin in the slots `seats` [k]."""
        clients = job.clients[members]
        rows = self._gather(job.table, clients)
        starting = Starting(self._round(job), self._send(clients), rows)
        begin = self.algorithm.begin(job.server, starting)
        self.slots.start_(self._send(seats), begin.model, begin.bias)

    def _commit(self, job: Job, seats: Tensor, members: Tensor, fold: Fold) -> None:
        """Fold the messages of the clients, at `members` [K] in the plan, that end in `seats`."""
        seats, order = seats.sort()  # neighbours need no copy
        parts = (seats.split(self.rows), members[order].split(self.rows))
        for some, who in zip(*parts, strict=True):
            done, clients = self._finished(job, some, who), job.clients[who]
            upload = self.algorithm.upload(job.server, done)
            ok, upload = finite(done, upload)
            if job.table is not None:
                self._scatter(job.table, clients, upload.table, ok.cpu())
            add_(fold.aggregate, upload.update, upload.weight, upload.log_weight)
            add_extra_(fold.aggregate, upload.extra)
            fold.clients.append(clients)
            fold.ok.append(ok)
            fold.sums.append(torch.stack((done.loss, done.weight), 1))
            fold.weight.append(upload.weight.clone())  # it may be a view of the slots
            fold.bytes.append(sizes(upload))
            if job.sampled is not None:
                place = job.plan.place[who.numpy()]
                fold.updates.append(measure(upload.update, upload.weight, place, job.sampled))

    def _gather(self, table: Table | None, clients: Tensor) -> dict[str, Tensor]:
        """The rows of clients [K] in the table, on the device."""
        if table is not None:
            return {name: self._send(rows) for name, rows in table.gather(clients).items()}
        zero = self.slots.flat.new_zeros
        return {name: zero(len(clients), *shape) for name, shape in self.kept.items()}

    def _scatter(self, table: Table, clients: Tensor, rows: dict[str, Tensor], ok: Tensor) -> None:
        """Write the rows of those clients [K] that are `ok` [K], on the CPU."""
        rows = {name: values.cpu() for name, values in rows.items()}
        if not ok.all():
            clients, rows = clients[ok], {name: values[ok] for name, values in rows.items()}
        table.scatter(clients, rows)

    def _finished(self, job: Job, seats: Tensor, members: Tensor) -> Finished:
        """The rows of `seats` [K], ascending: views of slots that are neighbours, else copies."""
        slots, clients = self.slots, job.clients[members]
        first, end = (int(seats[0]), int(seats[-1]) + 1) if len(seats) else (0, 0)
        where = slice(first, end) if end - first == len(seats) else self._send(seats)
        sums = slots.sums[where]
        return Finished(
            round=self._round(job),
            model=slots.flat[where],
            state=[t[where] for t in slots.state],
            bias=None if slots.bias is None else slots.bias[where],
            client=self._send(clients),
            occurrence=self._send(torch.from_numpy(job.plan.occurrence)[members]),
            examples=self._send(torch.from_numpy(job.plan.n)[members]),
            loss=sums[:, 0],
            weight=sums[:, 1],
            seen=slots.seen[where],
            table=self._gather(job.table, clients),
            statistics=None if slots.statistics is None else slots.statistics.of(where),
        )

    def _round(self, job: Job) -> Round:
        return Round(job.round, self.seed, self.layout)

    def _send(self, column: Tensor) -> Tensor:
        """A column on the device, without waiting for the steps that are queued there."""
        return column.to(self.device, non_blocking=True)


def sizes(upload: Upload) -> Tensor:
    """The bytes [K] of what clients send."""
    if upload.bytes is not None:
        return upload.bytes
    clients, numbers = upload.update.shape
    size = numbers * upload.update.element_size()
    return torch.full((clients,), size, dtype=torch.int64, device=upload.update.device)


def finite(done: Finished, upload: Upload) -> tuple[Tensor, Upload]:
    """Which clients [K] are finite, and what they upload; all others upload zeros."""
    weight = upload.weight.double()
    sent = [upload.update, *(rows[..., None].flatten(1) for rows in upload.table.values())]
    if (logs := upload.log_weight) is not None:
        sent.append(logs[:, None])
    ok = sum((t.sum(1) for t in sent), done.loss + weight).isfinite()  # a finite sum, finite terms
    if ok.is_cpu and ok.all():  # asking a GPU would wait for it
        return ok, replace(upload, weight=weight)
    ok = done.loss.isfinite() & weight.isfinite()
    for t in sent:
        ok = ok & t.abs().amax(1).isfinite()
    # a weight of 0 is not enough: 0 * nan is nan
    update, weight = upload.update.where(ok[:, None], 0), weight.where(ok, 0)
    extra = {name: values.where(ok, 0) for name, values in upload.extra.items()}
    logs = None if logs is None else logs.where(ok, 0)
    return ok, replace(upload, update=update, weight=weight, extra=extra, log_weight=logs)
