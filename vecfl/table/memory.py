"""Rows in memory; a checkpoint holds all of them."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from vecfl.errors import InputError


class Memory:
    """Columns [N, ...] as tensors; memory is taken where rows are written, not before."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], clients: int, dtype: torch.dtype
    ) -> None:
        self.dtype, number = dtype, torch.empty(0, dtype=dtype).numpy().dtype
        try:
            zeros = {name: np.zeros((clients, *shape), number) for name, shape in shapes.items()}
        except (MemoryError, ValueError) as error:
            raise InputError(
                f"the rows of {clients} clients do not fit into memory ({error}): give a folder, "
                "Simulation(table=...)"
            ) from error
        self.columns = {name: torch.from_numpy(column) for name, column in zeros.items()}
        self.old: list[tuple[Tensor, dict[str, Tensor]]] = []

    def read(self, clients: Tensor) -> dict[str, Tensor]:
        return {name: column.index_select(0, clients) for name, column in self.columns.items()}

    def column(self, name: str) -> Tensor:
        return self.columns[name].clone()

    def write(self, clients: Tensor, rows: Mapping[str, Tensor]) -> None:
        for name, values in rows.items():
            self.columns[name].index_copy_(0, clients, values.to(self.dtype))

    def keep(self, round: int, clients: Tensor) -> None:
        self.old = [(clients, self.read(clients))]

    def kept(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        return iter(self.old)

    def check(self, round: int, content: Mapping[str, object]) -> None:
        """InputError where `content` holds other rows, or those of a table on disk."""
        if "table" in content:
            raise InputError(
                f"the checkpoint after round {round} belongs to rows of clients on disk: give "
                "their folder, --table or Simulation(table=...)"
            )
        rows = {name: t for name, t in content.items() if isinstance(t, Tensor)}
        found = {name: (*t.shape, t.dtype) for name, t in rows.items()}
        right = {name: (*t.shape, t.dtype) for name, t in self.columns.items()}
        if (round or content) and found != right:
            raise InputError(
                f"the checkpoint after round {round} holds {found or 'no'} rows of clients, this "
                f"run needs {right}"
            )

    def restore(self, round: int, content: Mapping[str, object]) -> None:
        """Take the rows of `content`; those of no round are zero."""
        self.check(round, content)
        for name, column in content.items():
            self.columns[name].copy_(column)  # type: ignore[arg-type]

    def content(self, round: int) -> dict[str, object]:
        """Copies of the columns."""
        return {name: column.clone() for name, column in self.columns.items()}

    def forget(self, oldest: int) -> None:
        """A checkpoint holds its rows itself: nothing leads back."""
