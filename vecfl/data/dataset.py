"""The federated dataset: pooled columns, contiguous by client."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vecfl.data.columns import client_columns, kind, length, quantiles, tensor
from vecfl.data.ids import StoredIds
from vecfl.data.pages import check_lengths, read_ahead
from vecfl.data.partition import categories, check_range, integer
from vecfl.errors import InputError


@dataclass(frozen=True, eq=False)
class FederatedDataset:
    """Examples of N clients: one tensor per column, the clients one after the other.

    columns: name -> [n_examples, ...]; dtypes are kept (uint8 stays uint8).
    offsets: int64 [N + 1] on the CPU; client k owns the examples offsets[k] : offsets[k + 1].
    client_ids: the N distinct ids that the user knows the clients by; range(N) unless given.
    files: for columns that are maps of files: the file, and the byte where the first value stands.
    lengths: files that are mapped, and their bytes: see `check_files`.

    Clients without examples are legal. Raises InputError for a structure that does not fit. Values
    are not looked at here: `from_clients` and `from_arrays` do that.
    """

    columns: dict[str, Tensor]
    offsets: Tensor
    client_ids: Sequence[Hashable] = ()
    files: Mapping[str, tuple[Path, int]] = field(default_factory=dict)
    lengths: Mapping[Path, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_offsets(self.offsets, length(self.columns))
        if len(self.client_ids) == 0:
            object.__setattr__(self, "client_ids", range(self.num_clients))
        ids = len(self.client_ids)
        if ids != self.num_clients:
            raise InputError(f"client_ids: {ids} ids for the {self.num_clients} clients of offsets")
        if not isinstance(self.client_ids, range) and len(self._positions) != ids:
            k = next(k for k, id_ in enumerate(self.client_ids) if self._positions[id_] != k)
            raise InputError(
                f"client_ids: clients {k} and {self._positions[self.client_ids[k]]} have the same "
                f"id {self.client_ids[k]!r}; ids must be distinct"
            )

    @classmethod
    def from_checked(
        cls,
        columns: dict[str, Tensor],
        offsets: Tensor,
        client_ids: Sequence[Hashable],
        files: Mapping[str, tuple[Path, int]],
        lengths: Mapping[Path, int],
    ) -> FederatedDataset:
        """The dataset of parts that are known to fit: nothing is looked at, so it is at once."""
        dataset = object.__new__(cls)
        vars(dataset).update(columns=columns, offsets=offsets, client_ids=client_ids)
        vars(dataset).update(files=files, lengths=lengths)
        return dataset

    @classmethod
    def from_clients(
        cls, clients: Mapping[Any, Mapping[str, Any]] | Sequence[Mapping[str, Any]]
    ) -> FederatedDataset:
        """A copy of {client id: {column: array [n_k, ...]}}, or of a sequence (ids 0..N-1).

        Columns must agree over clients in name, trailing shape, dtype and device; arrays without
        examples need to agree in name only. Raises InputError, naming client and column, where they
        do not, and for NaN or Inf in a floating column.
        """
        named = clients if isinstance(clients, Mapping) else dict(enumerate(clients))
        if not named:
            raise InputError("no clients: expected {client id: {column: array}}, got none")
        parts = {id_: client_columns(row, id_) for id_, row in named.items()}
        first, pattern = next(iter(parts.items()))
        for id_, part in parts.items():
            if set(part) != set(pattern):
                raise InputError(
                    f"client {id_!r}: columns {list(part)}, "
                    f"but client {first!r} has {list(pattern)}; names must agree"
                )
        sizes = np.array([length(part) for part in parts.values()])
        return _finite({name: _join(name, parts) for name in pattern}, sizes, list(parts))

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Any], client: Any, num_clients: int | None = None
    ) -> FederatedDataset:
        """A copy of pooled {column: array [n, ...]}, grouped by `client` [n], integers or strings.

        Clients are ordered by id; the examples of a client keep their order. With `num_clients`,
        ids are 0..num_clients-1 and some may be empty; without, they are those that occur. Raises
        InputError for lengths that differ, clients out of range, and NaN or Inf in a floating
        column.
        """
        columns = {name: tensor(array, f"column {name!r}") for name, array in arrays.items()}
        n = length(columns)
        if n == 0:
            raise InputError(f"empty dataset: no examples in columns {list(columns)}")
        owner = categories(client, "client")
        if len(owner) != n:
            raise InputError(
                f"client: {len(owner)} entries, but column {next(iter(columns))!r} has {n} examples"
            )
        ids: Sequence[Hashable]
        if num_clients is None:
            unique, owner = np.unique(owner, return_inverse=True)
            ids = unique.tolist()
        else:
            ids = range(integer(num_clients, "num_clients", 1))
            check_range(owner, len(ids))
        order = torch.from_numpy(np.argsort(owner, kind="stable"))
        columns = {name: column[order.to(column.device)] for name, column in columns.items()}
        sizes = np.bincount(owner.astype(np.int64), minlength=len(ids))
        return _finite(columns, sizes, ids)

    @property
    def num_clients(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_examples(self) -> int:
        return int(self.offsets[-1])

    @property
    def sizes(self) -> Tensor:
        """Examples of each client, int64 [N], on the CPU."""
        return self.offsets.diff()

    def client(self, k: int) -> dict[str, Tensor]:
        """The columns of the client at position k, [n_k, ...]: views, not copies."""
        if not 0 <= k < self.num_clients:
            raise InputError(f"client: expected a position in 0..{self.num_clients - 1}, got {k}")
        start, end = self.offsets[k : k + 2].tolist()
        return {name: column[start:end] for name, column in self.columns.items()}

    def position(self, client_id: Hashable) -> int:
        """The position 0..N-1 of a client id; InputError if no client has it."""
        ids = self.client_ids
        try:
            searched = isinstance(ids, range | StoredIds)
            return ids.index(client_id) if searched else self._positions[client_id]
        except (KeyError, ValueError):
            raise InputError(
                f"client id {client_id!r}: none of the {self.num_clients} clients has it; "
                f"the first is {ids[0]!r}"
            ) from None

    def examples(self, n: int = 2) -> dict[str, Tensor]:
        """The first n examples of the pooled data, [n, ...], in a cycle if it has fewer than n."""
        index = torch.arange(integer(n, "n", 1)) % self.num_examples
        return {name: column[index.to(column.device)] for name, column in self.columns.items()}

    def to(self, device: torch.device | str) -> FederatedDataset:
        """The dataset with its columns on `device`; offsets stay on the CPU."""
        columns = {name: column.to(device) for name, column in self.columns.items()}
        files = self.files if torch.device(device).type == "cpu" else {}
        return FederatedDataset.from_checked(
            columns, self.offsets, self.client_ids, files, self.lengths
        )

    def prefetch(self, clients: Tensor) -> None:
        """Have the disk read the examples of clients [C] (positions), if the columns lie there.

        Raises InputError as `check_files` does.
        """
        self.check_files()
        first, last = self.offsets.numpy()[clients], self.offsets.numpy()[clients + 1]
        for name, (path, start) in self.files.items():
            size = self.columns[name][:1].nbytes
            read_ahead(path, start + first * size, start + last * size)

    def check_files(self) -> None:
        """InputError where a file that is mapped has become shorter than it was."""
        check_lengths(self.lengths)

    def __repr__(self) -> str:
        columns = ", ".join(f"{name}: {kind(column[0])}" for name, column in self.columns.items())
        low, _, median, _, high = quantiles(self.sizes.numpy())
        return (
            f"FederatedDataset({self.num_clients} clients, {self.num_examples} examples, "
            f"{columns}, sizes min {low} median {median} max {high})"
        )

    @cached_property
    def _positions(self) -> dict[Hashable, int]:
        return {client_id: k for k, client_id in enumerate(self.client_ids)}


def _check_offsets(offsets: Tensor, n: int) -> None:
    fits = isinstance(offsets, Tensor) and offsets.dim() == 1 and offsets.dtype == torch.int64
    if not fits or offsets.device.type != "cpu":
        raise InputError(f"offsets: expected int64 [N + 1] on the CPU, got {kind(offsets)}")
    if len(offsets) < 2:
        raise InputError(f"offsets: no clients; N clients need N + 1 entries, got {len(offsets)}")
    if n == 0:
        raise InputError(f"empty dataset: none of {len(offsets) - 1} clients has an example")
    falls = torch.nonzero(offsets.diff() < 0).flatten().tolist()
    if falls or offsets[0] != 0 or offsets[-1] != n:
        raise InputError(
            f"offsets: expected to rise from 0 to {n}, the number of examples, "
            f"got {int(offsets[0])} to {int(offsets[-1])}, falling at clients {falls[:3]}"
        )


def _finite(
    columns: dict[str, Tensor], sizes: NDArray[np.int64], ids: Sequence[Hashable]
) -> FederatedDataset:
    """The dataset of clients of these sizes; InputError for NaN or Inf in a floating column."""
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]))
    for name, column in columns.items():
        bounds = column.aminmax() if column.is_floating_point() and column.numel() else ()
        if all(bound.isfinite() for bound in bounds):
            continue
        row = int(torch.nonzero(~column.isfinite().reshape(len(column), -1).all(1))[0])
        k = int(torch.searchsorted(offsets, row, right=True)) - 1
        raise InputError(
            f"column {name!r}, client {ids[k]!r}, example {row - int(offsets[k])}: NaN or Inf; "
            "clean it, or build FederatedDataset(columns, offsets), which does not look at values"
        )
    return FederatedDataset(columns, offsets, ids)


def _join(name: str, clients: Mapping[Hashable, Mapping[str, Tensor]]) -> Tensor:
    """One column of all clients; those without examples have no say in its shape and dtype."""
    parts = {id_: row[name] for id_, row in clients.items() if len(row[name])}
    if not parts:
        raise InputError(f"empty dataset: none of {len(clients)} clients has an example")
    first, pattern = next(iter(parts.items()))
    for id_, part in parts.items():
        same = part.dtype == pattern.dtype and part.device == pattern.device
        if not same or part.shape[1:] != pattern.shape[1:]:
            raise InputError(
                f"client {id_!r}, column {name!r}: {kind(part)}, "
                f"but client {first!r} has {kind(pattern)}; all but the first axis must agree"
            )
    return torch.cat(list(parts.values()))
