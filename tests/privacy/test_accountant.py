"""Accountants against reference values, closed forms and each other."""

import math
from dataclasses import replace
from typing import Any

import pytest
from scipy import optimize
from scipy.stats import norm

from vecfl.errors import InputError
from vecfl.privacy import Event, Sampling, epsilon, noise_multiplier
from vecfl.privacy.accountant import COARSE
from vecfl.privacy.events import Ledger, from_plain, spend, to_plain

HUNDREDTH = Sampling("poisson", 0.01)
MANY = Event("gaussian", 1.0, HUNDREDTH, 10_000, 1000)
RARE = Event("gaussian", 0.5, Sampling("poisson", 0.001), 10_000, 5000)
ALL = Event("gaussian", 2.0, Sampling("everyone"), 100, 1)
FIXED = Event("gaussian", 1.0, Sampling("fixed", size=100), 10_000, 1000)
CAPPED = Event("gaussian", 1.0, Sampling("truncated", 0.01, 140), 10_000, 1000)


@pytest.mark.parametrize(
    ("event", "delta", "accountant", "right"),
    [
        # PLD to its discretization, as Opacus' and Microsoft's PRV accountants have it, too.
        (MANY, 1e-5, None, 1.8282),
        (RARE, 1e-6, None, 5.4353),
        (ALL, 1e-5, None, 1.99309),
        (CAPPED, 1e-5, None, 1.972),
        # Renyi DP, as Opacus has it.
        (MANY, 1e-5, "rdp", 2.1014),
        (RARE, 1e-6, "rdp", 6.6105),
        (ALL, 1e-5, "rdp", 2.1657),
        (FIXED, 1e-5, None, 20.99),
    ],
)
def test_reference_values(event: Event, delta: float, accountant: Any, right: float) -> None:
    assert epsilon((event,), delta, accountant=accountant) == pytest.approx(right, rel=5e-4)


@pytest.mark.parametrize("z", [0.5, 1.0, 3.0])
def test_one_gaussian_release_by_its_formula(z: float) -> None:
    """Balle and Wang, ICML 2018, theorem 8: delta at epsilon of sensitivity 1 and deviation z."""
    found = epsilon((Event("gaussian", z, Sampling("everyone"), 5),), 1e-4)
    delta = norm.cdf(1 / (2 * z) - found * z)
    delta -= math.exp(found) * norm.cdf(-1 / (2 * z) - found * z)
    assert delta == pytest.approx(1e-4, rel=1e-3) and delta <= 1e-4 * (1 + 1e-9)


def test_one_laplace_release_by_its_formula() -> None:
    """Scale b: delta = 1 - exp((epsilon - 1/b) / 2) (Balle et al., NeurIPS 2018)."""
    found = epsilon((Event("laplace", 0.5, Sampling("everyone"), 5),), 0.1)
    assert 1 - math.exp((found - 2) / 2) == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize(("delta", "inner"), [(1e-9, 2.0), (0.01, 2 + 2 * math.log(0.9))])
def test_one_subsampled_laplace_release_by_its_formula(delta: float, inner: float) -> None:
    """By rate q: delta is q delta' at epsilon log(1 + q (e^epsilon' - 1)) (Balle et al., NeurIPS
    2018). Of b = 1/2 and q = 0.1: epsilon' = 1/b = 2 where delta is nothing, and where it is 0.01
    delta' = 0.1 and epsilon' = 2 + 2 log(1 - 0.1)."""
    event = Event("laplace", 0.5, Sampling("poisson", 0.1), 50)
    right = math.log(1 + 0.1 * (math.exp(inner) - 1))
    assert epsilon((event,), delta) == pytest.approx(right, abs=1e-4)


