"""The one exception that vecfl raises for bad input."""

import math
from numbers import Integral


class InputError(ValueError):
    """Bad input from a user. One line: what was wrong, where, and what would be right.

    Recipes turn it into that line and exit code 2; everything else keeps its traceback.
    """


def is_integer(value: object) -> bool:
    """Whether `value` is an integer, numpy's included; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def at_least_zero(what: str, value: float) -> None:
    """InputError for a value below 0, for infinity and for NaN."""
    if not 0 <= value < math.inf:
        raise InputError(f"{what} must be at least 0 and finite, not {value}")


def positive(what: str, value: float) -> None:
    """InputError for a value of 0 or below, and for NaN."""
    if not value > 0:
        raise InputError(f"{what} must be positive, not {value}")


def fraction(what: str, value: float) -> None:
    """InputError for a value outside of [0, 1)."""
    if not 0 <= value < 1:
        raise InputError(f"{what} must be in [0, 1), not {value}")


def inside(what: str, value: float) -> None:
    """InputError for a value outside of (0, 1)."""
    if not 0 < value < 1:
        raise InputError(f"{what} must be between 0 and 1, not {value}")
