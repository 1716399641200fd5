"""Splits of pooled data over clients: each function returns the client of every example.

They compose with `FederatedDataset.from_arrays(arrays, client, num_clients=clients)`. Equal
arguments give equal splits, and each function draws from its own stream of the seed.
"""

import math
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vecfl.errors import InputError

# The second word of the Philox key: one stream per purpose.
IID, DIRICHLET, SHARDS, DIGITS = 1, 2, 3, 4
LOGNORMAL, POWER_LAW, SIZED_DIRICHLET, CLASSES = 5, 6, 7, 8
ANGLES, AFFINE, HELD_CLIENTS, HELD_SAMPLES = 9, 10, 11, 12


def iid(n: int, clients: int, seed: int) -> NDArray[np.int64]:
    """The client of each of `n` examples, [n]: a random split into sizes that differ by at most 1.

    With fewer examples than clients, some clients are empty. Raises InputError for n or
    clients < 1.
    """
    n, clients = integer(n, "n", 1), integer(clients, "clients", 1)
    return generator(seed, IID).permutation(np.arange(n, dtype=np.int64) % clients)


def dirichlet(
    labels: Any, clients: int, alpha: float, seed: int, min_size: int = 1
) -> NDArray[np.int64]:
    """The client of each example, [n]: label skew, by Dirichlet(alpha) shares of every class.

    The examples of a class are shuffled and split in proportions p ~ Dirichlet(alpha, ..., alpha)
    over the clients: client k gets n_c p_k of the n_c examples, rounded up or down at random
    without bias. Then clients below `min_size` are filled up with random examples of the largest
    clients. Any finite alpha > 0 works: as it falls, a class goes to a single client; as it grows,
    all clients get the same mix.

    `labels` are n integers or strings. Raises InputError for other labels, an alpha that is not
    positive and finite, and n < clients * min_size. Source: Yurochkin et al. 2019,
    arXiv:1905.12022 (experiments); Hsu et al. 2019, arXiv:1909.06335 study alpha as the skew.
    """
    labels, clients = categories(labels, "labels"), integer(clients, "clients", 1)
    check_positive(alpha, "alpha")
    check_min_size(min_size, clients, len(labels))
    rng = generator(seed, DIRICHLET)
    order = np.argsort(labels, kind="stable")
    sizes = np.unique(labels, return_counts=True)[1]
    client = np.empty(len(labels), dtype=np.int64)
    for members in np.split(order, np.cumsum(sizes)[:-1]):
        dealt = deal(_shares(clients, alpha, rng), len(members), rng)
        client[rng.permutation(members)] = dealt
    return fill_up(client, clients, min_size, rng)


def shards(labels: Any, clients: int, per_client: int = 2, *, seed: int) -> NDArray[np.int64]:
    """The client of each example, [n]: `per_client` random shards of label-sorted data each.

    The examples, sorted by label, are cut into clients * per_client shards whose sizes differ by at
    most 1. `labels` are n integers or strings. Raises InputError for other labels and for more
    shards than examples. Source: McMahan et al. 2017, arXiv:1602.05629, section 3 (the
    pathological non-IID split).
    """
    labels, clients = categories(labels, "labels"), integer(clients, "clients", 1)
    count = clients * integer(per_client, "per_client", 1)
    if count > len(labels):
        raise InputError(
            f"per_client: {clients} clients * {per_client} need {count} shards, "
            f"there are {len(labels)} examples; lower per_client or clients"
        )
    shard = np.arange(len(labels), dtype=np.int64) * count // len(labels)
    owner = generator(seed, SHARDS).permutation(count) // per_client
    client = np.empty(len(labels), dtype=np.int64)
    client[np.argsort(labels, kind="stable")] = owner[shard]
    return client


def natural(column: Any) -> NDArray[np.int64]:
    """The client of each example, [n]: one client for each value of a column, in sorted order.

    The column names who an example is from (a writer, a speaker, a device), as n integers or
    strings; InputError for others. `FederatedDataset.from_arrays(arrays, column)` groups in the
    same way and keeps the values as ids. Source: Caldas et al. 2018, arXiv:1812.01097 (LEAF).
    """
    return np.unique(categories(column, "column"), return_inverse=True)[1].astype(np.int64)


