"""The one exception that vecfl raises for bad input."""


class InputError(ValueError):
    """Bad input from a user. One line: what was wrong, where, and what would be right.

    Recipes turn it into that line and exit code 2; everything else keeps its traceback.
    """
