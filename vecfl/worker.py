"""A worker: one thread's slots and backend, which train clients and fold what they send."""

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vecfl.aggregate import Aggregate, add_, add_extra_, empty, late_
from vecfl.aggregator import keep
from vecfl.algorithms import Algorithm, Finished, Round, Starting, Upload
from vecfl.algorithms.base import Server
from vecfl.algorithms.dp_sgd import unseen
from vecfl.engine import Slots, make_backend, make_graphs, make_update
from vecfl.geometry import measure
from vecfl.job import Ended, Fold, Job
from vecfl.losses import Batch
from vecfl.one_batch import one_batch
from vecfl.privacy.events import PASSES
from vecfl.processes import Stop
from vecfl.schedule import Plan
from vecfl.table import Table
from vecfl.tape import Tape
from vecfl.task import Task

# Bytes of finished rows that are folded at a time: they stay in a CPU's cache, or take little of a
# GPU's memory.
COMMIT = {"cpu": 1 << 23, "cuda": 1 << 28}


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
        clients: int,
        graphs: bool = False,
    ) -> None:
        self.algorithm, self.seed, self.clients, self.lr = algorithm, seed, clients, 0.0
        rule, self.layout, self.batches = algorithm.rule, task.layout, algorithm.rule.batches
        self.draws = task.keyed or rule.examples is not None
        weight = next(task.module.parameters())
        self.device = weight.device
        self.slots = Slots(task.layout, rule, slots, self.device, weight.dtype)
        self.backend = make_backend(backend, task, example, rule.examples)
        self.graphs = make_graphs(self.slots, rule, backend) if graphs else None
        row = self.layout.size * weight.element_size()
        self.rows = max(1, COMMIT.get(self.device.type, 1 << 28) // row)
        one = task, example, algorithm, slots, seed, clients
        self.one = one_batch(*one) if backend.startswith("stacked") else None
        self.kept = algorithm.table(task.layout)
        self.message = task.layout.of_message(algorithm.messages).size

    @torch.no_grad()  # grad mode belongs to a thread
    def train(self, job: Job, stop: Stop | None = None) -> Fold:
        """Train the clients of `job`; ends between two blocks when `stop` is set."""
        began = time.perf_counter()
        rule, slots = replace(self.algorithm.rule, **job.numbers), self.slots
        self.lr, seed, draws = rule.lr_of(job.round), self.seed, self.draws
        room = Ended.empty(len(job.plan.steps), self.device)
        fold = Fold(empty(self.message, self.device, job.grid), room, began=began, lr=self.lr)
        if self.one is not None:
            job = job.of(self.one.train(job, self.lr, fold, stop))
        tape = Tape(job.plan, rule.batches, slots.number, seed=seed, round=job.round, draws=draws)
        if self.graphs is not None:
            update = self.graphs.update(rule, job.round, job.server["w"])
        else:
            update = make_update(rule, self.layout.param_views(job.server["w"]), job.round)
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
        self.slots.start_(self._where(seats), begin.model, begin.bias)

    def _commit(self, job: Job, seats: Tensor, members: Tensor, fold: Fold) -> None:
        """Fold the messages of the clients, at `members` [K] in the plan, that end in `seats`."""
        seats, order = seats.sort()  # neighbours need no copy
        parts = (seats.split(self.rows), members[order].split(self.rows))
        for some, who in zip(*parts, strict=True):
            done, clients = self._finished(job, some, who), job.clients[who]
            seen = done if self.algorithm.examples is None else unseen(done)
            upload = self.algorithm.upload(job.server, seen)
            place = job.plan.place[who.numpy()]
            if job.keep is not None:
                job.keep.update(zip(place.tolist(), upload.update.cpu(), strict=True))
                continue
            ok, upload = finite(done, upload)
            if job.table is not None:
                self._scatter(job.table, clients, done.table, upload.table, ok)
            fold_(fold.aggregate, upload, job.plan.delay[who.numpy()])
            sums = torch.stack((done.loss, done.weight), 1)
            fold.tell(Ended(clients, ok, sums, upload.weight, sizes(upload)))
            if self.algorithm.aggregator is not None:
                fold.kept.append(keep(place, upload))
            if job.sampled is not None:
                update = upload.update[:, : self.layout.size]
                fold.updates.append(measure(update, upload.weight, place, job.sampled))

    def _gather(self, table: Table | None, clients: Tensor) -> dict[str, Tensor]:
        """The rows of clients [K] in the table, on the device."""
        if table is not None:
            return {name: self._send(rows) for name, rows in table.gather(clients).items()}
        zero = self.slots.flat.new_zeros
        return {name: zero(len(clients), *shape) for name, shape in self.kept.items()}

    def _scatter(self, table: Table, clients: Tensor, old: Server, new: Server, ok: Tensor) -> None:
        """Write the rows of clients [K]: old ones, but for PASSES, of those not `ok` [K]."""
        if not ok.all():
            new = {n: t if n == PASSES else t.where(like(ok, t), old[n]) for n, t in new.items()}
        table.scatter(clients, {name: rows.cpu() for name, rows in new.items()})

    def _finished(self, job: Job, seats: Tensor, members: Tensor) -> Finished:
        """The rows of `seats` [K]: views of slots that are neighbours, else copies."""
        slots, clients, where = self.slots, job.clients[members], self._where(seats)
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
            steps=self._send(torch.from_numpy(job.plan.updates(self.batches))[members]),
            lr=self.lr,
            before=None if job.before is None else self._before(job.before, job.plan, members),
        )

    def _before(self, rows: Mapping[int, Tensor], plan: Plan, members: Tensor) -> Tensor:
        """What clients, at `members` [K] in the plan, sent in the pass before: [K, P]."""
        found = [rows[place] for place in plan.place[members.numpy()].tolist()]
        return self._send(torch.stack(found) if found else torch.empty(0, self.layout.size))

    def _round(self, job: Job) -> Round:
        return Round(job.round, self.seed, self.layout, self.clients)

    def _where(self, seats: Tensor) -> Tensor | slice:
        """`seats` [k] as an index: a slice, which copies nothing, where they are neighbours."""
        first, end = (int(seats[0]), int(seats[0]) + len(seats)) if len(seats) else (0, 0)
        return slice(first, end) if seats.equal(torch.arange(first, end)) else self._send(seats)

    def _send(self, column: Tensor) -> Tensor:
        """A column on the device, without waiting for the steps that are queued there."""
        return column.to(self.device, non_blocking=True)


def like(ok: Tensor, rows: Tensor) -> Tensor:
    """ok [K] in as many dimensions as rows [K, ...]."""
    return ok.view(-1, *(1,) * (rows.dim() - 1))


def fold_(sums: Aggregate, upload: Upload, delay: np.ndarray) -> None:
    """Fold in messages, each among those that are `delay` [K] rounds on their way."""
    for rounds in sorted({0, *delay.tolist()}):
        part, into = upload, late_(sums, rounds)
        if delay.any():
            some = torch.from_numpy(np.flatnonzero(delay == rounds)).to(upload.update.device)
            logs = None if upload.log_weight is None else upload.log_weight[some]
            extra = {name: values[some] for name, values in upload.extra.items()}
            part = Upload(upload.update[some], upload.weight[some], {}, extra, logs)
        add_(into, part.update, part.weight, part.log_weight)
        add_extra_(into, part.extra)


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
