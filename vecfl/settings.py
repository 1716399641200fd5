"""Settings in YAML files: those of --config, and those of a run that is gone on with."""

import json
from argparse import ArgumentError, ArgumentParser
from collections.abc import Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vecfl.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Args = TypeVar("Args", bound="DataclassInstance")


def of_run(flags: list[str], args_type: type[Args]) -> Args | None:
    """The settings of the run that --resume means, if it is a run of this recipe."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--resume", "--out"):
        parser.add_argument(name)
    try:
        said, _ = parser.parse_known_args(flags)
    except ArgumentError:  # tyro has a better line
        return None
    run = said.out if said.resume == "auto" else said.resume
    if run is None or "resume" not in {field.name for field in fields(args_type)}:
        return None
    path = Path(run).expanduser()
    folder = path.absolute().parents[1] if path.is_file() else path
    if not (folder / "config.yaml").is_file():
        return None
    try:
        return read([str(folder / "config.yaml")], args_type())
    except InputError:  # of another recipe: `vecfl.resume` says so
        return None


def read(files: list[str], args: Args) -> Args:
    """`args` under the values of YAML files, each checked as it is read."""
    for file in files:
        args = _validate(file, _over(asdict(args), _load(file)), type(args))
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
    if error["type"] in ("list_type", "tuple_type"):
        return f"{path}: expected a list, such as [{error['input']}], got {error['input']!r}"
    if error["type"] != "unexpected_keyword_argument":
        return (
            f"{path}: {error['msg'].replace('Input should be', 'expected')}, got {error['input']!r}"
        )
    for key in groups:
        known = known[key]
    nearest = ".".join(map(str, (*groups, *get_close_matches(last, known, 1, cutoff=0))))
    return f"{path}: no option has this name; the nearest is {nearest}"