def categories(values: Any, name: str) -> NDArray[Any]:
    """`values` as an array [n] of integers or strings; InputError otherwise, or if n is 0."""
    array = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    if array.dtype == object and all(isinstance(value, str) for value in array.flat):
        array = array.astype(str)
    if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in "biuUST":
        raise InputError(
            f"{name}: expected n > 0 integers or strings, "
            f"got shape {list(array.shape)} of {array.dtype}"
        )
    return array


def check_range(client: NDArray[Any], clients: int) -> None:
    """InputError unless all of `client` [n] are integers in 0..clients-1."""
    if client.dtype.kind not in "iu":
        raise InputError(f"client: num_clients needs integers, got {client.dtype}")
    wrong = np.flatnonzero((client < 0) | (client >= clients))
    if len(wrong):
        raise InputError(
            f"client: example {wrong[0]} is given to client {client[wrong[0]]}, "
            f"expected 0..{clients - 1} (num_clients={clients})"
        )


def integer(value: Any, name: str, low: int) -> int:
    """`value` as an int >= `low`; InputError otherwise."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if number < low:
        raise InputError(f"{name}: expected an integer >= {low}, got {value!r}")
    return number


def check_positive(value: float, name: str) -> None:
    """InputError unless `value` is a positive, finite number."""
    if not 0 < value < math.inf:
        raise InputError(f"{name}: expected a positive, finite number, got {value}")


def check_min_size(min_size: int, clients: int, n: int) -> None:
    """InputError unless n examples suffice for `min_size` at every client."""
    if n < clients * integer(min_size, "min_size", 0):
        raise InputError(
            f"min_size: {clients} clients of at least {min_size} need {clients * min_size} "
            f"examples, there are {n}; lower min_size or clients"
        )


def generator(seed: int, stream: int) -> np.random.Generator:
    """The generator of one stream of a seed; InputError unless 0 <= seed < 2^63."""
    if integer(seed, "seed", 0) >= 2**63:
        raise InputError(f"seed: expected an integer below 2^63, got {seed}")
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))


def deal(shares: NDArray[Any], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The clients of n examples, [n], in order: client k has n shares[k] / sum(shares) of them.

    That number is rounded up or down at random, without bias.
    """
    ends = np.cumsum(shares)
    # Systematic sampling: evenly spaced points, shifted at random, over the clients' intervals.
    return np.searchsorted(ends, (np.arange(n) + rng.random()) / n * ends[-1])


def shuffle_groups(
    group: NDArray[np.int64], groups: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All examples, [n], group after group, each in random order; and their place in it, [n]."""
    shuffled = rng.permutation(len(group))
    order = shuffled[np.argsort(group[shuffled], kind="stable")]
    sizes = np.bincount(group, minlength=groups)
    return order, np.arange(len(group)) - (np.cumsum(sizes) - sizes)[group[order]]


def _shares(clients: int, alpha: float, rng: np.random.Generator) -> NDArray[Any]:
    """A draw of Dirichlet(alpha, ..., alpha), [clients], up to a common factor."""
    # Gamma(a) = Gamma(a + 1) U^(1/a), U = exp(-e) (Marsaglia and Tsang 2000, section 6). Gamma(a)
    # underflows to 0 at every client when a is small. A common factor cancels, so dividing by the
    # largest U^(1/a) keeps the largest share at the scale of 1.
    e = rng.standard_exponential(clients)
    with np.errstate(over="ignore"):
        log_power = (e.min() - e) / alpha
    return rng.standard_gamma(alpha + 1, clients) / (alpha + 1) * np.exp(log_power)


def fill_up(
    client: NDArray[np.int64], clients: int, min_size: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Move random examples of the largest clients to those with fewer than `min_size`.

    The largest clients are cut down to one common level, some to one above it. The level is at
    least `min_size`, because there are at least clients * min_size examples.
    """
    sizes = np.bincount(client, minlength=clients)
    lack = np.maximum(min_size - sizes, 0)
    larger = clients - np.cumsum(np.bincount(sizes))  # [t]: clients with more than t examples
    above = np.cumsum(larger[::-1])[::-1]  # [t]: examples in excess of t, over all clients
    level = np.flatnonzero(above >= lack.sum())[-1]
    give = np.maximum(sizes - level, 0)
    give[rng.choice(np.flatnonzero(give), above[level] - lack.sum(), replace=False)] -= 1

    grouped, rank = shuffle_groups(client, clients, rng)
    moved = rng.permutation(grouped[rank < give[client[grouped]]])
    client[moved] = np.repeat(np.arange(clients), lack)
    return client
