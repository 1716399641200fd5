"""Which clients take part in a round: pure functions of (who is eligible, seed, round).

A sampler is a function (eligible [N] bool, seed, round) -> positions [C] int64. A client may be
drawn more than once where the sampler says so, and a cohort may be empty.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from vecfl.distinct import client_words, distinct, fits_population
from vecfl.errors import InputError, is_integer
from vecfl.privacy.events import Sampling
from vecfl.random import Kind, permutation, stream
from vecfl.random import uniform as uniforms

Sampler = Callable[[Tensor, int, int], Tensor]
SIZE, PASS = 1, 2  # steps of streams of kind cohort; the words of clients are step 0


def law_of(sampler: Sampler, population: int) -> Sampling | None:
    """The law of a sampler, which accountants go by; None: nobody has told it."""
    law, about = getattr(sampler, "law", (None, None))
    return law(population) if law is not None and about is sampler else None


def lawful(sampler: Sampler, law: Callable[[int], Sampling]) -> Sampler:
    """`sampler`, whose law for a population of N is law(N); it is not that of what wraps it."""
    sampler.law = law, sampler  # type: ignore[attr-defined]
    return sampler


def everyone() -> Sampler:
    """All clients, each round, in their order."""
    return lawful(
        lambda eligible, seed, round: eligible.nonzero().flatten(),
        lambda population: Sampling("everyone"),
    )


def uniform(size: int) -> Sampler:
    """`size` clients uniformly without replacement; all, and a warning, where fewer are eligible.

    Raises InputError if the population is smaller.
    """
    size = at_least(1, size, "a cohort")
    return lawful(
        lambda eligible, seed, round: distinct(eligible, seed, round, size),
        lambda population: Sampling("fixed", size=size),
    )


def fraction(share: float) -> Sampler:
    """A share of the eligible clients, uniformly without replacement: rounded, and one at least."""
    share = probability(share, "a fraction of the clients")

    def size_of(count: int) -> int:
        return max(1, math.floor(share * count + 0.5))

    return lawful(
        lambda eligible, seed, round: distinct(eligible, seed, round, size_of(int(eligible.sum()))),
        lambda population: Sampling("fixed", size=size_of(population)),
    )


def uniform_between(low: int, high: int) -> Sampler:
    """`low` to `high` clients, each number equally likely, uniformly without replacement."""
    low = at_least(1, low, "a cohort")
    high = at_least(low, high, f"a cohort of {low} or more")

    def sample(eligible: Tensor, seed: int, round: int) -> Tensor:
        drawn = uniforms(seed, stream(Kind.COHORT, round=round, step=SIZE), 1)
        fits_population(high, len(eligible))
        size = low + int(float(drawn) * (high - low + 1))
        return distinct(eligible, seed, round, size)

    return sample


def poisson(rate: float, capacity: int | None = None) -> Sampler:
    """Each client with probability `rate`, independently: the sampling of DP accountants.

    The mean divides by the weights of those who came, under `vecfl.private` by a fixed denominator.
    Their number varies and may be 0. Where more than `capacity` are drawn, a uniformly
    random subset of that size takes part (as in Chua et al., "Scalable DP-SGD: shuffling vs.
    Poisson subsampling", NeurIPS 2024, whose delta such a cut changes). The rate is rounded down to
    a multiple of 2^-32, so that no client takes part more often than accounted for.
    """
    rate = probability(rate, "a sampling rate")
    most = None if capacity is None else at_least(1, capacity, "a cohort at capacity")
    below = math.floor(rate * 2**32)
    law = Sampling("poisson" if most is None else "truncated", below / 2**32, most or 0)

    def sample(eligible: Tensor, seed: int, round: int) -> Tensor:
        word = client_words(eligible, seed, round)
        drawn = (eligible & (word < below)).nonzero().flatten()
        if most is None or len(drawn) <= most:
            return drawn
        return drawn[word[drawn].argsort(stable=True)[:most].sort().values]

    return lawful(sample, lambda population: law)


def with_replacement(size: int, weights: Tensor | None = None) -> Sampler:
    """`size` independent draws of one client, uniformly or in proportion to weights [N].

    Draws by `weights=data.sizes` go with `weights=uniform_weights` in the algorithm, or size counts
    twice: scheme I of Li et al., "On the convergence of FedAvg on non-IID data", ICLR 2020. A
    client that is drawn again trains again here, with random numbers of its own. Where nobody is
    eligible, nobody is drawn.
    """
    size = at_least(1, size, "a cohort")
    weights = None if weights is None else proportions(weights)

    def sample(eligible: Tensor, seed: int, round: int) -> Tensor:
        mass = eligible.double() if weights is None else fitting(weights, eligible) * eligible
        total = mass.cumsum(0)
        if not total[-1]:
            return torch.empty(0, dtype=torch.int64)
        point = uniforms(seed, stream(Kind.COHORT, round=round), size) * total[-1]
        return torch.searchsorted(total, point, right=True)

    return sample


def weighted(size: int, weights: Tensor) -> Sampler:
    """`size` distinct clients, drawn one after the other in proportion to weights [N].

    For sampling by size, `weights=data.sizes`, with `weights=uniform_weights` in the algorithm: or
    size counts twice. A client of weight 0 is never drawn; where fewer
    than `size` can be, all of them are. Efraimidis and Spirakis, "Weighted random sampling with a
    reservoir", IPL 2006, in logarithms.
    """
    size, weights = at_least(1, size, "a cohort"), proportions(weights)

    def sample(eligible: Tensor, seed: int, round: int) -> Tensor:
        fits_population(size, len(eligible))
        mass = fitting(weights, eligible)
        drawn = uniforms(seed, stream(Kind.COHORT, round=round), len(eligible))
        key = -drawn.log() / mass  # inf for a weight of 0
        possible = eligible & (mass > 0)
        return first(key.where(possible, math.inf), possible, size)

    return sample


def cyclic(size: int) -> Sampler:
    """`size` clients a round so that each takes part once in a pass; passes are shuffled anew.

    The last cohort of a pass is what remains. A client that is not eligible when its turn comes
    misses the pass. (Wang and Ji, "A unified analysis of federated learning with arbitrary client
    participation", NeurIPS 2022, on regularized participation.)
    """
    size = at_least(1, size, "a cohort")

    def sample(eligible: Tensor, seed: int, round: int) -> Tensor:
        fits_population(size, len(eligible))
        number, turn = divmod(round, -(-len(eligible) // size))
        order = pass_order(len(eligible), seed, number)[turn * size : (turn + 1) * size]
        return order[eligible[order]]

    return sample


def first(key: Tensor, eligible: Tensor, size: int) -> Tensor:
    """The `size` clients of smallest key [N], in its order; fewer where fewer are eligible."""
    return key.topk(min(size, int(eligible.sum())), largest=False, sorted=True).indices


@lru_cache(maxsize=2)
def pass_order(population: int, seed: int, number: int) -> Tensor:
    """The order of the clients in a pass, [N]; not to be written to."""
    return permutation(seed, stream(Kind.COHORT, round=number, step=PASS), population)


def at_least(low: int, value: Any, what: str) -> int:
    """`value` as an int; InputError unless it is a number of clients that is not below `low`."""
    if not is_integer(value) or value < low:
        raise InputError(f"{what} has at least {low} client{'s' * (low > 1)}, not {value!r}")
    return int(value)


def probability(value: Any, what: str) -> float:
    """`value` as a float; InputError unless it is a number in (0, 1]."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 < number <= 1:
        raise InputError(f"{what} is in (0, 1], not {value!r}")
    return number


def proportions(weights: Any) -> Tensor:
    """`weights` [N] in float64; InputError unless they are finite, none negative, not all zero."""
    what = "weights: expected a number of at least 0 for each client"
    try:
        mass = torch.as_tensor(weights, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{what}, got {weights!r}") from None
    if mass.dim() != 1 or not len(mass):
        raise InputError(f"{what}, got shape {list(mass.shape)}")
    for k in (~(mass.isfinite() & (mass >= 0))).nonzero().flatten().tolist():
        raise InputError(f"{what}, got {mass[k]:g} for client {k}")
    if not mass.any():
        raise InputError(f"{what}, got zeros alone")
    return mass


def fitting(mass: Tensor, eligible: Tensor) -> Tensor:
    """`mass` [N]; InputError if the population has another size."""
    if len(mass) != len(eligible):
        raise InputError(
            f"weights: {len(mass)} of them for a population of {len(eligible)} clients"
        )
    return mass
