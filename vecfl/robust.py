"""Aggregators for cohorts some of whose clients may send anything (Yin et al., ICML 2018,
arXiv:1803.01498). For `vecfl.aggregated_by`; clients count alike, whatever their weights.
"""

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from vecfl.algorithms.base import Aggregator
from vecfl.errors import InputError


def coordinate_median() -> Aggregator:
    """Each number is the median of the clients' (Definition 1), for even C the middle of two."""

    def coordinate_median(messages: Tensor, weights: Tensor) -> Tensor:
        middle = (len(messages) - 1) // 2, len(messages) // 2
        if messages.is_cpu:  # a third of the time of sorting
            ordered = torch.from_numpy(np.partition(messages.numpy(), middle, axis=0))
        else:
            ordered = messages.sort(0).values
        return (ordered[middle[0]] + ordered[middle[1]]) / 2

    coordinate_median.__qualname__ = "coordinate_median"
    return coordinate_median


def trimmed_mean(share: float) -> Aggregator:
    """Each number is the mean of the clients' without the `share` greatest and as many least.

    Definition 2: floor(share * C) of C clients are left out at either end. Raises InputError unless
    0 <= share < 1/2.
    """
    if not 0 <= share < 0.5:
        raise InputError(f"trimmed_mean(share={share}): must be at least 0 and below 0.5")

    exact = Fraction(str(float(share)))  # as it is written: 0.29 * 100 is below 29

    def trimmed_mean(messages: Tensor, weights: Tensor) -> Tensor:
        clients = len(messages)
        out = math.floor(exact * clients)
        return messages.sort(0).values[out : clients - out].mean(0)

    trimmed_mean.__qualname__ = f"trimmed_mean({float(share)})"
    return trimmed_mean
