"""What releases cost: epsilon at a delta, by dp-accounting (Google's library).

Privacy loss distributions (PLD) by default, which are exact up to a discretization that rounds up;
Renyi DP for cohorts of a fixed size, which PLD has no law of. Neither a central limit theorem nor
GDP: they understate epsilon.
"""

import functools
import math
from types import ModuleType
from typing import Any

from vecfl.errors import InputError, inside, positive
from vecfl.privacy.events import Accountant, Event, Ledger, Mechanism, Sampling

# Discretizations of privacy losses: of the last figure, of live ones, of a first look.
FINE, COARSE, ROUGH = 1e-4, 1e-3, 0.1
LITTLE = 4.0  # noise, of which many releases cost much
LEAST = 1e-3  # below this multiplier a release costs more than half a million


def epsilon(
    ledger: Ledger, delta: float, *, accountant: Accountant | None = None, step: float = FINE
) -> float:
    """Epsilon at `delta` of everything in a ledger; inf for noise multipliers below a thousandth.

    accountant  None: "pld", or "rdp" where a cohort has a fixed size
    step        discretization of "pld": a coarser one is faster. Each gives an upper bound; that of
                epsilons above 20 has a coarser one

    Neighbours are populations with one client more or less, with cohorts of a fixed size those with
    another client in the place of one. Raises InputError for a delta out of (0, 1), an accountant
    that has no law of an event, and laws of different neighbours in one ledger.
    """
    inside("delta", delta)
    if not ledger:
        return 0.0
    return spent(ledger, delta, chosen(ledger, accountant), step)


@functools.lru_cache(maxsize=256)
def spent(ledger: Ledger, delta: float, accountant: Accountant, step: float) -> float:
    """`epsilon` of a ledger that is not empty."""
    least = min(event.multiplier for event in ledger)
    if least < LEAST:
        return math.inf

    def found(step: float) -> float:
        made = fresh(accountant, relation_of(ledger), step)
        for event in ledger:
            made.compose(counted(event), event.times)
        return float(made.get_epsilon(delta))

    if accountant == "rdp":
        return found(step)
    # The work grows with epsilon over the step: a large one is told to as many digits, not more.
    rough = found(min(500.0, ROUGH * max(1.0, 0.1 / least**2))) if least < LITTLE else 0.0
    rough = rough if math.isfinite(rough) else 0.0  # rough steps resolve no delta of 1e-15
    return found(step * max(1.0, rough / 20))


def noise_multiplier(
    epsilon: float,
    delta: float,
    rounds: int,
    sampling: Sampling,
    population: int,
    *,
    mechanism: Mechanism = "gaussian",
    accountant: Accountant | None = None,
) -> float:
    """The smallest noise multiplier with which `rounds` rounds cost at most `epsilon`.

    sampling    who takes part, of a population of so many clients: Sampling("poisson", 0.1)

    It is rounded up: the epsilon of that ledger, by the same accountant, is at most this one.
    Raises InputError for what is out of range, and where no multiplier up to a million is enough.
    """
    positive("epsilon", epsilon)
    if rounds < 1:
        raise InputError(f"rounds={rounds}: at least 1")
    if not isinstance(sampling, Sampling):
        raise InputError(
            f'sampling must be a vecfl.privacy.Sampling, such as Sampling("poisson", 0.1), not '
            f"{sampling!r}"
        )

    def cost(z: float) -> float:
        return cost_of((Event(mechanism, z, sampling, population, rounds),), delta, accountant)

    high = 1.0
    while cost(high) > epsilon:
        high *= 2
        if high > 1e6:
            raise InputError(f"no noise multiplier reaches epsilon {epsilon} at delta {delta}")
    low = high / 2
    while cost(low) <= epsilon and low > 1e-3:
        low, high = low / 2, low
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= epsilon else (middle, high)
    return high


def cost_of(ledger: Ledger, delta: float, accountant: Accountant | None) -> float:
    """`epsilon` by the coarse step."""
    return epsilon(ledger, delta, accountant=accountant, step=COARSE)


def chosen(ledger: Ledger, wish: Accountant | None) -> Accountant:
    """The accountant of a ledger; InputError where the wish has no law of it."""
    laws = {e.sampling.law for e in ledger}
    of_laplace = {e.sampling.law for e in ledger if e.mechanism == "laplace"}
    if wish not in (None, "pld", "rdp"):
        raise InputError(f"accountant={wish!r}: choose pld or rdp")
    if of_laplace & {"fixed", "truncated"}:
        raise InputError(
            "Laplace noise is accounted under plain Poisson sampling and with everyone, not in "
            "cohorts of a fixed size or with a capacity; take poisson(rate)"
        )
    if "fixed" in laws and wish == "pld":
        raise InputError("pld has no law of cohorts of a fixed size; take rdp, or poisson sampling")
    if "truncated" in laws and wish == "rdp":
        raise InputError("rdp has no law of cohorts with a capacity; take pld, or no capacity")
    if "poisson" in of_laplace and wish == "rdp":
        raise InputError("rdp has no law of Laplace noise under Poisson sampling; take pld")
    return wish or ("rdp" if "fixed" in laws else "pld")


def relation_of(ledger: Ledger) -> str:
    """The neighbours that all events share."""
    relations = {e.sampling.relation for e in ledger}
    if len(relations) > 1:
        raise InputError(
            "one ledger has cohorts of a fixed size and of another law: their neighbours differ, "
            "and no accountant adds them up"
        )
    return relations.pop()


def fresh(accountant: Accountant, relation: str, step: float) -> Any:
    """An accountant of the library."""
    library = dp_accounting()
    relations = library.NeighboringRelation
    which = relations.REPLACE_ONE if relation == "replace-one" else relations.ADD_OR_REMOVE_ONE
    if accountant == "rdp":
        return library.rdp.RdpAccountant(neighboring_relation=which)
    return library.pld.PLDAccountant(which, value_discretization_interval=step)


def counted(event: Event) -> Any:
    """An event as the library has it, for one release."""
    library, law, z = dp_accounting(), event.sampling, event.multiplier
    if law.law == "fixed":
        # Another client in the place of one moves the sum by up to twice the clipping norm, which
        # the Renyi accountant, unlike that of privacy losses, does not count for itself.
        once = library.GaussianDpEvent(z / 2)
        return library.SampledWithoutReplacementDpEvent(event.population, law.size, once)
    if law.law == "truncated":
        return library.TruncatedSubsampledGaussianDpEvent(event.population, law.rate, law.size, z)
    release = library.LaplaceDpEvent if event.mechanism == "laplace" else library.GaussianDpEvent
    once = release(z)
    return once if law.rate == 1 else library.PoissonSampledDpEvent(law.rate, once)


@functools.cache
def dp_accounting() -> ModuleType:
    """The library; InputError that names the extra where it is missing."""
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise InputError('accounting needs dp-accounting: pip install "vecfl[privacy]"') from error
    return dp_accounting
