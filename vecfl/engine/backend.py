"""What a backend is: it trains the rows of a block in place."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from vecfl.engine.rule import Update
from vecfl.engine.slots import Slots
from vecfl.tape import Block


class Backend(Protocol):
    """Trains rows. It owns a copy of the task's module, so one backend serves one thread.

    `run_` moves the rows of `block.active` through the block's steps and adds to the slots' loss,
    weight and seen; it calls `update` on the rows that it has gradients for. It returns how many
    slot-steps it executed, idle ones included. Nothing in it waits for a GPU.

    layers  paths of those that run "fused" and "by_vmap", where the backend replaces layers
    """

    name: str
    layers: Mapping[str, list[str]]

    def run_(
        self, slots: Slots, block: Block, columns: Mapping[str, Tensor], update: Update
    ) -> int: ...


def gather(columns: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """The examples of index [...]: columns [n, ...] give [*index.shape, ...]."""
    flat = index.reshape(-1)
    return {
        name: torch.index_select(column, 0, flat).view(*index.shape, *column.shape[1:])
        for name, column in columns.items()
    }
