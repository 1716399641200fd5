"""Columns: tensors [n, ...] with the examples along the first axis."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vecfl.errors import InputError


def client_columns(row: Mapping[str, Any], client_id: Hashable) -> dict[str, Tensor]:
    """The columns of one client as tensors of one length."""
    where = f"client {client_id!r}"
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: expected {{column: array}}, got {kind(row)}")
    columns = {name: tensor(array, f"{where}, column {name!r}") for name, array in row.items()}
    length(columns, f"{where}: ")
    return columns


def length(columns: Mapping[str, Tensor], where: str = "") -> int:
    """The number of examples, the same in all columns."""
    if not columns:
        raise InputError(f"{where}no columns: expected at least one {{name: array [n, ...]}}")
    for name, column in columns.items():
        if not isinstance(column, Tensor) or column.dim() == 0:
            raise InputError(f"{where}column {name!r}: needs a tensor [n, ...], got {kind(column)}")
    first, n = next((name, len(column)) for name, column in columns.items())
    for name, column in columns.items():
        if len(column) != n:
            raise InputError(
                f"{where}column {name!r} has {len(column)} examples, but column {first!r} has {n}"
            )
    return n


def tensor(array: Any, where: str) -> Tensor:
    """`array` as a tensor with an example axis; arrays keep their dtype, lists follow torch."""
    try:
        if not isinstance(array, Tensor) and hasattr(array, "__array__"):
            array = np.require(array, requirements=["C", "W"])  # torch takes no reversed strides
        return torch.as_tensor(array).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{where}: expected an array of numbers: {reason}") from error


def quantiles(values: NDArray[Any]) -> NDArray[Any]:
    """Minimum, 10 %, median, 90 % and maximum, each a value that occurs: the lower of two."""
    return np.percentile(values, (0, 10, 50, 90, 100), method="inverted_cdf")


def in_words(values: NDArray[Any], form: str = "{:,}") -> str:
    """The quantiles with their names."""
    names = ("min", "10 %", "median", "90 %", "max")
    points = zip(names, quantiles(values), strict=True)
    return ", ".join(f"{name} {form.format(value)}" for name, value in points)


def kind(value: Any) -> str:
    """What a value is, for a message: dtype, shape and device of a tensor, else its type."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
