"""The float64 sum of weighted rows, against math.fsum of every column."""

import math

import pytest
import torch
from torch import Tensor

from vecfl_kernels import exact_weighted_sum_, weighted_sum_


def numbers(seed: int, *shape: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def check(total: Tensor, rows: Tensor, weight: Tensor) -> None:
    """Every product and every sum rounds to 2^-53 of what is added up, at most K + 1 times each."""
    wide, before = rows.double(), total.clone()
    weighted_sum_(total, rows, weight)
    for m in range(len(total)):
        terms = [float(before[m])] + [float(p) for p in weight * wide[:, m]]
        bound = 2.0**-53 * (len(terms) + 1) * math.fsum(map(abs, terms))
        assert abs(total[m].item() - math.fsum(terms)) <= bound


@pytest.mark.parametrize("m", [1, 7, 257])
@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_accuracy(k: int, m: int, dtype: torch.dtype) -> None:
    check(numbers(1, m), numbers(2, k, m).to(dtype), numbers(3, k).exp())


def test_weights_and_sums_of_very_different_size() -> None:
    """In float32 2^30 + 1 is 2^30; here all but nothing is lost."""
    total = torch.zeros(3, dtype=torch.float64)
    rows = torch.tensor([[1.0, 0.0, 1e-30], [2.0**-30, 1.0, 1e30]])
    weighted_sum_(total, rows, torch.tensor([2.0**30, 1.0], dtype=torch.float64))
    assert total[:2].tolist() == [2**30 + 2**-30, 1] and total[2] == rows[1, 2].double()
    weight = torch.tensor([1e-40, 1e40], dtype=torch.float64)  # no number of float32
    total.zero_()
    weighted_sum_(total, torch.ones(2, 3), weight)
    assert total.tolist() == [1e40] * 3


def test_no_rows_add_nothing() -> None:
    total = numbers(1, 5)
    before = total.clone()
    weighted_sum_(total, torch.empty(0, 5), torch.empty(0, dtype=torch.float64))
    assert torch.equal(total, before)


def test_rows_need_not_be_contiguous() -> None:
    table = numbers(4, 23, 40).float()
    check(numbers(1, 20), table[:, ::2], numbers(3, 23))
    check(numbers(1, 23), table.T, numbers(3, 40))
    check(numbers(1, 40), table[:1].expand(19, 40), numbers(3, 19))


def test_parts_add_up_to_the_whole() -> None:
    rows, weight = numbers(2, 37, 11).float(), numbers(3, 37)
    whole, parts = torch.zeros(11).double(), torch.zeros(11).double()
    weighted_sum_(whole, rows, weight)
    for cut in (slice(0, 5), slice(5, 5), slice(5, 30), slice(30, 37)):
        weighted_sum_(parts, rows[cut], weight[cut])
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-13)


def test_arguments_stay_as_they_are() -> None:
    rows, weight = numbers(2, 17, 3), numbers(3, 17)
    kept = rows.clone(), weight.clone()
    weighted_sum_(torch.zeros(3, dtype=torch.float64), rows, weight)
    assert torch.equal(rows, kept[0]) and torch.equal(weight, kept[1])


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_rows_longer_than_a_tile(rows: int) -> None:
    g = torch.Generator().manual_seed(rows)
    update, weight = torch.randn(rows, 70_001, generator=g), torch.rand(rows, generator=g).double()
    total = torch.ones(70_001, dtype=torch.float64)
    weighted_sum_(total, update, weight)
    torch.testing.assert_close(total, 1 + weight @ update.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("m", [1, 257, 5000])
@pytest.mark.parametrize("k", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_exact_sums_are_those_of_rounded_products(k: int, m: int, dtype: torch.dtype) -> None:
    """Each product to the nearest multiple of 2^-36, ties to even; then integers, added up."""
    rows, weight, total = numbers(2, k, m).to(dtype), numbers(3, k).exp(), torch.zeros(m).double()
    before = rows.clone()
    exact_weighted_sum_(total, rows, weight, 1.5 * 2.0**16)
    products = (weight[:, None] * rows.double()).mul(2.0**36)
    assert total.mul(2.0**36).long().tolist() == products.round().long().sum(0).tolist()
    assert torch.equal(rows, before)
