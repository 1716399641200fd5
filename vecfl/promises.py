"""That a run can keep what its algorithm promises: refused is what could not, before any round."""

import logging

import torch
from torch import Tensor

from vecfl.aggregate import empty
from vecfl.algorithms.base import Algorithm, Round
from vecfl.algorithms.dp_sgd import require_noised, require_unseen
from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.layout import Layout
from vecfl.privacy.accountant import COARSE, epsilon
from vecfl.privacy.events import Event, Privacy, Sampling
from vecfl.releases import Releases, example_cost
from vecfl.sampling import Sampler, law_of
from vecfl.task import Task

log = logging.getLogger("vecfl")
NEAR = 1e-6  # relative, of a cohort to what its sampler draws in the mean


def promised(
    algorithm: Algorithm,
    sampler: Sampler,
    task: Task,
    data: FederatedDataset,
    dropout: object,
    exact_sums: bool,
) -> Releases:
    """What a round of a run releases.

    Raises InputError where an algorithm that makes a promise could not keep it: the law of the
    sampler is not known, draws others than the algorithm expects or has no accountant, clients are
    lost by a trace, sums are rounded, somebody has changed what the promise is about, or the server
    reads a sum that has no noise.
    """
    promise, examples = algorithm.privacy, algorithm.examples
    w, clients = task.layout.flatten(task.module), data.num_clients
    if examples is not None:
        require_noised(algorithm)
        require_unseen(algorithm, w, task.layout, clients)
        example_cost(examples, 1)
    if algorithm.observe is not None and (promise or examples):
        log.warning(
            "%s: it follows metrics; where they come from clients they have no noise, and epsilon "
            "does not count them",
            algorithm.name,
        )
    if promise is None:
        return Releases(examples=examples)
    require_as_it_was(algorithm, exact_sums)
    law = law_as_promised(algorithm.name, promise, sampler, clients, dropout)
    require_public(algorithm, w, task.layout, clients)
    event = promise.event(law, clients)
    epsilon((event,), promise.delta, accountant=promise.accountant, step=COARSE)
    say_price(promise, event)
    if promise.delta >= 1 / event.population:
        log.warning(
            "delta %.3g is no less than 1 / %d clients, with which a mechanism that publishes one "
            "of them would do: epsilon tells little; give less, such as %.2g",
            *(promise.delta, event.population, event.population**-1.1),
        )
    return Releases(promise, event, examples)


def require_as_it_was(algorithm: Algorithm, exact_sums: bool) -> None:
    """InputError where what is added up is another thing than the promise is about."""
    if not algorithm.keeps_promise:
        raise InputError(
            f"{algorithm.name}: its upload or server was replaced after `private`; make it private "
            "last, or promise again what then holds: .promises(algorithm.privacy)"
        )
    if exact_sums:
        raise InputError(
            f"{algorithm.name}: exact_sums rounds messages to a grid that depends on the examples "
            "of the cohort, so that one client moves more than its own message; leave it out: the "
            "noise is the same for any ranks, workers and slots"
        )


def law_as_promised(
    name: str, promise: Privacy, sampler: Sampler, clients: int, dropout: object
) -> Sampling:
    """The law by which clients take part; InputError where it is not that of the promise."""
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
    of = promise.stands_for
    if of is not None and law.law not in ("poisson", "fixed"):
        raise InputError(
            f"{name}: only poisson(rate) and uniform(size) stand for a larger population; a "
            "capacity, or everyone, is of this one"
        )
    if of is not None and law.law == "fixed" and of.cohort != int(of.cohort):
        raise InputError(f"{name}: {of}: cohorts of a fixed size have a whole number of clients")
    return law.thinned(float(dropout))


def require_public(algorithm: Algorithm, w: Tensor, layout: Layout, clients: int) -> None:
    """InputError where the server reads a sum that has no noise: it takes a step by zeros."""
    sums = empty(layout.of_message(algorithm.messages).size, w.device)
    with torch.no_grad():
        algorithm.server(algorithm.init(w, layout), sums, Round(0, 0, layout, clients))


def say_price(promise: Privacy, event: Event) -> None:
    """Tell what a fixed size or a capacity costs, and whether it is one that costs much."""
    law = event.sampling
    if law.law == "fixed":
        log.info(
            "privacy: cohorts of a fixed size have neighbours with another client in the place of "
            "one, whose noise counts half; poisson(rate) costs less"
        )
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
