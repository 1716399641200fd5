"""What the rounds of a run release, and that they are what its algorithm promises."""

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vecfl.aggregate import empty
from vecfl.algorithms.base import Algorithm, Round
from vecfl.algorithms.dp_sgd import require_unseen
from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.layout import Layout
from vecfl.privacy.accountant import COARSE, FINE, epsilon
from vecfl.privacy.events import PASSES, Event, ExamplePrivacy, Ledger, Privacy, Sampling, spend
from vecfl.sampling import Sampler, law_of
from vecfl.state import State
from vecfl.task import Task

log = logging.getLogger("vecfl")
NEAR = 1e-6  # relative, of a cohort to what its sampler draws in the mean


@dataclass(frozen=True)
class Releases:
    """What each round of a run releases under its algorithm's promise; None where it has none.

    examples  what clients promise about single examples
    """

    promise: Privacy | None = None
    event: Event | None = None
    examples: ExamplePrivacy | None = None

    def after(self, ledger: Ledger) -> Ledger:
        """The ledger after one more round."""
        return ledger if self.event is None else spend(ledger, self.event)

    def told(self, state: State, *, exact: bool = False) -> dict[str, float]:
        """`privacy/epsilon` and `privacy/delta` of a state's rounds; nothing without a promise.

        Of examples `privacy/example_epsilon`, the largest of any client, and `.../example_delta`.

        exact  the last figure; else a little above it, in a tenth of a second. Epsilon is inf where
               the ledger has not all rounds: some were played without the promise
        """
        promise, told = self.promise, dict[str, float]()
        if self.examples is not None:
            most = int(passes(state).max())
            told["privacy/example_epsilon"] = example_cost(self.examples, most)
            told["privacy/example_delta"] = self.examples.delta
        if promise is None:
            return told
        found = float("inf")
        if sum(event.times for event in state.ledger) >= state.round:
            step = FINE if exact else COARSE
            found = epsilon(state.ledger, promise.delta, accountant=promise.accountant, step=step)
        return told | {"privacy/epsilon": found, "privacy/delta": promise.delta}


def passes(state: State) -> Tensor:
    """The passes over its examples that each client has begun, int64 [N]."""
    assert state.table is not None
    return state.table.column(PASSES).long()


@cache
def example_cost(examples: ExamplePrivacy, passes: int) -> float:
    """Epsilon of so many passes; of Gaussian noise alone a coarse step is as good as a fine one."""
    ledger = examples.after(passes)
    return epsilon(ledger, examples.delta, accountant=examples.accountant, step=COARSE)


def example_epsilon(algorithm: Algorithm, state: State) -> Tensor:
    """Epsilon of every client's examples after the rounds of a state, float64 [N].

    It is at the delta of `vecfl.dp_sgd`, and 0 for a client that has not trained. InputError for
    an algorithm without `dp_sgd`.
    """
    if (examples := algorithm.examples) is None:
        raise InputError(f"{algorithm.name}: promises nothing about examples; use dp_sgd")
    counts, where = passes(state).unique(return_inverse=True)
    found = [example_cost(examples, n) for n in counts.tolist()]
    return torch.tensor(found, dtype=torch.float64)[where]


def releases(
    algorithm: Algorithm, sampler: Sampler, task: Task, data: FederatedDataset, dropout: object
) -> Releases:
    """What a round of a run releases.

    Raises InputError where an algorithm that makes a promise could not keep it: the law of the
    sampler is not known, draws others than the algorithm expects or has no accountant, clients are
    lost by a trace, or the server reads a sum that has no noise.
    """
    promise, examples = algorithm.privacy, algorithm.examples
    name, clients = algorithm.name, data.num_clients
    if examples is not None:
        require_unseen(algorithm, task.layout.flatten(task.module), task.layout, clients)
        example_cost(examples, 1)
    if promise is None:
        return Releases(examples=examples)
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
    if algorithm.observe is not None:
        log.warning(
            "%s: it follows metrics; where they come from clients they have no noise, and epsilon "
            "does not count them",
            name,
        )
    return Releases(promise, event, examples)


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
