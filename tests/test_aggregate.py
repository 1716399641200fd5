"""The weighted mean as a fold."""

import math

import pytest
import torch
from torch import Tensor

from vecfl.aggregate import Aggregate, add_, add_extra_, empty, exact_grid, left_grid, merge_
from vecfl.errors import InputError

CPU = torch.device("cpu")


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_mean_by_hand() -> None:
    """(1 * [1, 2] + 3 * [5, -2] + 0 * [9, 9]) / 4 = [4, -1]."""
    aggregate = empty(2, CPU)
    add_(aggregate, torch.tensor([[1.0, 2.0], [5.0, -2.0]]), doubles(1, 3))
    add_(aggregate, torch.tensor([[9.0, 9.0]]), doubles(0))
    mean = aggregate.mean()
    assert mean is not None and mean.tolist() == [4, -1] and mean.dtype == torch.float64
    assert aggregate.total.tolist() == [16, -4] and aggregate.weight == 4


def test_without_positive_weight_there_is_no_mean() -> None:
    aggregate = empty(2, CPU)
    assert aggregate.mean() is None
    add_(aggregate, torch.ones(2, 2), doubles(0, 0))
    assert aggregate.mean() is None
    add_(aggregate, torch.ones(1, 2), doubles(1e-12))
    mean = aggregate.mean()
    assert mean is not None and mean.tolist() == pytest.approx([1, 1])


def test_how_rows_are_cut_does_not_matter() -> None:
    """Sums are of float64: ten thousand times 1/3 in float32 would be off by 1e-5 and more."""
    rows, weight = torch.full((10_000, 1), 1 / 3), torch.full((10_000,), 0.1).double()
    means = []
    for size in (1, 7, 10_000):
        aggregate = empty(1, CPU)
        for part, w in zip(rows.split(size), weight.split(size), strict=True):
            add_(aggregate, part, w)
        mean = aggregate.mean()
        assert mean is not None
        means.append(mean.item())
    assert means == pytest.approx([rows[0].item()] * 3, rel=1e-12)


def test_aggregates_share_no_memory() -> None:
    one, two = empty(2, CPU), empty(2, CPU)
    add_(one, torch.ones(1, 2), doubles(1))
    assert not two.total.any() and two.weight == 0 and one.weight == 1


