"""Distinct clients, uniformly: by a word for each of them, or by points among very many."""

import logging
import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vecfl.errors import InputError
from vecfl.random import Kind, stream, words

log = logging.getLogger("vecfl")
LARGE = 1 << 17  # clients, whose words take a millisecond or two
POINTS = 7  # a step of streams of kind cohort


def client_words(eligible: Tensor, seed: int, round: int) -> Tensor:
    """A word for each client of the population, int64 [N] in [0, 2^32)."""
    return words(seed, stream(Kind.COHORT, round=round), len(eligible))


def fits_population(size: int, population: int) -> None:
    """InputError unless a cohort of `size` distinct clients can be."""
    if size > population:
        raise InputError(
            f"a cohort of {size} clients is larger than the population of {population}; "
            f"choose at most {population}"
        )


def distinct(eligible: Tensor, seed: int, round: int, size: int) -> Tensor:
    """`size` of the eligible clients, all of them where they are fewer.

    Those of smallest word; of a large population, for a small part of which words are too many,
    those that come first among random points.
    """
    population = len(eligible)
    fits_population(size, population)
    if (count := int(eligible.count_nonzero())) < size:
        say_short(size, population)
    points = population * size // max(1, count)  # of which `size` are eligible
    if population > LARGE and size <= count // 8 and points <= population // 8:
        return by_points(eligible, seed, round, size, points)
    word = client_words(eligible, seed, round)
    few = size + 8 * math.sqrt(size) + 16  # more than this many are below the limit, but for luck
    limit = int(min(1.0, few / max(1, count)) * 2**32)
    at = (eligible & (word < limit)).nonzero().flatten()
    if len(at) < size:
        at = eligible.nonzero().flatten()
    return at[((word[at] << 31) | at).argsort()[:size]]


def by_points(eligible: Tensor, seed: int, round: int, size: int, points: int) -> Tensor:
    """The first `size` distinct eligible clients of an endless sequence of uniform points.

    points  about how many it takes; half as many again are looked at, and so on
    """
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < size:
        points += points // 2 + 16
        word = words(seed, stream(Kind.COHORT, round=round, step=POINTS), 2 * points)
        high, low = word.view(-1, 2).unbind(1)
        at = ((high << 31) | (low >> 1)) % len(eligible)
        some = at[eligible[at]].numpy()
        found = torch.from_numpy(some[np.sort(np.unique(some, return_index=True)[1])])
    return found[:size]


@lru_cache(maxsize=64)
def say_short(size: int, population: int) -> None:
    """A warning, once, that a cohort is smaller than asked for."""
    log.warning(
        "a cohort of %d was asked for, but turns or availability leave fewer of the %d clients; "
        "train/cohort tells how many (said once)",
        *(size, population),
    )
