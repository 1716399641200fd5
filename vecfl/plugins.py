"""What a flag names: a part of vecfl, or a function of the user's own, with its arguments.

    uniform(20)                          of vecfl
    separated(poisson(0.1), rounds=5)    parts inside parts
    mine.py:median                       the function itself, in a file
    package.module:proximal(mu=0.1)      what it gives when it is called, in a module

Arguments are literals and parts; nothing else is evaluated.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from vecfl.errors import InputError

Known = Mapping[str, Callable[..., Any]]
FILE = re.compile(r"(?:[^=(]*=)?([^(]+\.py):\w")  # behind NAME= in --metrics


def part(flag: str, text: str, known: Known) -> Any:
    """What `text` names: `known` parts by their names, others by file or module.

    Raises InputError, with the flag, for what cannot be read, found or called so.
    """
    where, name, call = _split(flag, text)
    named = _imported(flag, where, name) if where else _known(flag, name, known)
    if call is None:
        if not where:
            raise InputError(f"{flag}: {name} takes arguments, or (): {_form(name, named)}")
        return named
    return _called(flag, named, name, call, known, where)


def function(flag: str, text: str, known: Known) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function that `text` names, not called, and the named arguments that stand behind it."""
    where, name, call = _split(flag, text)
    named = _imported(flag, where, name) if where else _known(flag, name, known)
    _require_function(flag, name, named)
    if call is not None and call.args:
        raise InputError(f"{flag}: {text}: give arguments by name, {_form(name, named)}")
    keywords = [] if call is None else call.keywords
    return named, {k.arg or "**": _value(flag, k.value, known) for k in keywords}


def around(flag: str, text: str, known: Known, inside: Known) -> Callable[[Any], Any]:
    """The function that `text` names, with all its arguments but the first, which is still to come.

    `known` by their names, `inside` in their arguments. Raises InputError as `part` does.
    """
    where, name, call = _split(flag, text)
    named = _imported(flag, where, name) if where else _known(flag, name, known)
    args = [] if call is None else [_value(flag, value, inside) for value in call.args]
    keywords = [] if call is None else call.keywords
    kwargs = {k.arg or "**": _value(flag, k.value, inside) for k in keywords}
    _bind(flag, named, name, args, kwargs, first=1)
    form = _form(name, named, first=1)
    return lambda first: _made(flag, text, form, not where, lambda: named(first, *args, **kwargs))


def takes(flag: str, text: str, found: Any, *names: str) -> Any:
    """`found`, which `text` names; InputError unless it can be called with arguments `names`."""
    wanted = f"expected a function of ({', '.join(names)})"
    if not callable(found):
        raise InputError(f"{flag}: {text} {'gives' if '(' in text else 'is'} {found!r}; {wanted}")
    try:
        inspect.signature(found).bind(*names)
    except TypeError as error:
        form = f"{flag}: {text} is {_form(getattr(found, '__name__', 'a function'), found)}"
        made = "" if "(" in text else f"; one that makes it takes arguments, or (): {text}(...)"
        raise InputError(f"{form}; {wanted}{made}") from error
    except ValueError:  # built in, without a signature
        pass
    return found


