"""The command line of a recipe: flags from a dataclass, and errors in one line.

    if __name__ == "__main__":
        main(run, Args)

Defaults come from the dataclass, then from the files of --config in their order, then from flags.
Exit codes: 2 for bad input or a file that cannot be written, 130 for Ctrl-C, 143 for SIGTERM.
"""

import inspect
import json
import logging
import signal
import sys
import time
from argparse import ArgumentError, ArgumentParser
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from vecfl.errors import InputError
from vecfl.mesh import Mesh, RankError, RankLost, join
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
    stands by raising `vecfl.signals.Stopped` with that line and its exit code. Several ranks print
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


def has_device(name: str) -> bool:
    """Whether tensors can be made on this device here."""
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError):  # asserts without CUDA
        return False
    return True


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
    args = tyro.cli(
        args_type,
        args=flags,
        default=_read(files, args_type) if files else tyro.MISSING_NONPROP,
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


def _read(files: list[str], args_type: type[Args]) -> Args:
    """The defaults of `args_type` under the values of YAML files, each checked as it is read."""
    args = args_type()
    for file in files:
        values = asdict(args)
        args = _validate(file, _over(values, _load(file)), args_type)
    return args


def _load(file: str) -> Mapping[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one."""
    import yaml

    try:
        values = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise InputError(f"--config {file}: not YAML{where}: {why}") from error
    if values is not None and not isinstance(values, dict):
        raise InputError(f"--config {file}: expected lines 'name: value', got {values!r}")
    return values or {}


def _over(below: Any, above: Any) -> Any:
    """The values of `above`, and where it has none, of `below`; groups value by value."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {str(key): _over(below.get(key), value) for key, value in above.items()}


def _validate(file: str, values: dict[str, Any], args_type: type[Args]) -> Args:
    """`values` as `args_type`; InputError with the path of the first key that does not fit."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    # A dataclass takes this configuration only inside another type, hence the list.
    adapter = TypeAdapter(list[args_type], config=ConfigDict(extra="forbid", strict=True))  # type: ignore[valid-type]
    for _ in range(2):
        try:
            # As JSON a list may be a tuple, and a mapping a dataclass, in spite of `strict`.
            return adapter.validate_json(json.dumps([values], default=str))[0]
        except ValidationError as error:
            wrong = error.errors()
        if not any([_to_float(values, e["loc"][1:]) for e in wrong if e["type"] == "float_type"]):
            break
    raise InputError(f"--config {file}: {_reason(wrong[0], asdict(args_type()))}")


def _to_float(values: Any, path: tuple[int | str, ...]) -> bool:
    """Turn the string at `path` into a float: YAML 1.1 reads 1e-3, without a dot, as a string."""
    *groups, last = path
    for key in groups:
        values = values[key]
    if not isinstance(values[last], str):
        return False
    try:
        values[last] = float(values[last])
    except ValueError:
        return False
    return True


def _reason(error: Mapping[str, Any], known: Any) -> str:
    """What is wrong with a value, behind the path of its key."""
    *groups, last = error["loc"][1:]
    path = ".".join(map(str, (*groups, last)))
    if error["type"] != "unexpected_keyword_argument":
        return (
            f"{path}: {error['msg'].replace('Input should be', 'expected')}, got {error['input']!r}"
        )
    for key in groups:
        known = known[key]
    nearest = ".".join(map(str, (*groups, *get_close_matches(last, known, 1, cutoff=0))))
    return f"{path}: no option has this name; the nearest is {nearest}"


def _exit(line: str, code: int, mesh: Mesh) -> NoReturn:
    if mesh.is_first(line):
        print(line, file=sys.stderr)
    sys.exit(code)
