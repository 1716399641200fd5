"""Central privacy of the plain loop: McMahan et al. (ICLR 2018), Andrew et al. (NeurIPS 2021).

Written from docs/privacy.md and docs/design.md alone, in plain tensors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import philox


@dataclass(frozen=True)
class Private:
    """A promise: messages of norm at most `norm`, noise of `multiplier` times it on their sum."""

    norm: float
    multiplier: float
    cohort: float  # the denominator
    per: str = "norm"  # norm | layer
    most: float = 1.0  # the largest weight
    adaptive: tuple[float, float, float] | None = None  # quantile, learning rate, noise of a count


class Mechanism:
    """The clipping norm, and the noise, of a run."""

    def __init__(self, promise: Private, seed: int) -> None:
        self.promise, self.seed, self.norm = promise, seed, promise.norm
        self.below = 0.0

    def message(
        self, update: Tensor, weight: float, clip: Callable[[Tensor, str, float], Tensor]
    ) -> Tensor:
        """What a client of this weight sends; it is counted below the norm or above."""
        shared = update * weight / self.promise.most
        sent = clip(shared, self.promise.per, self.norm)
        if weight > 0:
            self.below += 0.5 if torch.equal(sent, shared) else -0.5
        return sent

    def mean(self, t: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The mean of messages [K, n] that round t releases."""
        std, cohort = self.std, self.promise.cohort

        def released(messages: Tensor, weights: Tensor) -> Tensor:
            noise = torch.from_numpy(philox.normals(self.seed, messages.shape[1], t=t))
            return (messages.sum(0) + std * noise) / cohort

        return released

    @property
    def std(self) -> float:
        z = self.promise.multiplier
        if self.promise.adaptive is not None:
            z = (z**-2 - (2 * self.promise.adaptive[2]) ** -2) ** -0.5
        return z * self.norm

    def end_round(self, t: int) -> None:
        if self.promise.adaptive is not None:
            quantile, lr, std = self.promise.adaptive
            noisy = self.below + std * float(philox.normals(self.seed, 1, t=t, step=1)[0])
            share = noisy / self.promise.cohort + 0.5
            self.norm *= math.exp(-lr * (share - quantile))
        self.below = 0.0
