"""Squares, scaling and weighted sums of rows by the kernels, beside the reference."""

import pytest
import torch
from torch import Tensor

from vecfl.aggregate import add_, empty
from vecfl.transforms.clip import clip_rows
from vecfl_kernels import row_squares, scaled_rows, scaled_weighted_sum_, weighted_sum_

from .cases import CPU, SHAPES, TYPES, both, hard, normals, same, strided


def summed(rows: Tensor, weight: Tensor, device: torch.device, *scaling: Tensor) -> Tensor:
    """1 + the weighted sum of rows, which are scaled if it is said how."""
    total = torch.ones(rows.shape[1], dtype=torch.float64, device=device)
    add = scaled_weighted_sum_ if scaling else weighted_sum_
    add(total, rows.to(device), weight.to(device), *(t.to(device) for t in scaling))
    return total.cpu()


def scaling(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each row is divided by, its scale, and whether it is scaled: every second one."""
    unit = rows.abs().amax(1).nan_to_num(1).clamp(min=torch.finfo(rows.dtype).tiny)
    scale = torch.linspace(1e-3, 2, len(rows)).to(rows.dtype)
    return unit, scale, torch.arange(len(rows)) % 2 == 1


def near(found: Tensor, right: Tensor, weight: Tensor, rows: Tensor) -> None:
    """To the rounding of each product and each sum, 2^-53 of all that is added up."""
    size = 1 + weight.abs() @ rows.double().abs()
    assert ((found - right).abs() <= 2.0**-53 * (2 * len(rows) + 2) * size).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_anywhere_in_memory(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    weight = normals(2, shape[0]).exp()
    weight[::5] = 0
    for rows in strided(normals(1, *shape).to(dtype)).values():
        right, found = both(lambda at, rows=rows: row_squares(rows.to(at)).cpu(), device)
        torch.testing.assert_close(found, right, rtol=1e-13, atol=0)
        torch.testing.assert_close(right, rows.double().square().sum(1), rtol=1e-13, atol=0)
        right, found = both(lambda at, rows=rows: summed(rows, weight, at), device)
        near(found, right, weight, rows)
        near(right, 1 + weight @ rows.double(), weight, rows)
        how = scaling(rows)
        after, found = both(
            lambda at, rows=rows, how=how: scaled_rows(rows.to(at), *(t.to(at) for t in how)),
            device,
        )
        same(after, found)
        assert torch.equal(after[::2], rows[::2])
        right, found = both(lambda at, rows=rows, how=how: summed(rows, weight, at, *how), device)
        near(found, right, weight, after)
        near(right, 1 + weight @ after.double(), weight, after)


def test_by_hand(device: torch.device) -> None:
    """(3, -4) / 4 * 2 = (1.5, -2), times 1/2 = (0.75, -1); (8, 0) stays, times 2 = (16, 0). 2^-126
    is the smallest normal number: half of it, and it itself, become 0 where a row is scaled."""
    rows = torch.tensor([[3.0, -4.0], [8.0, 0.0], [2.0**-126, 1.0]])
    how = torch.tensor([4.0, 1, 1]), torch.tensor([2.0, 7, 1]), torch.tensor([True, False, True])
    weight = torch.tensor([0.5, 2, 2.0**100], dtype=torch.float64)
    for found in both(lambda at: row_squares(rows.to(at)).cpu(), device):
        assert found.tolist() == [25, 64, 1]
    for found in both(lambda at: scaled_rows(rows.to(at), *(t.to(at) for t in how)).cpu(), device):
        assert found.tolist() == [[1.5, -2], [8, 0], [0, 1]]
    for found in both(lambda at: summed(rows[:2], weight[:2], at, *(t[:2] for t in how)), device):
        assert found.tolist() == [17.75, 0]
    for found in both(lambda at: summed(rows, weight, at), device):
        assert found.tolist() == [18.5 + 2.0**-26, 2.0**100]


@pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_numbers_that_are_hard(dtype: torch.dtype, device: torch.device) -> None:
    """NaN and infinity stay, under a weight of 0 too: a worker has zeroed such rows before."""
    rows, weight = hard(dtype), torch.tensor([1.0, 1, 0.5, 0, 0, 0]).double()
    how = scaling(rows)
    same(*both(lambda at: scaled_rows(rows.to(at), *(t.to(at) for t in how)).cpu(), device))
    right, found = both(lambda at: summed(rows, weight, at), device)
    assert right.isnan().tolist() == [True, False, True, False, False]
    torch.testing.assert_close(found, right, rtol=1e-15, atol=0, equal_nan=True)
    finite = rows[:4] if dtype == torch.float32 else rows[[0, 3]]  # else squares are infinite
    right, found = both(lambda at: row_squares(finite.to(at)).cpu(), device)
    torch.testing.assert_close(found, right, rtol=1e-13, atol=0)
    right, found = both(lambda at: row_squares(rows[4:].to(at)).cpu(), device)
    assert right.isnan().tolist() == found.isnan().tolist() == [True, False]


@pytest.mark.parametrize("block", [32, 1024])
def test_a_sum_over_rows_has_the_same_bits_for_any_block(
    block: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, weight = normals(3, 17, 300).float(), normals(4, 17)
    how = scaling(rows)
    before = [both(lambda at, s=s: summed(rows, weight, at, *s), device)[1] for s in ((), how)]
    monkeypatch.setattr("vecfl_kernels.rows.triton.BLOCK", block)
    after = [both(lambda at, s=s: summed(rows, weight, at, *s), device)[1] for s in ((), how)]
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_the_squares_of_a_row_are_its_own(device: torch.device) -> None:
    rows = (normals(5, 9, 9000) * (20 * normals(6, 9, 9000)).exp2()).float()
    _, whole = both(lambda at: row_squares(rows.to(at)).cpu(), device)
    for some in (slice(3, 4), slice(2, 7)):
        _, found = both(lambda at, some=some: row_squares(rows[some].to(at)).cpu(), device)
        assert torch.equal(found, whole[some])


def test_clipping_and_the_sum_of_a_cohort(device: torch.device) -> None:
    """The library's own: what is clipped has the bits of the reference where norms have them."""
    rows, weight = normals(7, 5, 3000).float() * torch.logspace(-3, 3, 5)[:, None], torch.ones(5)

    def clipped(at: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        after, norm, over = clip_rows(rows.to(at), 2.0)
        sums = empty(3000, at)
        add_(sums, after, weight.double().to(at))
        assert (after.double().norm(dim=1) <= 2).all()
        return norm.cpu(), over.cpu(), sums.total.cpu()

    (norm, over, total), (norm2, over2, total2) = both(clipped, device)
    assert over.tolist() == over2.tolist() == [False, False, True, True, True]
    torch.testing.assert_close(norm2, norm, rtol=1e-13, atol=0)
    torch.testing.assert_close(total2, total, rtol=1e-6, atol=1e-9)


def test_the_reference_leaves_rows_as_they_are() -> None:
    rows = normals(8, 20, 70).float()
    before, how = rows.clone(), scaling(rows)
    scaled_rows(rows, *how)
    summed(rows, torch.ones(20).double(), CPU, *how)
    assert torch.equal(rows, before)


def test_parts_of_long_rows_are_all_added(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,100 columns in parts of 16 are 132 parts, more than a program adds at a time."""
    rows = normals(9, 2, 2100).float()
    monkeypatch.setattr("vecfl_kernels.rows.triton.WIDTH", 16)
    right, found = both(lambda at: row_squares(rows.to(at)).cpu(), device)
    torch.testing.assert_close(found, right, rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(20, 7000), (2, 70_001)], ids=str)
def test_the_reference_goes_on_behind_a_tile(shape: tuple[int, int]) -> None:
    """A tile has 65,536 numbers: rows of a cohort, or a part of one."""
    rows, weight = normals(8, *shape).float(), torch.ones(shape[0]).double()
    unit, scale, over = scaling(rows)
    right = (rows / unit[:, None] * scale[:, None]).where(over[:, None], rows)
    assert torch.equal(scaled_rows(rows, unit, scale, over), right)
    found = summed(rows, weight, CPU, unit, scale, over)
    near(found, 1 + weight @ right.double(), weight, right)


@pytest.mark.parametrize("shape", [(3, 5), (20, 7_000), (2, 150_000)], ids=str)
def test_rows_that_are_all_scaled_have_the_bits_of_those_beside_others(
    shape: tuple[int, int],
) -> None:
    """Beside each row stands one that is not scaled; some numbers would be denormal, and are 0."""
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-37
    every = torch.full((shape[0],), 2.0), torch.full((shape[0],), 0.2)
    found = scaled_rows(rows, *every, torch.ones(shape[0], dtype=torch.bool))
    mixed = torch.stack((rows, rows), 1).flatten(0, 1)
    some = torch.tensor([True, False]).repeat(shape[0])
    both = scaled_rows(mixed, *(t.repeat_interleave(2) for t in every), some)
    assert torch.equal(found, both[::2]) and torch.equal(rows, both[1::2])
    assert (found == 0).any() and (found != 0).any()