def digests(settings: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The SHA-256 of each file that a setting names, by setting and path; modules are not read."""
    found: dict[str, dict[str, str]] = {}
    for name, value in settings.items():
        for text in (
            [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
        ):
            match = FILE.match(text) if isinstance(text, str) else None
            if match and (path := Path(match[1]).expanduser()).is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                found.setdefault(name, {})[match[1]] = digest
    return found


def _split(flag: str, text: str) -> tuple[str, str, ast.Call | None]:
    """File or module ("" for none), name, and the call behind it."""
    head = text.partition("(")[0]
    where, _, name = head.rpartition(":")
    try:
        tree = ast.parse(text[len(where) + bool(where) :].strip(), mode="eval").body
    except SyntaxError:
        tree = None
    if isinstance(tree, ast.Name):
        return where, tree.id, None
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        return where, tree.func.id, tree
    raise InputError(f"{flag}: {text}: expected name(arguments), file.py:name or module:name")


def _known(flag: str, name: str, known: Known) -> Callable[..., Any]:
    if name not in known:
        near = ", ".join(get_close_matches(name, known, 3, cutoff=0.5) or sorted(known))
        raise InputError(f"{flag}: no {name} here; is it {near}? Your own is file.py:{name}")
    return known[name]


def _imported(flag: str, where: str, name: str) -> Callable[..., Any]:
    """`name` of a file or module; what is wrong inside of it keeps its traceback."""
    try:
        module = _file(flag, Path(where)) if where.endswith(".py") else _module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not where.startswith(error.name):
            raise
        raise InputError(f"{flag}: no module {where}; a file is file.py:{name}") from error
    found: Callable[..., Any] | None = getattr(module, name, None)
    if found is None:
        functions = [f for f in vars(module).values() if inspect.isfunction(f)]
        own = [f.__name__ for f in functions if f.__module__ == module.__name__]
        near = get_close_matches(name, own, 3, cutoff=0)
        raise InputError(
            f"{flag}: {where} has no {name}; it has {', '.join(near) or 'no function'}"
        )
    return found


def _module(where: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` has it
    return importlib.import_module(where)


def _file(flag: str, path: Path) -> ModuleType:
    path = path.expanduser()
    if not path.is_file():
        raise InputError(
            f"{flag}: no file {path} in {Path.cwd()}"
            + "; go on with a run from the folder where it was started" * (not path.is_absolute())
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _called(
    flag: str,
    named: Callable[..., Any],
    name: str,
    call: ast.Call,
    known: Known,
    where: str = "",
) -> Any:
    args = [_value(flag, value, known) for value in call.args]
    kwargs = {k.arg or "**": _value(flag, k.value, known) for k in call.keywords}
    _bind(flag, named, name, args, kwargs)
    text, form = ast.unparse(call), _form(name, named)
    return _made(flag, text, form, not where, lambda: named(*args, **kwargs))


def _bind(
    flag: str,
    named: Callable[..., Any],
    name: str,
    args: list[Any],
    kwargs: dict[str, Any],
    first: int = 0,
) -> None:
    """InputError unless `named` takes these arguments behind the `first` ones."""
    _require_function(flag, name, named)
    try:
        inspect.signature(named).bind(*[None] * first, *args, **kwargs)
    except TypeError as error:
        form = _form(name, named, first)
        raise InputError(f"{flag}: {name}: {error}; it is {form}") from error


def _require_function(flag: str, name: str, named: object) -> None:
    if not callable(named):
        raise InputError(f"{flag}: {name} is {named!r}; expected a function")


def _made(flag: str, text: str, form: str, known: bool, make: Callable[[], Any]) -> Any:
    """What a part makes of the arguments in `text`; those of vecfl may not be able to use them."""
    try:
        return make()
    except InputError as error:
        if str(error).startswith(flag):
            raise
        name = text.partition("(")[0].rpartition(":")[2].strip()
        which = "" if name in str(error) else f"{text}: "
        raise InputError(f"{flag}: {which}{error}") from error
    except (TypeError, AttributeError) as error:
        if not known:
            raise  # inside of a file of the user's own
        what = f"{text}: an argument is of the wrong type"
        raise InputError(f"{flag}: {what}; it is {form}") from error


def _value(flag: str, node: ast.expr, known: Known) -> Any:
    """A literal, or a known part that is called."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _called(flag, _known(flag, node.func.id, known), node.func.id, node, known)
    if isinstance(node, ast.Name) and node.id in known:
        form = _form(node.id, known[node.id])
        raise InputError(f"{flag}: {node.id} takes arguments, or (): {form}")
    try:
        return ast.literal_eval(node)
    except ValueError:
        text = ast.unparse(node)
        raise InputError(f"{flag}: {text}: expected a number, a text or a list") from None


def _form(name: str, named: Callable[..., Any], first: int = 0) -> str:
    """How it is called behind the `first` arguments, without types."""
    every = list(inspect.signature(named).parameters.values())
    bare = [p.replace(annotation=p.empty) for p in every[first:]]
    return f"{name}{inspect.Signature(bare)}"
