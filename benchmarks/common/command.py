"""The command line of a benchmark: flags that say their defaults, bad input in one line."""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from benchmarks.common.rows import RESULTS
from vecfl.arrangement import has_device
from vecfl.errors import InputError

KERNELS = "VECFL_KERNELS="  # so begins what vecfl_kernels says of a choice that cannot be had


def command(main: Callable[[], None]) -> None:
    """Run `main` of a script.

    `InputError`, an `OSError` about a file and a choice of kernels that cannot be had become one
    line on stderr and exit code 2; so does a process of the script's own that ended like that, and
    has said why. All else is a bug and keeps its traceback.
    """
    try:
        main()
    except OSError as error:
        if error.filename is None:
            raise
        end(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        if not isinstance(error, InputError) and not str(error).startswith(KERNELS):
            raise
        end(str(error))
    except subprocess.CalledProcessError as error:
        if error.returncode != 2:
            raise
        sys.exit(2)


def end(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and adds to each flag its default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        given = action.default
        if given is None or isinstance(given, bool) or given is argparse.SUPPRESS:
            return action.help
        words = " ".join(map(str, given)) if isinstance(given, list) else str(given)
        return f"{action.help} [{words.replace('%', '%%')}]"


class Parser(argparse.ArgumentParser):
    """Of a script whose docstring is `text`; says what is wrong with a flag in one line."""

    def __init__(self, text: str | None) -> None:
        super().__init__(description=text, formatter_class=Help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        end(f"{message} (--help tells of all flags)")

    def add_some(self, flag: str, choices: Iterable[str], words: str) -> None:
        """A flag that takes some of the choices; all if it is not given."""
        every = list(choices)
        self.add_argument(flag, nargs="+", choices=every, default=every, help=words)

    def add_device(self, words: str) -> None:
        """--device: cpu, or cuda where there is one."""
        self.add_argument(
            "--device", type=device_here, choices=["cuda", "cpu"], default="cpu", help=words
        )

    def add_out(self, name: str) -> None:
        """--out: the file that rows are added to."""
        path = RESULTS / f"{name}.jsonl"
        self.add_argument("--out", type=rows_file, default=path, help="file that rows are added to")


def positive(text: str) -> int:
    """A whole number of at least 1, which may be written as 1e7."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value.is_integer() or value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text}")
    return int(value)


def device_here(text: str) -> str:
    """The name of a device that is here."""
    if not has_device(text):
        raise argparse.ArgumentTypeError(f"there is no device {text} here")
    return text


def rows_file(text: str) -> Path:
    """A file that can be written, which is known before anything is measured; OSError if not."""
    path = Path(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.open("a").close()
    else:
        tempfile.TemporaryFile(dir=path.parent).close()
    return path
