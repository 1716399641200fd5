"""Who takes part in a round, and which of them this rank trains."""

from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vecfl.data import FederatedDataset
from vecfl.delays import Delay
from vecfl.mesh import Mesh
from vecfl.participation import Trace, checked, checked_dropout, lost
from vecfl.sampling import Sampler
from vecfl.schedule import Batches, Plan, make_plan, share


@dataclass(frozen=True)
class Cohort:
    """The clients of a round.

    drawn    how many were drawn; those of `plan` are not lost
    plan     what each of them does
    mine     [c] positions in the plan of those that this rank trains, longest first shared out
    """

    drawn: int
    plan: Plan
    mine: np.ndarray

    @property
    def clients(self) -> Tensor:
        """Positions [C] in the dataset."""
        return torch.from_numpy(self.plan.client)


class Cohorts:
    """The cohorts of a run, by seeds and round alone.

    seeds    of cohorts, and of what clients do
    dropout  of clients: a probability or a trace, as in `Simulation`
    delay    of their messages
    """

    def __init__(
        self,
        sampler: Sampler,
        data: FederatedDataset,
        batches: Batches,
        seeds: tuple[int, int],
        dropout: float | Trace,
        delay: Delay | None,
        mesh: Mesh,
    ) -> None:
        self.sampler, self.dropout = sampler, checked_dropout(dropout)
        (self.seed, self.work_seed), self.delay = seeds, delay
        batches.check(data.offsets)
        if delay is not None:
            delay.check(data.num_clients)
        self.offsets, self.population, self.batches = data.offsets, data.num_clients, batches
        self.mesh, self.asked = mesh, dict[int, Cohort]()
        self.first = self._first()

    def draw(self, round: int) -> Tensor:
        """Positions [C] of the clients that are drawn for a round (from 0), lost ones too.

        Raises InputError if they are no positions of clients.
        """
        everyone = torch.ones(self.population, dtype=torch.bool)
        return checked(self.sampler(everyone, self.seed, round), self.population, round)

    def large(self) -> Tensor:
        """As many clients as a rank trains of a large cohort; slots and choices go by them.

        Of the first cohort where three have the same size, else of the largest of ten; of some
        clients with examples where all of these are empty.
        """
        some = max(self.first, key=len)
        if not len(some):
            some = self.offsets.diff().nonzero().flatten()[:100]
        return some[: -(-len(some) // self.mesh.size)]

    def most(self) -> int:
        """Clients that a cohort can have: as the first, or all of them where sizes differ."""
        sizes = {*map(len, self.first)}
        return max(sizes) if len(sizes) == 1 and 0 not in sizes else max(self.population, *sizes)

    def _first(self) -> list[Tensor]:
        """The cohorts of the first rounds: three, or ten where sizes differ."""
        cohorts = [self.draw(0)]
        with suppress(Exception):  # a sampler may end with the run
            while len(cohorts) < 3 or (len({*map(len, cohorts)}) > 1 and len(cohorts) < 10):
                cohorts.append(self.draw(len(cohorts)))
        return cohorts

    def ask(self, round: int) -> Tensor:
        """The clients [c] that this rank trains; `take` gives the whole cohort then."""
        drawn = self.draw(round)
        gone = lost(self.dropout, drawn, self.population, self.seed, round)
        members, seed = drawn[~gone], self.work_seed
        plan = make_plan(self.batches, self.offsets, members, seed=seed, round=round)
        if self.delay is not None:
            plan = replace(plan, delay=self.delay.of(members, round, seed))
        cohort = Cohort(len(drawn), plan, share(plan.steps, self.mesh.size)[self.mesh.rank])
        recent = {r: c for r, c in self.asked.items() if r == round - 1}  # which trains meanwhile
        self.asked = recent | {round: cohort}
        return cohort.clients[cohort.mine]

    def take(self, round: int) -> Cohort:
        """The cohort of a round that was asked for."""
        return self.asked[round]
