"""How much a client counts in the mean: functions of finished rows that give float64 [K]."""

from collections.abc import Callable

import torch
from torch import Tensor

from vecfl.algorithms.base import Finished
from vecfl.errors import InputError

Weights = Callable[[Finished], Tensor]


def most(weights: Weights) -> float | None:
    """The largest that these weights can be, their attribute `most`; None: nobody has told it."""
    return getattr(weights, "most", None)


def by_examples(done: Finished) -> Tensor:
    """n_k, the examples that the client trains on (McMahan et al., AISTATS 2017)."""
    return done.examples.double()


def uniform_weights(done: Finished) -> Tensor:
    """1 for every client, one without examples included: its zero update pulls the mean to zero."""
    return torch.ones_like(done.examples, dtype=torch.float64)


uniform_weights.most = 1.0  # type: ignore[attr-defined]


def capped(limit: int) -> Weights:
    """min(n_k, limit): no client counts for more than `limit` examples."""
    if limit <= 0:
        raise InputError(f"capped(limit={limit}): must be positive")

    def at_most(done: Finished) -> Tensor:
        return done.examples.double().clamp(max=limit)

    at_most.__qualname__ = f"capped({limit})"
    at_most.most = float(limit)  # type: ignore[attr-defined]
    return at_most


def by_tokens(done: Finished) -> Tensor:
    """n_k times the mean loss weight of the client's examples: its tokens, for a token loss."""
    return done.examples * done.weight / done.seen.clamp(min=1)
