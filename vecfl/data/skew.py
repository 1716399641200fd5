"""Partitioners by size, by size and label, and by the number of classes at a client."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vecfl.data import partition
from vecfl.data.partition import (
    categories,
    check_min_size,
    check_positive,
    deal,
    fill_up,
    generator,
    integer,
    shuffle_groups,
)
from vecfl.errors import InputError

BLOCK = 1 << 20  # numbers in a block of label mixes


def lognormal(
    n: int, clients: int, sigma: float, seed: int, min_size: int = 1
) -> NDArray[np.int64]:
    """The client of each of `n` examples, [n]: random ones, in sizes ~ exp(sigma * normal).

    All examples are used: sizes are shares of n, rounded up or down at random without bias, and
    then clients below `min_size` are filled up from the largest. sigma = 0 gives equal sizes.
    Raises InputError for n or clients < 1, a sigma that is negative or not finite, and
    n < clients * min_size. Source: Acar et al. 2021, arXiv:2111.04263 (unbalanced data).
    """
    n, clients = _counts(n, clients, sigma, "sigma", min_size)
    rng = generator(seed, partition.LOGNORMAL)
    normal = rng.standard_normal(clients)
    with np.errstate(over="ignore"):
        shares = np.exp(sigma * (normal - normal.max()))  # the largest is 1, whatever sigma
    return fill_up(rng.permutation(deal(shares, n, rng)), clients, min_size, rng)


def power_law(
    n: int, clients: int, exponent: float, seed: int, min_size: int = 1
) -> NDArray[np.int64]:
    """The client of each of `n` examples, [n]: random ones, in sizes ~ rank^-exponent (Zipf).

    The ranks 1..clients go to the clients at random; rounding and `min_size` are those of
    `lognormal`. exponent = 0 gives equal sizes. Raises InputError for n or clients < 1, an exponent
    that is negative or not finite, and n < clients * min_size. Source: Li et al. 2020,
    arXiv:1812.06127, section 5.1 (sizes by a power law).
    """
    n, clients = _counts(n, clients, exponent, "exponent", min_size)
    rng = generator(seed, partition.POWER_LAW)
    with np.errstate(over="ignore"):
        shares = np.exp(-exponent * np.log1p(rng.permutation(clients)))
    return fill_up(rng.permutation(deal(shares, n, rng)), clients, min_size, rng)


def sized_dirichlet(labels: Any, sizes: Any, alpha: float, seed: int) -> NDArray[np.int64]:
    """The client of each example, [n]: label skew by Dirichlet(alpha), in clients of given sizes.

    `sizes` [clients] add up to n; those of another partitioner are np.bincount(client, minlength=
    clients). Client k wants classes in proportions ~ Dirichlet(alpha * C * p), p [C] the shares of
    the classes in all data: for classes of equal size, the skew of `dirichlet`. Where a class is
    wanted more often than there are examples, random ones of those who want it get a random example
    that nobody wants.

    `labels` are n integers or strings. Raises InputError for other labels, sizes that are negative
    or do not add up to n, and an alpha that is not positive and finite. Source: Hsu et al. 2019,
    arXiv:1909.06335 (their alpha is C times this one); with sizes, Acar et al. 2021,
    arXiv:2111.04263.
    """
    _, label, supply = np.unique(
        categories(labels, "labels"), return_inverse=True, return_counts=True
    )
    sizes = _sizes(sizes, len(label))
    check_positive(alpha, "alpha")
    rng = generator(seed, partition.SIZED_DIRICHLET)
    wanted = _wanted_labels(sizes, supply / len(label), alpha, rng)
    classes = len(supply)
    slots, place = shuffle_groups(wanted, classes, rng)
    examples, rank = shuffle_groups(label, classes, rng)
    met = np.minimum(supply, np.bincount(wanted, minlength=classes))
    slot_met, example_met = place < met[wanted[slots]], rank < met[label[examples]]
    slot = np.empty(len(label), dtype=np.int64)  # of each example
    slot[examples[example_met]] = slots[slot_met]
    slot[examples[~example_met]] = rng.permutation(slots[~slot_met])
    return np.repeat(np.arange(len(sizes)), sizes)[slot]


def classes_per_client(labels: Any, clients: int, classes: int, seed: int) -> NDArray[np.int64]:
    """The client of each example, [n]: every client has exactly `classes` classes.

    Classes have equally many owners, give or take one, or as many as they have examples where that
    is less; who owns what is random. The examples of a class are shared out among its owners in
    sizes that differ by at most 1.

    `labels` are n integers or strings. Raises InputError for other labels, more classes at a client
    than there are, too few clients to own all classes, and too few examples. Source: Li et al.
    2022, arXiv:2102.02079 (#C = k); owners are shuffled by the trades of Strona et al. 2014,
    doi:10.1038/ncomms5114.
    """
    _, label, supply = np.unique(
        categories(labels, "labels"), return_inverse=True, return_counts=True
    )
    clients, classes = integer(clients, "clients", 1), integer(classes, "classes", 1)
    rng = generator(seed, partition.CLASSES)
    owners = _owners(supply, clients, classes, rng)
    rows = _trade(_cyclic(owners, clients, classes, rng), rng)
    seats, _ = shuffle_groups(rows.ravel(), len(supply), rng)  # class after class
    first = np.cumsum(owners) - owners
    examples, rank = shuffle_groups(label, len(supply), rng)
    client = np.empty(len(label), dtype=np.int64)
    of = label[examples]
    client[examples] = seats[first[of] + rank % owners[of]] // classes
    return client


def _counts(n: int, clients: int, skew: float, name: str, min_size: int) -> tuple[int, int]:
    """n and clients as integers; InputError where they, the skew or min_size do not fit."""
    n, clients = integer(n, "n", 1), integer(clients, "clients", 1)
    if not 0 <= skew < math.inf:
        raise InputError(f"{name}: expected a finite number of at least 0, got {skew}")
    check_min_size(min_size, clients, n)
    return n, clients


def _sizes(sizes: Any, n: int) -> NDArray[np.int64]:
    """`sizes` as int64 [clients]; InputError unless they are sizes of n examples in all."""
    array = np.asarray(sizes)
    if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in "iu":
        raise InputError(
            f"sizes: expected one integer for each client, "
            f"got shape {list(array.shape)} of {array.dtype}"
        )
    if array.min() < 0 or array.sum() != n:
        raise InputError(
            f"sizes: expected numbers >= 0 that add up to {n}, the number of labels, "
            f"got a sum of {array.sum()} and a smallest of {array.min()}"
        )
    return array.astype(np.int64)


def _wanted_labels(
    sizes: NDArray[np.int64], prior: NDArray[Any], alpha: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """The class that each place at a client asks for, [n], client after client."""
    alpha = min(alpha, 1e12)  # beyond, the spread of a share is below one example
    weight = prior * len(prior)
    classes, rows = len(prior), max(BLOCK // len(prior), 1)
    parts = []
    for start in range(0, len(sizes), rows):
        size = sizes[start : start + rows, None]
        shape = len(size), classes
        # Gamma(a) by way of Gamma(a + 1), up to a common factor: see `partition._shares`.
        e = rng.standard_exponential(shape) / weight
        with np.errstate(over="ignore"):
            power = np.exp((e.min(1, keepdims=True) - e) / alpha)
        ends = np.cumsum(rng.standard_gamma(alpha * weight + 1, shape) / (alpha + 1) * power, 1)
        # Systematic sampling, as in `deal`.
        ends = np.floor(ends / ends[:, -1:] * size + rng.random((len(size), 1)))
        ends = np.minimum(ends, size)  # where size + 0.99... is rounded up
        counts = np.diff(ends.astype(np.int64), axis=1, prepend=0)
        parts.append(np.repeat(np.tile(np.arange(classes), len(size)), counts.ravel()))
    return np.concatenate(parts)


def _owners(
    supply: NDArray[np.int64], clients: int, classes: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """The number of clients that own each class, [C], as equal as `supply` [C] allows."""
    most, needed = np.minimum(supply, clients), clients * classes
    if classes > len(supply):
        raise InputError(f"classes: {classes} at every client, but labels have {len(supply)}")
    if needed < len(supply):
        raise InputError(
            f"classes: {clients} clients * {classes} leave some of the {len(supply)} classes "
            "without a client; raise classes or clients"
        )
    if needed > most.sum():
        raise InputError(
            f"classes: {clients} clients * {classes} need {needed} examples of different classes "
            f"at a client, the labels allow {most.sum()}; lower classes or clients"
        )
    at_most = np.cumsum(len(supply) - np.cumsum(np.bincount(most)))  # [t]: sum of min(most, t + 1)
    level = np.searchsorted(at_most, needed, side="right")
    owners = np.minimum(most, level)
    more = rng.choice(np.flatnonzero(most > level), needed - owners.sum(), replace=False)
    owners[more] += 1
    return owners


def _cyclic(
    owners: NDArray[np.int64], clients: int, classes: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Different classes for each client, [clients, classes], each class `owners` [C] times.

    Dealt class after class, client after client: no class goes around further than once.
    """
    order = rng.permutation(len(owners))
    return np.repeat(order, owners[order]).reshape(classes, clients).T


def _trade(rows: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """`rows` [clients, classes] at random: pairs of clients redeal what only one of them has."""
    clients, classes = rows.shape
    half = clients // 2
    for _ in range(2 * clients.bit_length()):
        rows = rows[rng.permutation(clients)]
        both = np.sort(np.concatenate([rows[:half], rows[half : 2 * half]], 1), axis=1)
        key = rng.random(both.shape)
        first, second = key[:, :-1], key[:, 1:]
        shared = both[:, :-1] == both[:, 1:]
        first[shared] -= 1  # one for each of the two,
        second[shared] += 1  # by the order of keys
        both = np.take_along_axis(both, np.argsort(key, axis=1), 1)
        rows[:half], rows[half : 2 * half] = both[:, :classes], both[:, classes:]
    return rows
