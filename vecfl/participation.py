"""Who can take part in a round: availability, turns, dropout; and is a cohort one at all?"""

import math
from collections.abc import Callable
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecfl.errors import InputError, is_integer
from vecfl.random import LIMITS, Kind, permutation, stream, words
from vecfl.sampling import Sampler

Trace = Tensor | Callable[[int], Tensor]
GROUPS, DROPOUT = 3, 4  # steps of streams of kind cohort; those before are of samplers


def separated(sampler: Sampler, rounds: int) -> Sampler:
    """`sampler` with at least `rounds` rounds from one participation of a client to its next.

    The clients are shuffled once into `rounds` groups of equal size (to one); in round t those of
    group t mod `rounds` are eligible. With `poisson` inside it is the sampling of Choquette-Choo et
    al., "(Amplified) banded matrix factorization", NeurIPS 2023. `cyclic` has turns
    of its own, most of which are missed inside these. Raises InputError where there are more groups
    than clients.
    """
    if not is_integer(rounds) or rounds < 1:
        raise InputError(f"participations are separated by at least 1 round, not {rounds!r}")

    def sample(eligible: Tensor, seed: int, round: int) -> Tensor:
        if rounds > len(eligible):
            raise InputError(
                f"{len(eligible)} clients cannot take turns over {rounds} rounds; "
                f"separate them by at most {len(eligible)}"
            )
        turn = torch.zeros_like(eligible)
        turn[turns(len(eligible), seed)[round % rounds :: rounds]] = True
        return sampler(eligible & turn, seed, round)

    return sample


def available(sampler: Sampler, trace: Trace) -> Sampler:
    """`sampler` among the clients that a trace says are there.

    trace: bool [R, N], a row a round, from the first again after the last; or a function from the
    round (from 0) to bool [N].
    """
    there = checked_trace(trace, "availability")
    return lambda eligible, seed, round: sampler(
        eligible & row(there, round, len(eligible), "availability"), seed, round
    )


def checked_dropout(dropout: Any) -> float | Trace:
    """`dropout` of clients: a probability in [0, 1), or a trace; InputError if it is neither."""
    if isinstance(dropout, Real) and not isinstance(dropout, bool):
        rate = float(dropout)
        if not 0 <= rate < 1:
            raise InputError(f"client_dropout: a probability is in [0, 1), not {dropout}")
        return rate
    return checked_trace(dropout, "client_dropout")


def lost(dropout: float | Trace, cohort: Tensor, population: int, seed: int, round: int) -> Tensor:
    """Which clients of `cohort` [C] drop out before they send anything, bool [C].

    dropout: the probability of each client, or a trace (as in `available`) that is True where a
    client would drop out. A client that was drawn twice is lost with both.
    """
    if not isinstance(dropout, float):
        return row(dropout, round, population, "client_dropout")[cohort]
    if dropout == 0:
        return torch.zeros_like(cohort, dtype=torch.bool)
    streams = stream(Kind.COHORT, client=cohort, round=round, step=DROPOUT)
    return words(seed, streams, 1).flatten() < math.floor(dropout * 2**32)


def checked(cohort: Tensor, population: int, round: int) -> Tensor:
    """`cohort` [C]; InputError unless it holds int64 positions in the population."""
    fits = isinstance(cohort, Tensor) and cohort.dtype == torch.int64 and cohort.dim() == 1
    if not fits or ((cohort < 0) | (cohort >= population)).any():
        seen = f"{cohort.tolist()[:5]} ({cohort.dtype})" if fits else kind(cohort)
        raise InputError(
            f"the sampler gave {seen} in round {round + 1}; "
            f"clients are int64 positions from 0 to {population - 1}"
        )
    clients, often = cohort.unique(return_counts=True)
    most = 1 << LIMITS["occurrence"]
    for k, times in zip(clients[often > most].tolist(), often[often > most].tolist(), strict=True):
        raise InputError(
            f"the sampler drew client {k} {times} times in round {round + 1}; "
            f"a client has random numbers for {most} of them"
        )
    return cohort


def checked_trace(trace: Any, name: str) -> Trace:
    """`trace` as a tensor or a function; InputError unless it is bool [R, N] with R >= 1."""
    if callable(trace):
        return trace
    try:
        mask = torch.as_tensor(trace)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{name}: expected bool [rounds, clients] or a function of the round, got {trace!r}"
        ) from None
    if mask.dtype != torch.bool or mask.dim() != 2 or not len(mask):
        raise InputError(
            f"{name}: expected bool [rounds, clients] or a function of the round, got {kind(mask)}"
        )
    return mask.cpu()


def kind(value: Any) -> str:
    """How messages tell what a value is."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def row(trace: Trace, round: int, population: int, name: str) -> Tensor:
    """What a trace says of a round, bool [N] on the CPU."""
    mask = trace[round % len(trace)] if isinstance(trace, Tensor) else trace(round)
    mask = torch.from_numpy(mask) if isinstance(mask, np.ndarray) else mask
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (population,):
        raise InputError(
            f"{name} in round {round + 1}: expected bool [{population}], got {kind(mask)}"
        )
    return mask.cpu()


@lru_cache(maxsize=2)
def turns(population: int, seed: int) -> Tensor:
    """The order [N] in which clients are dealt to groups; not to be written to."""
    return permutation(seed, stream(Kind.COHORT, step=GROUPS), population)
