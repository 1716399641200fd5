"""What the rounds of a run release, and that they are what its algorithm promises."""

import logging
import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from vecfl.aggregate import empty
from vecfl.algorithms.base import Algorithm, Round
from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.layout import Layout
from vecfl.privacy.accountant import COARSE, FINE, epsilon
from vecfl.privacy.events import Event, Ledger, Privacy, Sampling, spend
from vecfl.sampling import Sampler, law_of
from vecfl.state import State
from vecfl.task import Task

log = logging.getLogger("vecfl")
cost = lru_cache(maxsize=256)(epsilon)  # of equal ledgers: the last round is told more than once
SMALL = 0.1  # an epsilon below which the coarse one is too far above it
NEAR = 1e-6  # relative, of a cohort to what its sampler draws in the mean


@dataclass(frozen=True)
class Releases:
    """What each round of a run releases under its algorithm's promise; None where it has none."""

    promise: Privacy | None = None
    event: Event | None = None

    def after(self, ledger: Ledger) -> Ledger:
        """The ledger after one more round."""
        return ledger if self.event is None else spend(ledger, self.event)

    def told(self, state: State, *, exact: bool = False) -> dict[str, float]:
        """`privacy/epsilon`, `privacy/delta` and `privacy/noise_multiplier` of a state's rounds.

        Nothing without a promise.

        exact  the last figure; else a little above it, in a tenth of a second. Epsilon is inf where
               the ledger has not all rounds: some were played without the promise
        """
        promise = self.promise
        if promise is None:
            return {}
        found = self._spent(state, 0, FINE if exact else COARSE)
        if not exact and 0 < found < SMALL:
            found = self._spent(state, 0, FINE)
        z = promise.multiplier
        return {
            "privacy/epsilon": found,
            "privacy/delta": promise.delta,
            "privacy/noise_multiplier": z,
        }

    def affordable(self, state: State, limit: float, most: int) -> int:
        """How many of the next rounds, at most `most`, spend no more than epsilon `limit` in all.

        By halves with the coarse epsilon, which never says less; from there on with the exact one.
        """
        low, high = -1, most + 1  # -1 and `most` + 1: not tried
        if self._spent(state, most, COARSE) <= limit:
            return most
        while high - low > 1:
            middle = (low + high) // 2
            if self._spent(state, middle, COARSE) <= limit:
                low = middle
            else:
                high = middle
        low = max(low, 0)
        while low < most and self._spent(state, low + 1, FINE) <= limit:
            low += 1
        return low

    def _spent(self, state: State, more: int, step: float) -> float:
        """Epsilon of a state's rounds and of `more` of them."""
        promise, event, ledger = self.promise, self.event, state.ledger
        if promise is None or event is None:
            return 0.0
        if sum(event.times for event in ledger) < state.round:
            return math.inf
        if more:
            ledger = spend(ledger, replace(event, times=more))
        return cost(ledger, promise.delta, accountant=promise.accountant, step=step)

    @property
    def settings(self) -> dict[str, object]:
        """What a dashboard shows of the promise beside the settings of a run."""
        promise = self.promise
        if promise is None:
            return {}
        return {"noise_multiplier": promise.multiplier, "delta": promise.delta}

    @property
    def label(self) -> str:
        """What the name of a run has behind it where its noise is that of another population."""
        of = None if self.promise is None else self.promise.stands_for
        return "" if of is None else f"-as-of-{of.clients}"


def releases(
    algorithm: Algorithm, sampler: Sampler, task: Task, data: FederatedDataset, dropout: object
) -> Releases:
    """What a round of a run releases.

    Raises InputError where an algorithm that makes a promise could not keep it: the law of the
    sampler is not known, draws others than the algorithm expects or has no accountant, clients are
    lost by a trace, or the server reads a sum that has no noise.
    """
    promise = algorithm.privacy
    if promise is None:
        return Releases()
    name, clients = algorithm.name, data.num_clients
    law = law_of(sampler, clients)
    if law is None:
        raise InputError(
            f"{name}: no accountant knows how its sampler draws; take poisson(rate), uniform(size) "
            "or everyone()"
        )
    if not isinstance(dropout, (int, float)):
        raise InputError(f"{name}: clients are lost by a trace, which no accountant knows")
    expected = law.expected(clients)
    if abs(expected - promise.cohort) > NEAR * expected:
        raise InputError(
            f"{name}: its sampler draws {expected:g} of {clients} clients in the mean; give "
            f"cohort={expected:g}"
        )
    require_public(algorithm, task.layout.flatten(task.module), task.layout, clients)
    event = promise.event(law.thinned(float(dropout)), clients)
    epsilon((event,), promise.delta, accountant=promise.accountant, step=COARSE)
    say_price(promise, event)
    return Releases(promise, event)


def require_public(algorithm: Algorithm, w: Tensor, layout: Layout, clients: int) -> None:
    """InputError where the server reads a sum that has no noise: it takes a step by zeros."""
    sums = empty(layout.of_message(algorithm.messages).size, w.device)
    with torch.no_grad():
        algorithm.server(algorithm.init(w, layout), sums, Round(0, 0, layout, clients))


def say_price(promise: Privacy, event: Event) -> None:
    """Tell what a capacity costs, and whether it is one that costs much."""
    law = event.sampling
    if law.law != "truncated":
        return
    mean = law.rate * event.population
    ample = mean + 6 * (mean * (1 - law.rate)) ** 0.5
    plain = Event(
        event.mechanism, event.multiplier, Sampling("poisson", law.rate), event.population
    )
    with_it, without = (
        epsilon((each,), promise.delta, accountant=promise.accountant, step=COARSE)
        for each in (event, plain)
    )
    level = logging.INFO if law.size >= ample else logging.WARNING
    log.log(
        level,
        "a capacity of %d clients costs epsilon %.4g a round where plain Poisson sampling costs "
        "%.4g%s",
        *(law.size, with_it, without),
        "" if law.size >= ample else f"; from {ample:.0f} on it costs next to nothing",
    )
