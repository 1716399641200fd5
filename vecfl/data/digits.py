"""Scikit-learn's handwritten digits: a real data set that needs no download."""

import numpy as np
import torch
from torch import Tensor

from vecfl.data.partition import DIGITS, generator
from vecfl.errors import InputError

DIGITS_SCALE = 1 / 16  # takes the pixels 0..16 to [0, 1]


def digits(
    seed: int = 0, test_fraction: float = 0.2
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The 1,797 digits as (train, test), each {"x": uint8 [n, 1, 8, 8], "y": int64 [n]}.

    Pixels are 0..16 as shipped; multiply by DIGITS_SCALE for [0, 1]. The test set is a random
    round(1797 * test_fraction) examples, stratified: each class gives its share, give or take one
    example. Both parts keep the shipped order. Raises InputError where scikit-learn is missing and
    where either part would be empty. Source: UCI, Optical Recognition of Handwritten Digits.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            'digits needs scikit-learn, which is not installed: pip install "vecfl[data]"'
        ) from error
    shipped = load_digits()
    n = len(shipped.target)
    tests = round(n * test_fraction) if 0 < test_fraction < 1 else 0
    if not 0 < tests < n:
        raise InputError(
            f"test_fraction: expected a fraction in (0, 1) that leaves examples on both sides of "
            f"{n}, got {test_fraction}"
        )
    shuffled = generator(seed, DIGITS).permutation(n)
    by_class = shuffled[np.argsort(shipped.target[shuffled], kind="stable")]
    # Every (n / tests)-th example of the class-sorted order is a test example.
    passed = np.arange(n + 1) * tests // n
    test = np.zeros(n, dtype=bool)
    test[by_class[passed[1:] > passed[:-1]]] = True
    x = shipped.images.astype(np.uint8)[:, None]
    y = shipped.target.astype(np.int64)
    train_part, test_part = (
        {"x": torch.from_numpy(x[part]), "y": torch.from_numpy(y[part])} for part in (~test, test)
    )
    return train_part, test_part
