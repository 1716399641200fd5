"""A worker: one thread's slots and backend, which train clients and fold what they send."""

from dataclasses import dataclass, field
from threading import Event

import torch
from torch import Tensor

from vecfl.aggregate import Aggregate, add_, empty, merge_
from vecfl.algorithms import Algorithm, Finished, Starting
from vecfl.algorithms.base import Server
from vecfl.engine import Slots, make_backend, make_update
from vecfl.losses import Batch
from vecfl.schedule import Plan
from vecfl.table import Table
from vecfl.tape import Tape
from vecfl.task import Task

# Bytes of finished rows that are folded at a time: they stay in a CPU's cache, or take little of a
# GPU's memory.
COMMIT = {"cpu": 1 << 22, "cuda": 1 << 28}


@dataclass
class Fold:
    """What a round gathers while clients finish: the aggregate, and small tensors per commit.

    clients, ok   [K] positions in the dataset, and whether loss and update were finite
    sums, weight  [K, 2] loss and loss weight, [K] weight in the aggregate
    executed      slot-steps, idle ones included
    """

    aggregate: Aggregate
    clients: list[Tensor] = field(default_factory=list)
    ok: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    weight: list[Tensor] = field(default_factory=list)
    executed: int = 0

    def merge_(self, other: "Fold") -> None:
        """Take in what another worker gathered."""
        merge_(self.aggregate, other.aggregate)
        self.clients += other.clients
        self.ok += other.ok
        self.sums += other.sums
        self.weight += other.weight
        self.executed += other.executed


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
    def train(
        self,
        server: Server,
        round: int,
        cohort: Tensor,
        plan: Plan,
        columns: Batch,
        grid: float | None = None,
        table: Table | None = None,
        stop: Event | None = None,
    ) -> Fold:
        """Train `cohort` [C] (positions in the dataset) from the server's state.

        columns [n, ...] are on the device; `plan.first` says where those of a client begin. `grid`
        makes sums exact. Without a table, rows of clients are zero, and nobody keeps the new ones.

        Ends between two blocks when `stop` is set.
        """
        rule, slots = self.algorithm.rule, self.slots
        tape = Tape(plan, rule.batches, slots.number, seed=self.seed, round=round, draws=self.draws)
        update = make_update(rule, self.layout.param_views(server["w"]), round)
        fold = Fold(empty(self.layout.size, self.device, grid))
        examples = torch.from_numpy(plan.n)
        for idle in torch.from_numpy(tape.idle).split(slots.number):
            seats = torch.arange(len(idle))
            self._seat(server, seats, cohort[idle], table)
            self._commit(server, seats, cohort[idle], examples[idle], fold, table)
        for block in tape.blocks():
            if stop is not None and stop.is_set():
                break
            seats, at = map(torch.from_numpy, block.starts)
            if len(seats):
                self._seat(server, seats, cohort[at], table)
            fold.executed += self.backend.run_(slots, block, columns, update)
            seats, at = map(torch.from_numpy, block.finishes)
            if len(seats):
                self._commit(server, seats, cohort[at], examples[at], fold, table)
        return fold

    def _seat(self, server: Server, seats: Tensor, clients: Tensor, table: Table | None) -> None:
        """Let `clients` [k] begin in the slots `seats` [k]."""
        starting = Starting(self._send(clients), self._gather(table, clients))
        begin = self.algorithm.begin(server, starting)
        self.slots.start_(self._send(seats), begin.model, begin.bias)

    def _commit(
        self,
        server: Server,
        seats: Tensor,
        clients: Tensor,
        examples: Tensor,
        fold: Fold,
        table: Table | None,
    ) -> None:
        """Fold the messages of the clients that have finished in `seats` [K]."""
        seats, order = seats.sort()  # neighbours need no copy
        columns = (t.split(self.rows) for t in (seats, clients[order], examples[order]))
        for some, client, n in zip(*columns, strict=True):
            done = self._finished(some, client, n, self._gather(table, client))
            upload = self.algorithm.upload(server, done)
            update, weight = upload.update, upload.weight.double()
            sent = [update, *(rows[..., None].flatten(1) for rows in upload.table.values())]
            ok = sum((t.sum(1) for t in sent), done.loss).isfinite()  # a finite sum, finite terms
            if not (ok.is_cpu and ok.all()):  # asking a GPU would wait for it
                ok = done.loss.isfinite()
                for t in sent:
                    ok = ok & t.abs().amax(1).isfinite()
                update = update.where(ok[:, None], 0)  # a weight of 0 is not enough: 0 * nan is nan
                weight = weight.where(ok, 0)
            if table is not None:
                self._scatter(table, client, upload.table, ok.cpu())
            add_(fold.aggregate, update, weight)
            fold.clients.append(client)
            fold.ok.append(ok)
            fold.sums.append(torch.stack((done.loss, done.weight), 1))
            fold.weight.append(weight.clone())  # it may be a view of the slots

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

    def _finished(
        self, seats: Tensor, clients: Tensor, examples: Tensor, table: dict[str, Tensor]
    ) -> Finished:
        """The rows of `seats` [K], ascending: views of slots that are neighbours, else copies."""
        slots = self.slots
        first, end = (int(seats[0]), int(seats[-1]) + 1) if len(seats) else (0, 0)
        where = slice(first, end) if end - first == len(seats) else self._send(seats)
        sums = slots.sums[where]
        return Finished(
            model=slots.flat[where],
            state=[t[where] for t in slots.state],
            bias=None if slots.bias is None else slots.bias[where],
            client=self._send(clients),
            examples=self._send(examples),
            loss=sums[:, 0],
            weight=sums[:, 1],
            seen=slots.seen[where],
            table=table,
        )

    def _send(self, column: Tensor) -> Tensor:
        """A column on the device, without waiting for the steps that are queued there."""
        return column.to(self.device, non_blocking=True)
