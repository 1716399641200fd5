"""Client streams: what every reader of a data format gives, and how a stream becomes a dataset."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vecfl.data.dataset import FederatedDataset
from vecfl.data.partition import categories
from vecfl.errors import InputError

# One (client id, {column: array [n_k, ...]}) per client.
Clients = Iterator[tuple[Hashable, Mapping[str, Any]]]
# From ONE client's raw columns (lists of text, arrays of numbers) to columns of numbers.
Encode = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def collect(clients: Clients, source: Any) -> FederatedDataset:
    """The dataset of a client stream, in its order; `source` (a path) opens every message.

    Columns must be numbers and agree over clients in name, dtype and trailing shape; a client
    without examples needs to agree in name only. Raises InputError, naming source, client and
    column, where they do not, for an id that occurs twice, for NaN and Inf, and for no examples.
    Peak memory: the data, its largest column again, and some 300 bytes a client and column.
    """
    parts: dict[str, list[NDArray[Any]]] = {}
    sizes: dict[Hashable, int] = {}
    patterns: dict[str, tuple[Hashable, NDArray[Any]]] = {}
    for id_, columns in clients:
        where = f"{source}, client {id_!r}"
        if not isinstance(id_, Hashable) or id_ in sizes:
            raise InputError(f"{where}: the id occurs twice or has no hash; ids must be distinct")
        arrays = _arrays(columns, where)
        if sizes and set(arrays) != set(parts):
            raise InputError(
                f"{where}: columns {list(arrays)}, but client {next(iter(sizes))!r} has "
                f"{list(parts)}; names must agree"
            )
        sizes[id_] = len(next(iter(arrays.values())))
        for name, array in arrays.items():
            same_column = parts.setdefault(name, [])
            if len(array):
                _agree(array, patterns.setdefault(name, (id_, array)), f"{where}, column {name!r}")
                same_column.append(array)
    if not any(sizes.values()):
        raise InputError(f"{source}: {len(sizes)} clients, and none has an example")
    offsets = torch.from_numpy(np.cumsum([0, *sizes.values()], dtype=np.int64))
    joined = {name: torch.from_numpy(np.concatenate(parts.pop(name))) for name in list(parts)}
    return FederatedDataset(joined, offsets, list(sizes))


def by_client(columns: Mapping[str, Any], client: Any, name: str) -> Clients:
    """The clients of pooled columns (arrays [n, ...] or lists of n), ordered by id.

    `client` [n] are integers or strings; InputError, which begins with `name`, for anything else.
    The examples of a client keep their order.
    """
    ids, owner = np.unique(categories(client, name), return_inverse=True)
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner))
    for id_, rows in zip(ids.tolist(), np.split(order, ends[:-1]), strict=True):
        yield id_, {key: rows_of(values, rows) for key, values in columns.items()}


def rows_of(values: Any, rows: NDArray[np.int64]) -> Any:
    """Some rows of an array, or of a list as a list."""
    return [values[row] for row in rows.tolist()] if isinstance(values, list) else values[rows]


def encoded(columns: Mapping[str, Any], encode: Encode | None, where: str) -> Mapping[str, Any]:
    """One client's columns after `encode`, if there is one; its InputError begins with `where`."""
    if encode is None:
        return columns
    try:
        return encode(columns)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except KeyError as error:  # as a rule a column that the file lacks
        raise InputError(f"{where}: encode= found no {error} in {list(columns)}") from error


def numbers(values: Any, where: str) -> NDArray[Any]:
    """`values` as an array of numbers in the machine's byte order; InputError for anything else."""
    if isinstance(values, list) and values and isinstance(values[0], str | bytes):
        raise _text(where)
    try:
        if isinstance(values, Tensor):
            values = values.detach().cpu().numpy()
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{where}: expected an array of numbers: {_first_line(error)}") from error
    if array.dtype.kind in "SUT":
        raise _text(where)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise InputError(f"{where}: expected numbers of at most 8 bytes, got {array.dtype}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _arrays(columns: Mapping[str, Any], where: str) -> dict[str, NDArray[Any]]:
    """The columns of one client, all of one length, without NaN and Inf."""
    if not isinstance(columns, Mapping) or not columns:
        raise InputError(f"{where}: expected {{column: array [n, ...]}}, got {columns!r:.60}")
    arrays = {
        name: numbers(values, f"{where}, column {name!r}") for name, values in columns.items()
    }
    first = next(iter(arrays))
    for name, array in arrays.items():
        if array.ndim == 0 or arrays[first].ndim == 0 or len(array) != len(arrays[first]):
            raise InputError(
                f"{where}: column {name!r} is {list(array.shape)}, but column {first!r} is "
                f"{list(arrays[first].shape)}; expected [n, ...] with one n for all columns"
            )
        if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
            row = int(np.argwhere(~finite)[0][0])
            raise InputError(
                f"{where}, column {name!r}, example {row}: NaN or Inf; expected finite numbers"
            )
    return arrays


def _agree(array: NDArray[Any], pattern: tuple[Hashable, NDArray[Any]], where: str) -> None:
    first, other = pattern
    if array.dtype != other.dtype or array.shape[1:] != other.shape[1:]:
        raise InputError(
            f"{where}: {array.dtype} {list(array.shape)}, but client {first!r} has {other.dtype} "
            f"{list(other.shape)}; all but the first axis must agree"
        )


def _text(where: str) -> InputError:
    return InputError(
        f"{where}: text; expected numbers: give encode=, a function from one client's columns to "
        "columns of numbers (vecfl.data.text has some)"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
