"""The command line of a recipe: flags from a dataclass, and errors in one line.

    if __name__ == "__main__":
        main(run, Args)

Defaults come from the dataclass, then from the run of --resume, then from the files of --config in
their order, then from flags.
Exit codes: 2 for bad input or a file that cannot be written, 130 for Ctrl-C, 143 for SIGTERM.
"""

import inspect
import logging
import signal
import sys
import time
from argparse import ArgumentError, ArgumentParser
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from io import StringIO
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from torch.distributed.elastic.multiprocessing.errors import record

from vecfl.errors import InputError
from vecfl.mesh import Mesh, RankError, RankLost, join
from vecfl.settings import of_run, read
from vecfl.signals import Stopped

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Args = TypeVar("Args", bound="DataclassInstance")

FIRST = 5  # seconds for a launcher to see the rank that ended first, which its summary is about
CONFIG_HELP = """
--config FILE.yaml  values by the names of the options below, which flags override; may be repeated
--print-config      print all values as YAML for --config, and end
"""


def main(run: Callable[[Args], None], args_type: type[Args]) -> None:
    """Parse the flags into `args_type`, a dataclass whose fields have defaults, and call `run`.

    `InputError`, an `OSError` about a file and Ctrl-C become one line on stderr and an exit code;
    every other exception is a bug and keeps its traceback. A recipe says where a stopped run
    stands by raising `vecfl.signals.Stopped` with that line and its exit code. A worker
    process that has ended is a line and exit code 1. Several ranks print
    a line once, and exit with 1 where another has ended; torchrun's summary names the cause.
    """
    mesh = Mesh()
    try:
        mesh = join()
        args = _parse(args_type) if mesh.size == 1 else _parse_once(args_type, mesh)
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("vecfl").setLevel(logging.ERROR if mesh.rank else logging.INFO)
        (run if mesh.size == 1 else record(run))(args)
    except InputError as error:
        _exit(f"error: {error}", 2, mesh)
    except RankLost as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(FIRST)
        sys.exit(1)
    except RankError as error:
        _exit(f"error: {error}", 1, mesh)
    except OSError as error:
        if error.filename is None:
            raise
        _exit(f"error: {error.filename}: {error.strerror}", 2, mesh)
    except KeyboardInterrupt as interrupt:
        line = str(interrupt) or "interrupted; the run is not finished"
        if not isinstance(interrupt, Stopped):
            _exit(line, 130, mesh)
        if mesh.rank == 0:
            print(line, file=sys.stderr, flush=True)
        mesh.let_first_end()
        sys.exit(interrupt.code)


def check(args: object, names: Iterable[str], right: Callable[[Any], bool], wanted: str) -> None:
    """Raise `InputError` naming the flag when the value of a field is not right; None passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not right(value):
            raise InputError(f"{flag(name)}: expected {wanted}, got {value}")


def flag(name: str) -> str:
    """The flag of a field: sample_seed is --sample-seed."""
    return f"--{name.replace('_', '-')}"


def _parse_once(args_type: type[Args], mesh: Mesh) -> Args:
    """`_parse`, of whose help and errors the first rank to come prints all."""
    out, err = StringIO(), StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            return _parse(args_type)
    finally:
        text = out.getvalue() + err.getvalue()
        if text and mesh.is_first(text):
            print(out.getvalue(), end="", flush=True)
            print(err.getvalue(), end="", file=sys.stderr)


def _parse(args_type: type[Args]) -> Args:
    try:
        import pydantic  # noqa: F401
        import tyro
        import yaml
    except ModuleNotFoundError as error:
        raise InputError(f"the command line needs {error.name}: pip install {error.name}") from None
    files, printing, flags = _config_flags(sys.argv[1:])
    start = of_run(flags, args_type)
    default = read(files, start or args_type()) if files or start else tyro.MISSING_NONPROP
    args = tyro.cli(
        args_type,
        args=flags,
        default=default,
        description=f"{inspect.getdoc(args_type)}\n{CONFIG_HELP}",
        config=(tyro.conf.FlagConversionOff,),
    )
    if printing:
        print(yaml.safe_dump(asdict(args), sort_keys=False), end="")
        sys.exit()
    return args


def _config_flags(flags: list[str]) -> tuple[list[str], bool, list[str]]:
    """The files of --config, whether --print-config is there, and the other flags."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--print-config", "--print_config", action="store_true")
    try:
        taken, others = parser.parse_known_args(flags)
    except ArgumentError as error:
        raise InputError(f"{error.argument_name}: {error.message}") from None
    return taken.config, taken.print_config, others


def _exit(line: str, code: int, mesh: Mesh) -> NoReturn:
    if mesh.is_first(line):
        print(line, file=sys.stderr)
    sys.exit(code)
