"""What an algorithm is: a few functions about rows and one model.

Axes: K finished rows, P numbers in a row, M = P numbers in a message. A row is the trainable
parameters, then the buffers that training changes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from vecfl.aggregate import Aggregate
from vecfl.engine.rule import LocalRule

Server = dict[str, Tensor]


@dataclass(frozen=True)
class Starting:
    """Clients that start: `client` [K], positions in the dataset, and their rows of the table.

    table  {column: [K, ...]}
    """

    client: Tensor
    table: dict[str, Tensor]


@dataclass(frozen=True)
class Begin:
    """How clients start: `model` [P] or [K, P], and a correction row `bias` [K, trainable]."""

    model: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Finished:
    """Rows of clients that have finished.

    model     [K, P]; state: optimizer tensors, each [K, trainable]; bias [K, trainable] or None
    client    [K] positions in the dataset; examples [K] how many an epoch visits
    loss, weight  [K] float64 sums over all batches; seen [K] examples visited, with repetition
    table     {column: [K, ...]}, the clients' rows as they were when they started
    """

    model: Tensor
    state: list[Tensor]
    bias: Tensor | None
    client: Tensor
    examples: Tensor
    loss: Tensor
    weight: Tensor
    seen: Tensor
    table: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Upload:
    """What clients send, `update` [K, M] with `weight` [K] float64, and what they keep.

    table  {column: [K, ...]}, their new rows; a client is finite where both update and rows are
    """

    update: Tensor
    weight: Tensor
    table: dict[str, Tensor] = field(default_factory=dict)


def no_table(size: int) -> dict[str, tuple[int, ...]]:
    """Clients keep nothing between rounds."""
    return {}


@dataclass(frozen=True)
class Algorithm:
    """A federated algorithm as a value.

    name    as the recipes call it
    rule    how a client trains
    init    (w [P], trainable) -> server state; its entry "w" is the model
    begin   (server state, Starting) -> Begin
    upload  (server state, Finished) -> Upload
    server  (server state, Aggregate, trainable) -> server state
    table   P -> {column: shape}: what each client keeps from one round to its next, zero at first

    The first `trainable` numbers of "w" are parameters, the rest changing buffers.
    """

    name: str
    rule: LocalRule
    init: Callable[[Tensor, int], Server] = field(repr=False)
    begin: Callable[[Server, Starting], Begin] = field(repr=False)
    upload: Callable[[Server, Finished], Upload] = field(repr=False)
    server: Callable[[Server, Aggregate, int], Server] = field(repr=False)
    table: Callable[[int], dict[str, tuple[int, ...]]] = field(default=no_table, repr=False)
