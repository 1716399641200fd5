"""Aggregators: what the server makes of a cohort's messages where it is not their weighted mean.

Axes: C clients of the cohort, K rows of a commit, M numbers of a message.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vecfl.aggregate import MOST, Aggregate
from vecfl.algorithms.base import Aggregator, Algorithm, Upload
from vecfl.errors import InputError
from vecfl.mesh import Mesh


@dataclass(frozen=True)
class Kept:
    """Messages that wait for the others: `place` [K] in the cohort, and copies of the uploads."""

    place: np.ndarray
    upload: Upload


def aggregated_by(algorithm: Algorithm, aggregator: Aggregator) -> Algorithm:
    """`algorithm` whose server gets what `aggregator` makes of the messages, not their mean.

    aggregator  (messages [C, M] float64, weights [C] float64 > 0) -> [M]: of the clients that are
                finite and count, in the order of the cohort, behind all transforms of their side.
                It must not change them

    All messages of a cohort are held at once on each rank: C * M * 8 bytes, and beside them the
    copies that its workers kept, in the run's dtype, of the clients that it trained; once more
    C * M * 8 bytes where some clients do not count, and as much for what the aggregator itself
    makes, such as a sorted copy. Where nobody counts it is not called, and the model stays as it
    is. Raises InputError where `algorithm` has an aggregator or delays, for SCAFFOLD and FedDyn,
    and in a round for a result that is not M finite numbers.
    """
    name = getattr(aggregator, "__qualname__", type(aggregator).__qualname__)
    if algorithm.delay is not None:
        raise InputError(f"{algorithm.name}: {name} needs all messages at once, none may be late")
    if algorithm.privacy is not None:
        raise InputError(
            f"{algorithm.name}: its noise is for the sum of messages, and nobody bounds how much a "
            f"client moves {name}"
        )
    if algorithm.keeps is not None:
        raise InputError(
            f"{algorithm.name}: what its clients keep adds up to what the server keeps of the mean "
            f"of their messages; {name} is another"
        )
    if algorithm.aggregator is not None:
        raise InputError(f"{algorithm.name}: has an aggregator; {name} would be a second one")
    return replace(algorithm, name=f"{algorithm.name}, {name}", aggregator=aggregator)


def keep(place: np.ndarray, upload: Upload) -> Kept:
    """Copies of what finite clients uploaded, whose rows may be views of the slots."""
    logs = None if upload.log_weight is None else upload.log_weight.clone()
    update, weight = upload.update.clone(), upload.weight.clone()
    return Kept(place, Upload(update, weight, log_weight=logs))


def combined(
    mesh: Mesh, kept: Sequence[Kept], clients: int, sums: Aggregate, algorithm: Algorithm
) -> Aggregate:
    """`sums` of a cohort with the aggregator's result as total, of weight 1.

    kept  those of this rank; the shift of `sums` is that of all ranks
    """
    assert algorithm.aggregator is not None
    update = sums.total.new_zeros(clients, len(sums.total))
    weight = sums.weight.new_zeros(clients)
    for some in kept:
        place = torch.from_numpy(some.place).to(update.device)
        update[place] = some.upload.update.double()
        weight[place] = weight_of(some.upload, sums.shift)
    update, weight = mesh.sum(update, weight)
    counted = weight > 0
    if not counted.any():
        return sums
    if not counted.all():
        update, weight = update[counted], weight[counted]
    found = algorithm.aggregator(update, weight)
    return replace(sums, total=checked(found, sums, algorithm), weight=weight.new_ones(()))


def weight_of(upload: Upload, shift: Tensor | None) -> Tensor:
    """The weights [K] of clients in range: weights that are logs are divided by exp(shift)."""
    if upload.log_weight is None:
        return upload.weight
    logs = upload.log_weight - (0 if shift is None else shift)
    return upload.weight * logs.clamp(min=-MOST).exp()


def checked(found: object, sums: Aggregate, algorithm: Algorithm) -> Tensor:
    """What the aggregator gave, as float64 [M]; InputError where it is something else."""
    what = f"{algorithm.name}: its aggregator"
    if not isinstance(found, Tensor) or found.shape != sums.total.shape:
        given = list(found.shape) if isinstance(found, Tensor) else repr(found)
        raise InputError(f"{what} gave {given}; expected a tensor {list(sums.total.shape)}")
    if not found.isfinite().all():
        raise InputError(f"{what} gave numbers that are not finite")
    return found.double()