def exactly(rows: Tensor, weight: Tensor, grid: float, order: Tensor, parts: int) -> Aggregate:
    """The rows in this order, in so many aggregates, some of them merged in reverse."""
    found = [empty(rows.shape[1], CPU, grid) for _ in range(parts)]
    for i, some in enumerate(order.split(7)):
        add_(found[i % parts], rows[some], weight[some])
    for other in reversed(found[1:]):
        merge_(found[0], other)
    return found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_sums_have_the_same_bits_in_any_order_and_parts(dtype: torch.dtype) -> None:
    """Plain sums of the same numbers differ, so that these orders do ask for something."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 50, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randint(1, 60, (60,), generator=g).double() + 1 / 3
    orders = [torch.randperm(60, generator=g) for _ in range(8)]
    grid = exact_grid(int(weight.sum()))
    first = exactly(rows, weight, grid, orders[0], 1)
    plain = set()
    for parts in (1, 2, 3):
        for order in orders:
            found = exactly(rows, weight, grid, order, parts)
            assert torch.equal(found.total, first.total) and found.weight == first.weight
            other = empty(50, CPU)
            for some in order.split(parts):
                add_(other, rows[some], weight[some])
            plain.add(tuple(other.total.tolist()))
    assert len(plain) > 1 and not left_grid(first, 60)
    right = weight @ rows.double()
    step = grid / 1.5 * 2.0**-52
    assert (
        first.total - right
    ).abs().max() <= 60 * step  # 60 roundings by half a step, and the sum


def test_the_grid_by_hand() -> None:
    """1,200 examples are at most 2^11: g = 1.5 * 2^19, steps of 2^-33."""
    assert [exact_grid(n) for n in (0, 1, 2, 1200, 2048)] == [
        1.5 * 2.0**k for k in (8, 8, 9, 19, 19)
    ]
    aggregate = empty(2, CPU, exact_grid(1200))
    add_(aggregate, doubles(1 + 2.0**-34, 2.0**-35)[None], doubles(3))
    # 3 + 1.5 steps is a tie, which goes to the even 2 steps; 0.75 of a step is 1.
    assert aggregate.total.tolist() == [3 + 2.0**-32, 2.0**-33] and aggregate.weight == 3


def test_what_leaves_the_grid_is_told_and_still_right() -> None:
    """Eight examples: weights times largest numbers may add up to 2^(3 + 7) = 1024.

    Beyond 2^11 products round to twice the step, and 1,000 of them in order and reversed differ.
    """
    grid = exact_grid(8)
    inside, outside = empty(1, CPU, grid), empty(1, CPU, grid)
    add_(inside, doubles(-128, 1)[:, None], doubles(7, 127.5))  # 7 * 128 + 127.5 < 1024
    add_(outside, doubles(-128, 1)[:, None], doubles(7, 128.5))
    assert (inside.bound, outside.bound) == (1023.5, 1024.5)
    assert (left_grid(inside, 2), left_grid(outside, 2)) == (False, True)
    half = empty(1, CPU, grid)
    add_(half, doubles(1)[:, None], doubles(0.5))
    merge_(inside, half)  # 1024, just inside
    assert not left_grid(inside, 3)
    merge_(inside, half)
    assert left_grid(inside, 4)
    far = empty(1, CPU, grid)
    add_(far, doubles(1e12, 1 / 3)[:, None], doubles(1, 1))
    assert far.total.item() == pytest.approx(1e12 + 1 / 3, rel=1e-15) and left_grid(far, 2)


def test_weights_too_small_for_the_grid_are_refused() -> None:
    """8 examples: steps of 2^-41; one client is rounded by 2^-42, and that is 2^-24 of 2^-18."""
    for weight, refused in ((2.0**-18, False), (2.0**-19, True)):
        aggregate = empty(1, CPU, exact_grid(8))
        add_(aggregate, torch.ones(1, 1), doubles(weight))
        if not refused:
            assert not left_grid(aggregate, 1)
            continue
        with pytest.raises(InputError) as caught:
            left_grid(aggregate, 1)
        assert str(caught.value) == (
            "exact_sums: weights add up to 1.9e-06, too little for sums of multiples of 5e-13; "
            "make them larger, all by the same factor (dga: a smaller softmax_beta), or go "
            "without exact sums"
        )


def by_logs(logs: list[float], weight: list[float], parts: int, grid: float | None) -> Aggregate:
    """Messages 0, 1, 2, ... with these weights, each by itself, in aggregates that are merged."""
    found = [empty(1, CPU, grid) for _ in range(parts)]
    for aggregate in found:  # a worker without a client
        add_(aggregate, torch.zeros(0, 1), doubles(), doubles())
    for i, (log, a) in enumerate(zip(logs, weight, strict=True)):
        add_(found[i % parts], doubles(i)[:, None], doubles(a), doubles(log))
    for other in found[:0:-1]:
        merge_(found[0], other)
    return found[0]


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("away", [0.0, 5.0, 1e5, -1e5, 1e300])
def test_weights_as_logs(away: float, parts: int) -> None:
    """exp(away + log 1, 2, 4, 1) times 1, 1, 3, 0 on 0, 1, 2, 3: (2 + 24) / (1 + 2 + 12)."""
    logs = [away, away + math.log(2), away + math.log(4), away + 900]
    sums = by_logs(logs, [1, 1, 3, 0], parts, None)
    mean, right = sums.mean(), 26 / 15 if away < 1e300 else 7 / 5  # their logs are the same there
    assert mean is not None and mean.item() == pytest.approx(right, rel=1e-10)
    assert sums.shift is not None and sums.shift == max(logs[:3])  # of who counts
    assert sums.weight == pytest.approx(15 / 4 if away < 1e300 else 5, rel=1e-10)


def test_logs_of_nobody() -> None:
    for weights in ([], [0.0, 0.0]):
        sums = by_logs([3.0, -1e9][: len(weights)], weights, 3, None)
        assert sums.mean() is None and sums.weight == 0 and sums.total == 0


def test_a_log_of_zero_changes_no_bit() -> None:
    plain, logs = empty(1, CPU), empty(1, CPU)
    for i in range(20):
        add_(plain, doubles(i / 3)[:, None], doubles(0.1 * i))
        add_(logs, doubles(i / 3)[:, None], doubles(0.1 * i), doubles(0))
    assert torch.equal(plain.total, logs.total) and torch.equal(plain.weight, logs.weight)


def test_logs_on_a_grid_are_not_shifted() -> None:
    """Weights 1/2 and 4 whatever comes first; 8 examples: multiples of 2^-41."""
    for logs in ([-math.log(2), math.log(4)], [math.log(4), -math.log(2)]):
        sums = by_logs(logs, [1, 1], 2, exact_grid(8))
        assert sums.shift is None and sums.weight.item() == pytest.approx(4.5, rel=1e-12)
        assert (sums.weight.item() * 2.0**41).is_integer()


def test_extra_numbers_on_a_grid() -> None:
    """Thirds are rounded each by itself: any order of them gives the same bits."""
    grid, found = exact_grid(4), set()
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        one, two = empty(1, CPU, grid), empty(1, CPU, grid)
        values = doubles(1 / 3, 7 / 3, 1e3 / 3, 1e-3 / 3)[order]
        add_extra_(one, {"a": values[:1]})
        add_extra_(two, {"a": values[1:], "b": torch.tensor([True, True])})
        merge_(one, two)
        assert one.extra["b"] == 2 and one.extra["a"].dtype == torch.float64
        found.add(one.extra["a"].item())
    assert len(found) == 1 and found.pop() == pytest.approx((8 + 1e3 + 1e-3) / 3, rel=1e-12)
