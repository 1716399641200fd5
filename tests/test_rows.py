"""Sums over rows: on paper, beside whole sums, and with bits that are a row's own."""

import math

import pytest
import torch
from torch import Tensor

from vecfl.rows import lengths, moments
from vecfl_kernels import row_squares

DTYPES = (torch.float32, torch.float64)


def test_by_hand() -> None:
    """(3, -4): sum -1, squares 25. In float32 2^24 + 1 would be 2^24, and 1e30 squared inf."""
    rows = torch.tensor([[3.0, -4.0], [0.0, 0.0], [2.0**24, 1.0], [1e30, 0.0]])
    first, second = moments(rows)
    assert first.dtype == second.dtype == torch.float64
    big = float(torch.tensor(1e30))
    assert first.tolist() == [-1, 0, 2.0**24 + 1, big]
    assert second.tolist() == pytest.approx([25, 0, 2.0**48 + 1, big**2], rel=1e-15)
    assert lengths(rows).tolist() == pytest.approx([5, 0, math.hypot(2**24, 1), big], rel=1e-15)
    far = torch.tensor([[3e200, 4e200], [3e-200, 4e-200]], dtype=torch.float64)
    assert lengths(far).tolist() == pytest.approx([5e200, 5e-200], rel=1e-15)


@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (3, 10), (9, 8192), (8, 8193), (20, 40_000)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_whole_sums(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Blocks end within rows and between them; rows of a longer matrix are strided."""
    wide = torch.randn(shape[0], shape[1] + 3, generator=torch.Generator().manual_seed(1))
    for rows in (wide.to(dtype)[:, 3:], wide.to(dtype)[:, 3:].T.contiguous().T):
        first, second = moments(rows)
        torch.testing.assert_close(first, rows.double().sum(1), rtol=1e-12, atol=1e-10)
        torch.testing.assert_close(second, rows.double().square().sum(1), rtol=1e-12, atol=0)
        assert torch.equal(second, row_squares(rows))
        torch.testing.assert_close(lengths(rows), rows.double().norm(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [5, 8191, 60_000, 200_000])
def test_the_bits_of_a_row_are_its_own(size: int, dtype: torch.dtype, threads: int) -> None:
    """Alone, beside any number of others, and for another number of operator threads. The rows are
    of float64, or of numbers of many sizes: else float64 sums of them would be exact, in any order.
    """
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(19, size, dtype=torch.float64, generator=generator)
    rows = wide if dtype == torch.float64 else (wide * (20 * wide.roll(1, 1)).exp2()).float()

    def found(some: Tensor) -> list[list[float]]:
        return [t.tolist() for t in (*moments(some), lengths(some))]

    right, before = found(rows), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for some in (slice(3, 4), slice(2, 5), slice(1, 10), slice(0, 19)):
            assert found(rows[some]) == [values[some] for values in right]
    finally:
        torch.set_num_threads(before)
