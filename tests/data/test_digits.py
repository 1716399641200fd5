"""The digits: what is shipped, and the stratified split."""

import sys

import numpy as np
import pytest
import torch

from vecfl.data import DIGITS_SCALE, digits
from vecfl.errors import InputError

load_digits = pytest.importorskip("sklearn.datasets").load_digits


def rows(part):
    return [tuple(image) for image in part["x"].flatten(1).tolist()]


def test_shapes_dtypes_and_range():
    train, test = digits()
    # round(1797 * 0.2) = round(359.4) = 359, and 1797 - 359 = 1438.
    assert train["x"].shape == (1438, 1, 8, 8) and train["y"].shape == (1438,)
    assert test["x"].shape == (359, 1, 8, 8) and test["y"].shape == (359,)
    for part in (train, test):
        assert part["x"].dtype == torch.uint8 and part["y"].dtype == torch.int64
        assert (int(part["x"].min()), int(part["x"].max())) == (0, 16)
        assert part["y"].unique().tolist() == list(range(10))
    assert DIGITS_SCALE * 16 == 1.0


def test_the_parts_together_are_the_shipped_digits_with_their_labels():
    shipped = load_digits()
    train, test = digits(seed=3)
    # No two of the shipped images are equal, so an image names its row.
    row = {tuple(image): i for i, image in enumerate(shipped.data.astype(int).tolist())}
    assert len(row) == 1797
    order = [[row[image] for image in rows(part)] for part in (train, test)]
    assert sorted(order[0] + order[1]) == list(range(1797))
    for part, index in zip((train, test), order, strict=True):
        assert index == sorted(index)  # the shipped order
        assert part["y"].tolist() == shipped.target[index].tolist()
        assert np.array_equal(part["x"][:, 0].numpy(), shipped.images[index])


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.2, 0.5, 0.77, 0.999])
def test_every_class_gives_its_share(fraction):
    _, test = digits(seed=1, test_fraction=fraction)
    tests = round(1797 * fraction)
    assert len(test["y"]) == tests
    share = np.bincount(load_digits().target) * tests / 1797
    assert (np.abs(np.bincount(test["y"].numpy(), minlength=10) - share) < 1).all()


def test_the_seed_decides_the_split():
    first, again, other = digits(seed=5)[1], digits(seed=5)[1], digits(seed=6)[1]
    assert torch.equal(first["x"], again["x"]) and torch.equal(first["y"], again["y"])
    # A test set of another seed shares a fifth of 359 in expectation, 72; half of it, 180, has a
    # probability below exp(-2 * 108^2 / 359) = 1e-28 (Hoeffding).
    assert len(set(rows(first)) & set(rows(other))) < 180


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan"), 1e-6, 1 - 1e-6])
def test_a_fraction_that_empties_a_part_is_refused(fraction):
    message = (
        r"^test_fraction: expected a fraction in \(0, 1\) that leaves examples on both sides of "
        rf"1797, got {fraction}$"
    )
    with pytest.raises(InputError, match=message):
        digits(test_fraction=fraction)


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(InputError, match=r"^seed: expected an integer >= 0, got -1$"):
        digits(seed=-1)


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    message = r"^digits needs scikit-learn, which is not installed: pip install \"vecfl\[data\]\"$"
    with pytest.raises(InputError, match=message):
        digits()
