"""The weighted mean of a cohort as a fold, so that rows stream through and are never all held."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vecfl.errors import InputError
from vecfl_kernels import exact_weighted_sum_, row_largest, weighted_sum_

HEADROOM = 8  # bits between the examples of a cohort and its grid: see `exact_grid`
MOST = 700.0  # a weight of exp(-700) is still a number
COARSE = 2.0**-24  # a mean that is rounded more than float32 rounds 1 is refused


@dataclass
class Aggregate:
    """Sums over clients, not means.

    total   [M] float64, the weighted sum of what clients sent
    weight  [] float64, the sum of weights
    grid    what every addend is rounded by, so that sums are exact (`exact_grid`); None: by nothing
    bound   [] float64, with a grid: no sum of these addends, in any order, is greater
    extra   {name: [] float64}, sums of further numbers that clients sent, without weights
    shift   [] float64, with weights that came as logs: `total` and `weight` are divided by
            exp(shift), the largest of them; None: they are sums as they stand
    late    {rounds: sums of messages that arrive so many rounds later}; they are in no other sum
    """

    total: Tensor
    weight: Tensor
    grid: float | None
    bound: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)
    shift: Tensor | None = None
    late: "dict[int, Aggregate]" = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """Whether a client had a positive weight."""
        return bool(self.weight > 0)

    def mean(self) -> Tensor | None:
        """The weighted mean [M], float64; None if no client had a positive weight."""
        return self.total / self.weight if self.counts else None


def empty(length: int, device: torch.device, grid: float | None = None) -> Aggregate:
    """An empty aggregate of messages of `length` numbers."""
    total = torch.zeros(length, dtype=torch.float64, device=device)
    return Aggregate(total, total.new_zeros(()), grid, total.new_zeros(()))


def late_(aggregate: Aggregate, rounds: int) -> Aggregate:
    """The sums of what arrives so many rounds later; at 0 those of what arrives now."""
    if rounds and rounds not in aggregate.late:
        aggregate.late[rounds] = none_like(aggregate)
    return aggregate.late[rounds] if rounds else aggregate


def none_like(like: Aggregate) -> Aggregate:
    """Sums of no message, of the same length and the same names."""
    new = empty(len(like.total), like.total.device, like.grid)
    new.extra = {name: torch.zeros_like(value) for name, value in like.extra.items()}
    new.shift = None if like.shift is None else torch.full_like(like.shift, -torch.inf)
    return new


def everyone(aggregate: Aggregate) -> Aggregate:
    """The sums over all who trained, whenever their messages arrive."""
    if not aggregate.late:
        return aggregate
    result = none_like(aggregate)
    for part in (aggregate, *aggregate.late.values()):
        merge_(result, copied(part))
    return result


def copied(sums: Aggregate) -> Aggregate:
    """A copy that may be merged, without what is late."""
    return replace(sums, total=sums.total.clone(), weight=sums.weight.clone(), late={})


def add_(
    aggregate: Aggregate, update: Tensor, weight: Tensor, log_weight: Tensor | None = None
) -> None:
    """Fold in the messages `update` [K, M] with `weight` [K] float64, at least 0.

    With `log_weight` [K] float64 a client counts weight * exp(log_weight).
    """
    if log_weight is not None:
        weight = weight * from_logs_(aggregate, log_weight, weight > 0)
    if aggregate.grid is None:
        weighted_sum_(aggregate.total, update, weight)
    else:
        exact_weighted_sum_(aggregate.total, update, weight, aggregate.grid)
        aggregate.bound += weight @ row_largest(update).double().clamp(min=1)
    aggregate.weight += on_grid(weight, aggregate.grid).sum()


def from_logs_(aggregate: Aggregate, log_weight: Tensor, counted: Tensor) -> Tensor:
    """exp(log_weight - shift) [K], where the shift has grown to the largest that is `counted`.

    On a grid the shift is 0, for what the grid rounds must not depend on who came before.
    """
    if aggregate.grid is not None:
        return log_weight.clamp(min=-MOST).exp()
    nothing = log_weight.new_full((1,), -torch.inf)
    largest = torch.cat((nothing, log_weight.where(counted, nothing))).max()
    shift = largest if aggregate.shift is None else torch.maximum(aggregate.shift, largest)
    shift_(aggregate, shift)
    return (log_weight - shift).where(counted, 0).exp()


def shift_(aggregate: Aggregate, shift: Tensor) -> None:
    """Divide the sums by exp(shift), and no more by the shift that they had."""
    old = shift if aggregate.shift is None else aggregate.shift
    factor = (old - shift).exp().where(old != shift, 1)  # not of -inf + inf, where nobody came
    aggregate.total *= factor
    aggregate.weight *= factor
    aggregate.shift = shift


def add_extra_(aggregate: Aggregate, extra: Mapping[str, Tensor]) -> None:
    """Fold in the numbers [K] of clients by name; with a grid, each is rounded by it."""
    for name, values in extra.items():
        total = on_grid(values.double(), aggregate.grid).sum()
        aggregate.extra[name] = aggregate.extra.get(name, 0) + total


def merge_(aggregate: Aggregate, other: Aggregate) -> None:
    """Fold in another aggregate; with logs both get the larger shift."""
    if aggregate.shift is not None and other.shift is not None:
        shift = torch.maximum(aggregate.shift, other.shift)
        shift_(aggregate, shift)
        shift_(other, shift)
    aggregate.total += other.total
    aggregate.weight += other.weight
    aggregate.bound += other.bound
    for name, value in other.extra.items():
        aggregate.extra[name] = aggregate.extra.get(name, 0) + value
    for rounds, late in other.late.items():
        merge_(late_(aggregate, rounds), late)


def exact_grid(examples: int) -> float:
    """The grid of a cohort with at most 2^e examples in all: 1.5 * 2^(8 + e).

    Addends become multiples of 2^(e - 44). Their sums are exact, so they have the same bits in any
    order and in any parts, while the clients' weights, each times the largest number that the
    client sends (or 1), add up to at most 2^(e + 7): with weights by examples, while the largest
    |w - w_k| of the clients is at most 128 in the weighted mean.
    """
    return 1.5 * 2.0 ** (HEADROOM + (max(1, examples) - 1).bit_length())


def on_grid(values: Tensor, grid: float | None) -> Tensor:
    """float64 `values` on the grid, or as they are."""
    return values if grid is None else (values + grid) - grid


def left_grid(aggregate: Aggregate, clients: int) -> bool:
    """Whether sums over so many clients may have left the range in which their grid is exact.

    One of them has a positive weight. Outside, sums are right as float64 sums are, but their last
    bits may depend on the order. Raises InputError where the weights are so small that the grid is
    too coarse for the mean.
    """
    if aggregate.grid is None:
        return False
    step = aggregate.grid / 1.5 * 2.0**-52
    if clients**0.5 * step / 2 > COARSE * aggregate.weight:
        raise InputError(
            f"exact_sums: weights add up to {float(aggregate.weight):.2g}, too little for sums "
            f"of multiples of {step:.1g}; make them larger, all by the same factor (dga: a smaller "
            "softmax_beta), or go without exact sums"
        )
    return bool(aggregate.bound > aggregate.grid / 3)
