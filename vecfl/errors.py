"""The one exception that vecfl raises for bad input."""

from numbers import Integral


class InputError(ValueError):
    """Bad input from a user. One line: what was wrong, where, and what would be right.

    Recipes turn it into that line and exit code 2; everything else keeps its traceback.
    """


def is_integer(value: object) -> bool:
    """Whether `value` is an integer, numpy's included; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)
