"""The weighted mean of a cohort as a fold, so that rows stream through and are never all held."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vecfl_kernels import weighted_sum_


@dataclass
class Aggregate:
    """Sums over clients, not means.

    total   [M] float64, the weighted sum of what clients sent
    weight  [] float64, the sum of weights
    """

    total: Tensor
    weight: Tensor

    def mean(self) -> Tensor | None:
        """The weighted mean [M], float64; None if no client had a positive weight."""
        return self.total / self.weight if self.weight > 0 else None


def empty(length: int, device: torch.device) -> Aggregate:
    """An empty aggregate of messages of `length` numbers."""
    total = torch.zeros(length, dtype=torch.float64, device=device)
    return Aggregate(total, total.new_zeros(()))


def add_(aggregate: Aggregate, update: Tensor, weight: Tensor) -> None:
    """Fold in the messages `update` [K, M] with `weight` [K] float64."""
    weighted_sum_(aggregate.total, update, weight)
    aggregate.weight += weight.sum()


def merge_(aggregate: Aggregate, other: Aggregate) -> None:
    """Fold in another aggregate."""
    aggregate.total += other.total
    aggregate.weight += other.weight