def test_conventions_of_another_client_in_the_place_of_one() -> None:
    """The sum moves by up to 2 C. The Renyi accountant takes a multiplier as it is, so that of the
    library's figure for multiplier 1 is 3.576, which is no bound here; that of s / (2 C) is.
    """
    import dp_accounting as library

    def renyi(z: float) -> float:
        made = library.rdp.RdpAccountant(
            neighboring_relation=library.NeighboringRelation.REPLACE_ONE
        )
        once = library.SampledWithoutReplacementDpEvent(10_000, 100, library.GaussianDpEvent(z))
        return float(made.compose(once, 1000).get_epsilon(1e-5))

    assert renyi(1.0) == pytest.approx(3.576, abs=1e-3)
    assert epsilon((FIXED,), 1e-5) == pytest.approx(renyi(0.5)) == pytest.approx(20.99, abs=5e-3)
    # Everybody, fixed: a Gaussian of multiplier z / 2; that of privacy losses doubles for itself.
    whole = Event("gaussian", 2.0, Sampling("fixed", size=50), 50)
    relation = library.NeighboringRelation.REPLACE_ONE
    losses = library.pld.PLDAccountant(relation).compose(library.GaussianDpEvent(2.0))
    assert losses.get_epsilon(1e-5) == pytest.approx(4.377, abs=1e-3)
    assert losses.get_epsilon(1e-5) < epsilon((whole,), 1e-5) < 1.1 * losses.get_epsilon(1e-5)


def test_a_coarser_step_says_little_more() -> None:
    fine, coarse = epsilon((MANY,), 1e-5), epsilon((MANY,), 1e-5, step=COARSE)
    assert fine < coarse < fine * 1.001


def test_no_release_no_noise_and_what_is_added_up() -> None:
    assert epsilon((), 1e-5) == 0
    for least in (0.0, 9e-4):
        assert epsilon((MANY, replace(MANY, multiplier=least)), 1e-5) == math.inf
    parts = (replace(MANY, times=400), replace(MANY, times=600))
    whole = epsilon((MANY,), 1e-5, step=COARSE)
    assert epsilon(parts, 1e-5, step=COARSE) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(("z", "times"), [(0.3, 1), (0.05, 1), (0.001, 1), (0.5, 300)])
def test_little_noise_is_accounted_as_well(z: float, times: int) -> None:
    """T releases of multiplier z are one of z / sqrt(T): Balle and Wang's formula, at 1e-5."""
    found = epsilon((Event("gaussian", z, Sampling("everyone"), 5, times),), 1e-5, step=COARSE)
    z /= math.sqrt(times)

    def excess(e: float) -> float:
        first = norm.logcdf(1 / (2 * z) - e * z)
        ratio = math.exp(e + norm.logcdf(-1 / (2 * z) - e * z) - first)
        return float(first + math.log1p(-ratio) - math.log(1e-5))

    right = optimize.brentq(excess, 0.5 / z**2, 10 / z**2)
    assert right * (1 - 1e-4) <= found <= right * 1.002


def test_a_ledger_counts_equal_neighbours_together() -> None:
    ledger: Ledger = ()
    for event in (ALL, ALL, MANY, ALL):
        ledger = spend(ledger, event)
    assert ledger == (replace(ALL, times=2), MANY, ALL)
    assert from_plain(to_plain(ledger)) == ledger


@pytest.mark.parametrize(
    "other",
    [
        replace(MANY, mechanism="laplace"),
        replace(MANY, multiplier=1.5),
        replace(MANY, population=9999),
        replace(MANY, sampling=Sampling("poisson", 0.02)),
        replace(MANY, sampling=Sampling("truncated", 0.01, 140)),
    ],
    ids=["mechanism", "multiplier", "population", "rate", "law"],
)
def test_what_differs_in_anything_is_another_event(other: Event) -> None:
    ledger = spend(spend((MANY,), replace(other, times=1)), replace(other, times=2))
    assert ledger == (MANY, replace(other, times=3))


