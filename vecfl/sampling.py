"""Which clients take part in a round: pure functions of (population, seed, round)."""

from collections.abc import Callable

import torch
from torch import Tensor

from vecfl.errors import InputError, is_integer
from vecfl.random import Kind, stream, words

Sampler = Callable[[int, int, int], Tensor]


def uniform(size: int) -> Sampler:
    """`size` clients uniformly without replacement: (population, seed, round) -> int64 [size].

    Raises InputError if the population is smaller.
    """
    if not is_integer(size) or size < 1:
        raise InputError(f"a cohort has at least 1 client, not {size!r}")

    def sample(population: int, seed: int, round: int) -> Tensor:
        if size > population:
            raise InputError(
                f"a cohort of {size} clients is larger than the population of {population}; "
                f"choose at most {population}"
            )
        draws = words(seed, stream(Kind.COHORT, round=round), population)
        keys = (draws << 31) | torch.arange(population)
        return keys.topk(size, largest=False, sorted=True).indices

    return sample


def everyone() -> Sampler:
    """All clients, each round, in their order."""
    return lambda population, seed, round: torch.arange(population)


def checked(cohort: Tensor, population: int, round: int) -> Tensor:
    """`cohort` [C]; InputError unless it holds distinct int64 positions in the population."""
    if cohort.dtype != torch.int64 or ((cohort < 0) | (cohort >= population)).any():
        raise InputError(
            f"the sampler gave {cohort.tolist()[:5]} ({cohort.dtype}) in round {round + 1}; "
            f"clients are int64 positions from 0 to {population - 1}"
        )
    if len(cohort.unique()) < len(cohort):
        raise InputError(f"the sampler drew a client twice in round {round + 1}; ids are unique")
    return cohort
