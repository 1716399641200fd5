"""What a worker is given, and what it gives back: a job, and a fold."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from vecfl.aggregate import Aggregate, merge_
from vecfl.aggregator import Kept
from vecfl.algorithms.base import Server
from vecfl.geometry import Part
from vecfl.losses import Batch
from vecfl.schedule import Plan
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
    kept          what they sent, for an aggregator
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
    kept: list[Kept] = field(default_factory=list)
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
        self.kept += other.kept
        self.began = min(self.began, other.began)
        self.busy += other.busy