@pytest.mark.parametrize(
    ("law", "right"),
    [
        (Sampling("poisson", 0.5), Sampling("poisson", 0.5 * 0.75)),
        (Sampling("truncated", 0.5, 6), Sampling("truncated", 0.5, 6)),
        (Sampling("fixed", size=6), Sampling("fixed", size=6)),
        (Sampling("everyone"), Sampling("everyone")),
    ],
    ids=lambda law: law.law,
)
def test_lost_clients_thin_plain_poisson_cohorts_alone(law: Sampling, right: Sampling) -> None:
    """Behind a capacity of 6 those who are left are no Poisson cohort that is cut off at 6."""
    assert law.thinned(0.25) == right


@pytest.mark.parametrize(
    ("target", "accountant", "right"), [(2.0, None, 1.0292), (2.0, "rdp", 1.0939)]
)
def test_calibration(target: float, accountant: Any, right: float) -> None:
    """1,000 rounds at 1 %, delta 1e-6; to a ten-thousandth, and never above the target."""
    z = noise_multiplier(target, 1e-6, 1000, HUNDREDTH, 10_000, accountant=accountant)
    assert z == pytest.approx(right, abs=2e-4)
    spent = epsilon((replace(MANY, multiplier=z),), 1e-6, accountant=accountant)
    assert 0.999 * target < spent <= target


def test_calibration_of_laplace_noise() -> None:
    """One release with everyone: epsilon = 1/b + 2 log(1 - delta), here 2 at a delta of 0.1."""
    b = noise_multiplier(2.0, 0.1, 1, Sampling("everyone"), 50, mechanism="laplace")
    assert b == pytest.approx(1 / (2 - 2 * math.log(0.9)), rel=5e-4)


def test_calibration_of_cohorts_of_a_fixed_size() -> None:
    law = Sampling("fixed", size=100)
    z = noise_multiplier(3.0, 1e-5, 100, law, 10_000)
    event = Event("gaussian", z, law, 10_000, 100)
    assert 2.99 < epsilon((event,), 1e-5) <= 3.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: epsilon((MANY,), 0.0), "delta must be between 0 and 1, not 0.0"),
        (lambda: epsilon((MANY,), 1e-5, accountant="gdp"), "accountant='gdp': choose pld or rdp"),
        (lambda: epsilon((FIXED,), 1e-5, accountant="pld"), "pld has no law of cohorts of a fixed"),
        (lambda: epsilon((CAPPED,), 1e-5, accountant="rdp"), "rdp has no law of cohorts with a ca"),
        (lambda: epsilon((FIXED, MANY), 1e-5), "one ledger has cohorts of a fixed size and of an"),
        (
            lambda: epsilon((replace(FIXED, mechanism="laplace"),), 1e-5),
            "Laplace noise is accounted under plain Poisson sampling and with everyone",
        ),
        (
            lambda: epsilon((replace(CAPPED, mechanism="laplace"),), 1e-5),
            "Laplace noise is accounted under plain Poisson sampling and with everyone",
        ),
        (
            lambda: epsilon((replace(MANY, mechanism="laplace"),), 1e-5, accountant="rdp"),
            "rdp has no law of Laplace noise under Poisson sampling; take pld",
        ),
        (lambda: noise_multiplier(1.0, 1e-5, 0, HUNDREDTH, 100), "rounds=0: at least 1"),
        (
            lambda: noise_multiplier(1.0, 1e-5, 10, 0.1, 100),  # type: ignore[arg-type]
            "sampling must be a vecfl.privacy.Sampling, such as Sampling(",
        ),
        (lambda: Sampling("poisson", 2.0), "Sampling(law='poisson', rate=2.0, size=0): expected a"),
        (lambda: Sampling("poison", 0.1), "Sampling(law='poison'"),  # type: ignore[arg-type]
        (lambda: Sampling("fixed"), "Sampling(law='fixed', rate=1.0, size=0): expected a size"),
        (lambda: noise_multiplier(0.0, 1e-5, 10, HUNDREDTH, 100), "epsilon"),
        (lambda: from_plain([{"mechanism": "gaussian"}]), "the ledger of what was released is dam"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
