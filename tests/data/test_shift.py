"""Feature shift: what clients draw, and what it does to their columns."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vecfl.data import FederatedDataset, affine, draw_affine, draw_angles, rotate
from vecfl.errors import InputError


def refused(message: str):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


def dataset(x, sizes):
    return FederatedDataset(
        {"x": x, "y": torch.arange(len(x))}, torch.tensor([0, *sizes]).cumsum(0)
    )


@given(st.integers(1, 50), st.integers(0, 2**63 - 1))
def test_angles_are_shared_out_evenly(clients, seed):
    angles = draw_angles(clients, seed)
    assert angles.shape == (clients,) and set(angles.tolist()) <= {0, 90, 180, 270}
    counts = [(angles == a).sum() for a in (0, 90, 180, 270)]
    assert max(counts) - min(counts) <= 1
    assert np.array_equal(angles, draw_angles(clients, seed))


def test_draws_depend_on_the_seed():
    assert not np.array_equal(draw_angles(50, 0), draw_angles(50, 1))
    assert not np.array_equal(draw_affine(50, 0)[0], draw_affine(50, 1)[0])


def test_gains_and_offsets_have_their_ranges():
    gains, offsets = draw_affine(10_000, 0, gain=0.5, offset=3)
    # The least of 10,000 uniform numbers is above 0.2 % of the range with p = 0.998^10000 = 2e-9,
    # and their mean is off by 6 standard errors, range / sqrt(12 * 10,000), with p = 2e-9.
    for drawn, low, high in ((gains, 0.5, 1.5), (offsets, -3, 3)):
        margin = 0.002 * (high - low)
        assert low <= drawn.min() < low + margin and high - margin < drawn.max() <= high
        assert abs(drawn.mean() - (low + high) / 2) < 6 * (high - low) / 120_000**0.5
    assert abs(np.corrcoef(gains, offsets)[0, 1]) < 0.06  # 6 / sqrt(10,000)
    plain = draw_affine(3, 0, gain=0, offset=0)
    assert plain[0].tolist() == [1, 1, 1] and plain[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_quarter_turns_by_hand(dtype):
    # Counterclockwise, so that the right column becomes the top row.
    image = torch.tensor([[1, 2], [3, 4]], dtype=dtype)
    data = dataset(image.expand(6, 1, 2, 2).contiguous(), [1, 2, 0, 1, 1, 1])
    turned = rotate(data, [0, 90, 90, 180, 270, -90])
    x = turned.columns["x"][:, 0].tolist()
    assert turned.columns["x"].dtype == dtype
    assert x == [
        [[1, 2], [3, 4]],
        *([[2, 4], [1, 3]], [[2, 4], [1, 3]]),  # the second client has two images
        [[4, 3], [2, 1]],
        [[3, 1], [4, 2]],
        [[3, 1], [4, 2]],
    ]
    assert data.columns["x"][1, 0].tolist() == [[1, 2], [3, 4]]  # the old data stay
    assert torch.equal(turned.columns["y"], data.columns["y"])
    assert turned.client_ids == data.client_ids


def test_other_angles_are_near_the_quarter_turns_beside_them():
    x = torch.rand(5, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = dataset(x, [1, 1, 1, 1, 1])
    angles = np.array([0, 90, 180, 270, 360])
    # 1e-4 degrees move a pixel by less than 1e-5 of its width, hence a value by less than 2e-5;
    # and of a pixel at the border as little is lost to the 0 outside.
    near, exact = rotate(data, angles + 1e-4).columns["x"], rotate(data, angles).columns["x"]
    assert not torch.equal(near, exact)
    torch.testing.assert_close(near, exact, rtol=0, atol=4e-5)


def test_an_eighth_of_a_turn_by_hand():
    # The middle row of a 3 x 3 image, turned by 45 degrees: its ends come to the diagonal from
    # bottom left to top right. The corner (1, 1) right and above the middle looks at the point
    # sqrt(2) right of the middle: bilinear, 2 - sqrt(2) of the pixel at 1, the rest from outside.
    image = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.float64)
    (turned,) = rotate(dataset(image[None], [1]), [45]).columns["x"]
    corner = 2 - 2**0.5
    # The pixel right of the middle looks at (h, h) below or above it, h = 1 / sqrt(2): 1 - h.
    side = 1 - 0.5**0.5
    expected = [[0, side, corner], [side, 1, side], [corner, side, 0]]
    torch.testing.assert_close(turned, torch.tensor(expected, dtype=torch.float64))
    # As bytes: 255 (2 - sqrt(2)) = 149.4 and 255 (1 - h) = 74.7, rounded.
    (turned,) = rotate(dataset((255 * image[None]).byte(), [1]), [45]).columns["x"]
    assert turned.tolist() == [[0, 75, 149], [75, 255, 75], [149, 75, 0]]


def test_affine_by_hand():
    x = torch.tensor([[0, 100], [200, 10], [7, 255]], dtype=torch.uint8)
    data = dataset(x, [1, 2])
    shifted = affine(data, [0.5, 1.5], [10.3, -20])
    # 0.5 * 100 + 10.3 = 60.3; 1.5 * 200 - 20 = 280, above 255; 1.5 * 10 - 20 = -5, below 0.
    assert shifted.columns["x"].tolist() == [[10, 60], [255, 0], [0, 255]]
    assert shifted.columns["x"].dtype == torch.uint8 and x[0].tolist() == [0, 100]
    floats = affine(dataset(x.float(), [1, 2]), [0.5, 1.5], [10.25, -20]).columns["x"]
    assert floats.dtype == torch.float32
    assert floats.tolist() == [[10.25, 60.25], [280, -5], [-9.5, 362.5]]


def test_blocks_of_examples_make_no_difference(monkeypatch):
    x = torch.rand(7, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    data = dataset(x, [3, 4])
    whole = rotate(data, [90, 30]).columns["x"], affine(data, [2, 3], [0, 1]).columns["x"]
    monkeypatch.setitem(rotate.__globals__, "BLOCK", 2)
    parts = rotate(data, [90, 30]).columns["x"], affine(data, [2, 3], [0, 1]).columns["x"]
    assert all(map(torch.equal, whole, parts))


def test_the_lines_that_refuse():
    data = dataset(torch.zeros(3, 1, 2, 2), [1, 2])
    with refused("angles: expected 2 finite numbers, one for each client, got shape [3]"):
        rotate(data, [0, 90, 180])
    with refused("gains: expected 2 finite numbers, one for each client, got shape [2]"):
        affine(data, [1, float("nan")], [0, 0])
    with refused("offsets: expected 2 finite numbers, one for each client, got shape []"):
        affine(data, [1, 1], 0)
    with refused("column 'z': the data have x, y"):
        rotate(data, [0, 0], "z")
    with refused("column 'y': expected uint8 or floating values, got torch.int64"):
        affine(data, [1, 1], [0, 0], "y")
    with refused("column 'x': expected square images [n, ..., H, H], got [3, 2, 3]"):
        rotate(dataset(torch.zeros(3, 2, 3), [1, 2]), [0, 0])
    with refused("angles: expected at least one angle in degrees, got none"):
        draw_angles(3, 0, [])
    for gain in (-0.1, 1, float("nan")):
        with refused(f"gain: expected a number in [0, 1), got {gain}"):
            draw_affine(3, 0, gain=gain)
    with refused("offset: expected a finite number of at least 0, got inf"):
        draw_affine(3, 0, offset=float("inf"))
    with refused("clients: expected an integer >= 1, got 0"):
        draw_angles(0, 0)
    with refused("seed: expected an integer >= 0, got -1"):
        draw_affine(3, -1)
