"""Any map-style dataset: `len(dataset)`, `dataset[i]`, and the client of each example."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from vecfl.data.dataset import FederatedDataset
from vecfl.data.images import NAMES, decoded, is_image
from vecfl.data.stream import Clients, Encode, by_client, collect, encoded
from vecfl.errors import InputError


def example_clients(dataset: Any, client: Any, encode: Encode | None = None) -> Clients:
    """The clients of a map-style dataset, as of torchvision or Hugging Face, ordered by id.

    Examples are pairs (x, y), or mappings: image and img become x, label becomes y, other keys keep
    their names. `client` [n] are the clients of the examples, or the key of a mapping that holds
    it. Values are numbers, arrays, tensors or images of Pillow (uint8 [C, H, W]); integers become
    int64, Python's floats float32; text needs `encode`. Examples are taken one client at a time.
    Raises InputError, naming client and column; an error of the dataset itself passes.
    """
    source = type(dataset).__name__
    n = len(dataset)
    if isinstance(client, str):
        owner = _column(dataset, client, n)
    else:
        owner = client
        if not hasattr(owner, "__len__"):
            raise InputError(
                f"{source}: client: expected the clients of the {n} examples, or the key that "
                f"holds them, got a {type(owner).__name__}; partitions take the labels: "
                "client=dirichlet(labels, 100, 0.3, seed=0)"
            )
        if len(owner) != n:
            raise InputError(f"{source}: {len(owner)} clients for {n} examples")
    for id_, rows in by_client({"row": np.arange(n)}, owner, f"{source}, client"):
        where = f"{source}, client {id_!r}"
        parts: dict[str, list[Any]] = {}
        for row in rows["row"].tolist():
            example = _named(dataset[row], f"{source}, example {row}")
            if isinstance(client, str):
                example.pop(NAMES.get(client, client))
            if parts and set(parts) != set(example):
                raise InputError(
                    f"{source}, example {row}: columns {list(example)}, expected {list(parts)}"
                )
            for name, value in example.items():
                parts.setdefault(name, []).append(value)
        columns = {
            name: _stacked(part, f"{where}, column {name!r}") for name, part in parts.items()
        }
        yield id_, encoded(columns, encode, where)


def read_examples(dataset: Any, client: Any, encode: Encode | None = None) -> FederatedDataset:
    """The FederatedDataset of a map-style dataset; see `example_clients`."""
    return collect(example_clients(dataset, client, encode), type(dataset).__name__)


def _column(dataset: Any, key: str, n: int) -> Any:
    """One key of all examples; data sets of Hugging Face have it without decoding the others."""
    if key in (getattr(dataset, "column_names", None) or ()):
        return list(dataset[key])
    values = []
    for row in range(n):
        example = dataset[row]
        if not isinstance(example, Mapping) or key not in example:
            found = list(example) if isinstance(example, Mapping) else type(example).__name__
            raise InputError(
                f"{type(dataset).__name__}, example {row}: no key {key!r} for the client: {found}"
            )
        values.append(example[key])
    return values


def _named(example: Any, where: str) -> dict[str, Any]:
    if isinstance(example, Mapping):
        return {NAMES.get(str(name), str(name)): value for name, value in example.items()}
    if isinstance(example, tuple | list) and len(example) == 2:
        return {"x": example[0], "y": example[1]}
    raise InputError(f"{where}: a {type(example).__name__}; expected (x, y) or {{column: value}}")


def _stacked(values: list[Any], where: str) -> Any:
    """The values of one client's examples as an array [n, ...]; text as the list it is."""
    if is_image(values[0]):
        return decoded(values, where)
    if isinstance(values[0], str):
        return values
    try:
        array = np.stack([v.numpy(force=True) if isinstance(v, Tensor) else v for v in values])
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: examples of different shapes or kinds: {error}") from error
    if isinstance(values[0], float):
        return array.astype(np.float32)
    small = array.dtype.kind == "i" and array.ndim == 1
    return array.astype(np.int64) if small else array
