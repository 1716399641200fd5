"""The weighted mean as a fold."""

import pytest
import torch
from torch import Tensor

from vecfl.aggregate import add_, empty

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
