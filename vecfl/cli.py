"""The command line of a recipe: flags from a dataclass, and errors in one line.

    if __name__ == "__main__":
        main(run, Args)

Exit codes: 2 for bad input or a file that cannot be written, 130 for Ctrl-C.
"""

import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

import torch

from vecfl.errors import InputError

Args = TypeVar("Args")


def main(run: Callable[[Args], None], args_type: type[Args]) -> None:
    """Parse the flags into `args_type` and call `run`.

    `InputError`, an `OSError` about a file and Ctrl-C become one line on stderr and an exit code;
    every other exception is a bug and keeps its traceback. A recipe says where an interrupted
    run stands by raising `KeyboardInterrupt` with that line.
    """
    args = _parse(args_type)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        run(args)
    except InputError as error:
        _exit(f"error: {error}", 2)
    except OSError as error:
        if error.filename is None:
            raise
        _exit(f"error: {error.filename}: {error.strerror}", 2)
    except KeyboardInterrupt as interrupt:
        _exit(str(interrupt) or "interrupted; the run is not finished", 130)


def check(args: object, names: Iterable[str], right: Callable[[Any], bool], wanted: str) -> None:
    """Raise `InputError` naming the flag when the value of a field is not right; None passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not right(value):
            raise InputError(f"--{name.replace('_', '-')}: expected {wanted}, got {value}")


def has_device(name: str) -> bool:
    """Whether tensors can be made on this device here."""
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError):  # asserts without CUDA
        return False
    return True


def _parse(args_type: type[Args]) -> Args:
    try:
        import tyro
    except ModuleNotFoundError:
        _exit("error: the command line needs tyro: pip install tyro", 2)
    return tyro.cli(args_type, config=(tyro.conf.FlagConversionOff,))


def _exit(line: str, code: int) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(code)
