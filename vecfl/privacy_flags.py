"""Flags of central differential privacy, and what they make of an algorithm and of who takes part.

What stands around one client alone, such as local noise, is among --transforms.
"""

import logging
import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from vecfl.algorithms import Algorithm
from vecfl.algorithms.weights import Weights, by_examples, uniform_weights
from vecfl.cli import check
from vecfl.errors import InputError
from vecfl.named import CLIPS, named_transform
from vecfl.privacy import Event, Population, Privacy, Sampling, epsilon, noise_multiplier
from vecfl.privacy.accountant import COARSE, FINE
from vecfl.sampling import Sampler, law_of, poisson
from vecfl.transforms import Transform, private
from vecfl.transforms.private import mechanism_of

log = logging.getLogger("vecfl")


@dataclass
class PrivacyArgs:
    """Central differential privacy of clients, where --private-clip is given."""

    private_clip: str | None = None
    """differential privacy of clients: the bound of what each sends, clip_by_norm(0.5),
    clip_by_layer(0.5), adaptive_clip(0.1, count_noise=1.0), clip_by_l1(5.0), file.py:name(2)"""
    noise_multiplier: float | None = None
    """standard deviation of the noise on the sum over the bound (of clip_by_l1: its scale)"""
    epsilon: float | None = None
    """instead of it: the least noise with which all --rounds together spend no more than this"""
    delta: float | None = None
    """at which epsilon is told; N^-1.1 for N clients if not given"""
    accountant: Literal["pld", "rdp"] | None = None
    """what counts epsilon; pld if not given, rdp for cohorts of a fixed size"""
    stop_at_epsilon: float | None = None
    """end before the round that would spend more than this"""
    stands_for: tuple[int, int] | None = None
    """N and C: a simulation with the noise and epsilon of C clients a round out of N"""


def check_privacy(args: PrivacyArgs) -> None:
    """Raise InputError, with the name of the flag, for privacy that nothing could promise."""
    if args.private_clip is None:
        names = [field.name for field in fields(PrivacyArgs)]
        check(args, names, lambda _: False, "--private-clip beside it, as 'clip_by_norm(0.5)'")
        return
    if args.noise_multiplier is None and args.epsilon is None:
        raise InputError("--private-clip: needs --noise-multiplier or --epsilon beside it")
    if args.noise_multiplier is not None:
        check(args, ("epsilon",), lambda _: False, "none beside --noise-multiplier, which gives it")
    check(args, ("noise_multiplier",), lambda z: 0 <= z < math.inf, "a number of at least 0")
    check(args, ("epsilon", "stop_at_epsilon"), lambda e: 0 < e < math.inf, "a positive number")
    check(args, ("delta",), lambda delta: 0 < delta < 1, "a number between 0 and 1")
    sizes = "N clients and a cohort of 1 to N of them"
    check(args, ("stands_for",), lambda some: 0 < some[1] <= some[0], sizes)
    if (weights := getattr(args, "weights", None)) in ("by_examples", "by_tokens"):
        wanted = "uniform_weights, or capped(50), beside --private-clip"
        raise InputError(f"--weights: expected {wanted}: {weights} has no largest")
    private_clip(args)


def private_clip(args: PrivacyArgs) -> Transform:
    """The transform of --private-clip."""
    assert args.private_clip is not None
    found = named_transform(args.private_clip, "--private-clip", CLIPS)
    if found.limit is None:
        raise InputError(
            f"--private-clip: {args.private_clip} does not bound what clients send; expected "
            f"{', '.join(CLIPS)}"
        )
    return found


def fair_weights(args: PrivacyArgs) -> Weights:
    """How clients count where no flag says it: by their examples; all alike under privacy."""
    return by_examples if args.private_clip is None else uniform_weights


def poisson_cohorts(cohort: int, clients: int) -> Sampler:
    """Each client by itself, --cohort of them in the mean: the sampling that is accounted best."""
    log.info(
        "privacy: each of %d clients takes part with probability %.4g, %d in the mean (--cohort); "
        "--sampler draws otherwise",
        *(clients, cohort / clients, cohort),
    )
    return poisson(cohort / clients)


def privately(
    args: PrivacyArgs,
    algorithm: Algorithm,
    sampler: Sampler,
    clients: int,
    rounds: int,
    lost: float,
) -> Algorithm:
    """`algorithm` under the promise of these flags; what all rounds will have spent is logged.

    lost  probability that a client is lost before it sends anything

    Raises InputError, with the flag, for a sampler whose law no accountant knows, and where the
    first round spends more than --stop-at-epsilon.
    """
    law, clip = law_of(sampler, clients), private_clip(args)
    if law is None:
        raise InputError(
            "--sampler: no accountant knows how it draws; expected poisson(rate), uniform(size), "
            "fraction(share) or everyone() beside --private-clip"
        )
    of = None if args.stands_for is None else Population(*args.stands_for)
    if of is not None and law.law not in ("poisson", "fixed"):
        raise InputError(
            "--sampler: expected poisson(rate) or uniform(size) beside --stands-for, without a "
            "capacity, which is of this population alone"
        )
    assert clip.limit is not None
    how: dict[str, Any] = {
        "cohort": law.expected(clients),
        "delta": (of.clients if of else clients) ** -1.1 if args.delta is None else args.delta,
        "accountant": args.accountant,
        "stands_for": of,
    }
    promise = Privacy(mechanism_of(clip.limit), args.noise_multiplier or 0.0, **how)
    if args.epsilon is not None:
        z = calibrated(args.epsilon, promise, law.thinned(lost), clients, rounds)
        promise = replace(promise, multiplier=z)
    tell(promise, promise.event(law.thinned(lost), clients), rounds, args.stop_at_epsilon)
    return private(algorithm, clip, noise_multiplier=promise.multiplier, **how)


def calibrated(target: float, promise: Privacy, law: Sampling, clients: int, rounds: int) -> float:
    """The least noise multiplier with which all rounds spend no more than --epsilon."""
    event = promise.event(law, clients)
    try:
        return noise_multiplier(
            target,
            promise.delta,
            rounds,
            event.sampling,
            event.population,
            mechanism=promise.mechanism,
            accountant=promise.accountant,
        )
    except InputError as error:
        raise InputError(f"--epsilon: {error}") from error


def tell(promise: Privacy, event: Event, rounds: int, most: float | None) -> None:
    """Log what all rounds spend; InputError where the first spends more than `most`."""

    def spent(rounds: int, step: float) -> float:
        ledger = (replace(event, times=rounds),)
        return epsilon(ledger, promise.delta, accountant=promise.accountant, step=step)

    total = spent(rounds, COARSE)
    log.info(
        "privacy: noise multiplier %.4g, epsilon %.4g at delta %.3g after %d rounds",
        *(event.multiplier, total, promise.delta, rounds),
    )
    if (of := promise.stands_for) is not None:
        what = "privacy: a simulation: its noise and epsilon are those of %s clients a round of %s"
        log.warning(what, f"{of.cohort:,}", f"{of.clients:,}")
    if most is not None and total > most and (first := spent(1, FINE)) > most:
        right = f"at least {first:.4g}, which the first round spends"
        raise InputError(f"--stop-at-epsilon: expected {right}, got {most}")
