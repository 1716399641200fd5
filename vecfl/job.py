"""What a worker is given, and what it gives back: a job, and a fold."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecfl.aggregate import Aggregate, merge_
from vecfl.aggregator import Kept
from vecfl.algorithms.base import Server
from vecfl.geometry import Part
from vecfl.losses import Batch
from vecfl.schedule import Plan, packed
from vecfl.table import Table


@dataclass(frozen=True)
class Job:
    """Clients to train in a round.

    server   the state that they begin from; round: from 0
    plan     who they are and what they do
    columns  [n, ...] on the device; `plan.first` says where the examples of a client begin
    grid     what makes sums exact (`vecfl.aggregate.exact_grid`), None for plain ones
    table    what clients keep; without one their rows are zero, and nobody keeps the new ones
    sampled  [C] of the cohort, by place, whose updates are kept; None: updates are not measured
    before   {place in the cohort: row [P]} of the pass before, on the CPU
    keep     where such rows go, in that pass: nothing is added up; None: it is the last pass
    numbers  of the local rule in this round: the trainer's, so that they are those of all workers
    """

    server: Server
    round: int
    plan: Plan
    columns: Batch
    grid: float | None = None
    table: Table | None = None
    sampled: np.ndarray | None = None
    before: Mapping[int, Tensor] | None = None
    keep: dict[int, Tensor] | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def clients(self) -> Tensor:
        """Positions [C] in the dataset."""
        return torch.from_numpy(self.plan.client)

    def of(self, members: np.ndarray) -> "Job":
        """The part of some clients, given as positions [k] in the plan."""
        return replace(self, plan=self.plan.of(members))

    def packed(self) -> "Job":
        """The same with columns of the examples of its clients alone, each client's once."""
        plan = self.plan
        index, first = packed(plan.client, plan.first, plan.total)
        some = torch.from_numpy(index)
        columns = {name: column.index_select(0, some) for name, column in self.columns.items()}
        return replace(self, plan=replace(plan, first=first), columns=columns)


@dataclass
class Ended:
    """What is told of the clients that have ended, in that order.

    client, ok    [K] positions in the dataset, on the CPU; whether loss and update were finite
    sums, weight  [K, 2] loss and loss weight, [K] weight in the aggregate, float64
    bytes         [K] int64 of what they sent, finite or not
    """

    client: Tensor
    ok: Tensor
    sums: Tensor
    weight: Tensor
    bytes: Tensor

    @classmethod
    def empty(cls, clients: int, device: torch.device) -> "Ended":
        """Room for so many.

        It is made at once: small tensors that stay, among large ones that come and go, would leave
        malloc holes that it cannot use, and more of them the larger the cohort.
        """
        client = torch.empty(clients, dtype=torch.int64)
        ok = torch.empty(clients, dtype=torch.bool, device=device)
        sums = torch.empty(clients, 2, dtype=torch.float64, device=device)
        weight, sent = torch.empty_like(sums[:, 0]), torch.empty_like(client, device=device)
        return cls(client, ok, sums, weight, sent)

    def of(self, some: slice) -> "Ended":
        return Ended(*(getattr(self, f.name)[some] for f in fields(self)))


@dataclass
class Fold:
    """What a round gathers while clients finish: the aggregate, and what is told of them.

    room, ended   room for all clients of the job, and how many have ended
    executed      slot-steps, idle ones included
    updates       what is measured of them, if the job asks for it
    kept          what they sent, for an aggregator
    began, busy   when the first worker began, and the seconds of each
    lr            that the clients trained with
    """

    aggregate: Aggregate
    room: Ended
    ended: int = 0
    executed: int = 0
    updates: list[Part] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    busy: list[float] = field(default_factory=list)
    lr: float = math.nan

    @property
    def told(self) -> Ended:
        """Of the clients that have ended."""
        return self.room.of(slice(self.ended))

    def tell(self, told: Ended) -> None:
        """Add what is told of some clients."""
        end = self.ended + len(told.client)
        room = self.room.of(slice(self.ended, end))
        for f in fields(told):
            getattr(room, f.name).copy_(getattr(told, f.name), non_blocking=True)
        self.ended = end

    def merge_(self, other: "Fold") -> None:
        """Take in what another worker gathered."""
        merge_(self.aggregate, other.aggregate)
        both = (self.told, other.told)
        self.room = Ended(
            *(torch.cat([getattr(one, f.name) for one in both]) for f in fields(Ended))
        )
        self.ended += other.ended
        self.executed += other.executed
        self.updates += other.updates
        self.kept += other.kept
        self.began = min(self.began, other.began)
        self.busy += other.busy
