"""What a run releases, as an accountant counts it: mechanisms under laws of sampling.

Plain values: they stand in checkpoints, and nothing here needs the accountants' library.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from vecfl.errors import InputError

Law = Literal["poisson", "truncated", "fixed", "everyone"]
Mechanism = Literal["gaussian", "laplace"]
Accountant = Literal["pld", "rdp"]


@dataclass(frozen=True)
class Sampling:
    """Who takes part in a round, of a population of N clients.

    law       "poisson": each with probability `rate`; "truncated": so, and of more than `size` a
              uniformly random subset of that size; "fixed": a uniformly random subset of `size`;
              "everyone"
    rate      of "poisson" and "truncated"
    size      of "truncated" and "fixed"
    """

    law: Law
    rate: float = 1.0
    size: int = 0

    def __post_init__(self) -> None:
        if self.law not in get_args(Law):
            raise InputError(f"{self}: expected a law of {', '.join(get_args(Law))}")
        if not 0 <= self.rate <= 1:
            raise InputError(f"{self}: expected a rate from 0 to 1")
        if self.law in ("fixed", "truncated") and self.size < 1:
            raise InputError(f"{self}: expected a size of at least 1")

    def expected(self, population: int) -> float:
        """How many clients are drawn, in the mean; before any are cut off."""
        if self.law == "fixed":
            return float(self.size)
        return self.rate * population

    def thinned(self, lost: float) -> "Sampling":
        """The law where each of those drawn is lost with a probability, independently.

        Of a fixed number the law stays as it is, which only overstates what is spent.
        """
        lost = math.floor(lost * 2**32) / 2**32  # as clients are
        return replace(self, rate=self.rate * (1 - lost)) if self.law == "poisson" else self

    @property
    def relation(self) -> str:
        """Which populations are neighbours: one client more or less, or another in its place."""
        return "replace-one" if self.law == "fixed" else "add-or-remove-one"


@dataclass(frozen=True)
class Event:
    """One or more releases of the same kind.

    multiplier  standard deviation of the noise on the sum over the norm that messages are clipped
                to; of "laplace" the scale over the L1 norm
    population  N; times: how many releases
    """

    mechanism: Mechanism
    multiplier: float
    sampling: Sampling
    population: int
    times: int = 1


@dataclass(frozen=True)
class Population:
    """Clients that a simulation stands for: N, of whom `cohort` take part in a round."""

    clients: int
    cohort: float

    def __post_init__(self) -> None:
        if not 0 < self.cohort <= self.clients:
            raise InputError(f"{self}: expected a cohort of more than 0 and at most all clients")


@dataclass(frozen=True)
class Privacy:
    """What a private algorithm promises.

    multiplier  standard deviation of the noise on the sum, over the clipping norm
    cohort      the denominator: clients of a round, in the mean
    delta       at which epsilon is told
    stands_for  the population whose noise and accounting this run has; None: its own
    about       upload and server of the algorithm that promises: who replaces one has not promised
    """

    mechanism: Mechanism
    multiplier: float
    cohort: float
    delta: float
    accountant: Accountant | None = None
    stands_for: Population | None = None
    about: tuple[object, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        """The promise, as a run's facts and messages have it."""
        said = f"{self.mechanism}, noise multiplier {self.multiplier}, cohort {self.cohort}"
        said += f", delta {self.delta}, accountant {self.accountant or 'by the sampler'}"
        return said if self.stands_for is None else f"{said}, for {self.stands_for}"

    @property
    def smaller(self) -> float:
        """What the noise on a sum is multiplied by: on means it is that of the larger cohort."""
        return self.cohort / self.stands_for.cohort if self.stands_for else 1.0

    def event(self, sampling: Sampling, clients: int) -> Event:
        """What one round of a population releases."""
        if self.stands_for is None:
            return Event(self.mechanism, self.multiplier, sampling, clients)
        of = self.stands_for
        poisson = sampling.law in ("poisson", "truncated")
        drawn = replace(sampling, rate=of.cohort / of.clients) if poisson else sampling
        drawn = replace(drawn, size=round(of.cohort)) if sampling.law == "fixed" else drawn
        return Event(self.mechanism, self.multiplier, drawn, of.clients)


@dataclass(frozen=True)
class ExamplePrivacy:
    """What clients promise about single examples (`vecfl.dp_sgd`): Gaussian noise in every pass.

    multiplier  standard deviation of the noise on a batch's sum, over the clipping norm
    delta       at which epsilon is told
    """

    multiplier: float
    delta: float

    def after(self, passes: int) -> "Ledger":
        """What a client has released in so many passes over its examples."""
        event = Event("gaussian", self.multiplier, Sampling("everyone"), 1, passes)
        return (event,) if passes else ()


Ledger = tuple[Event, ...]
PASSES = "passes"  # the column of a table that counts them


def spend(ledger: Ledger, event: Event) -> Ledger:
    """The ledger after one more event; equal neighbours are counted together."""
    if ledger and replace(ledger[-1], times=event.times) == event:
        last = ledger[-1]
        return (*ledger[:-1], replace(last, times=last.times + event.times))
    return (*ledger, event)


def to_plain(ledger: Ledger) -> list[dict[str, object]]:
    """The ledger as a checkpoint holds it."""
    return [
        {
            "mechanism": e.mechanism,
            "multiplier": e.multiplier,
            "law": e.sampling.law,
            "rate": e.sampling.rate,
            "size": e.sampling.size,
            "population": e.population,
            "times": e.times,
        }
        for e in ledger
    ]


def from_plain(rows: Sequence[dict]) -> Ledger:
    """The ledger of a checkpoint; InputError where it is none."""
    try:
        return tuple(
            Event(
                row["mechanism"],
                float(row["multiplier"]),
                Sampling(row["law"], float(row["rate"]), int(row["size"])),
                int(row["population"]),
                int(row["times"]),
            )
            for row in rows
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the ledger of what was released is damaged: {error!r}") from error
