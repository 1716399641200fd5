"""What a server holds of messages that have not arrived, or that it has not used."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vecfl.aggregate import Aggregate, copied, empty, merge_, none_like
from vecfl.algorithms.base import Server, Upload
from vecfl.algorithms.carrying import part

PREFIX = "late/"
COUNT = "late/clients"  # in `extra`: how many of the messages count
Discount = Callable[[int], float]


def sent(server: Server, sums: Aggregate) -> Aggregate:
    """A copy of sums of a round; on a grid weights that are logs stand as they are, at shift 0."""
    new = copied(sums)
    if PREFIX + "shift" in server and sums.shift is None:
        new.shift = torch.zeros_like(sums.weight)
    return new


@dataclass(frozen=True)
class Came:
    """What arrived in a round.

    buffer   sums of all that the server has not used, of this round's and before
    count    how many messages of it count; clients: of this round's; age: their mean, in steps
    """

    buffer: Aggregate
    count: int
    clients: int
    age: float


class Store:
    """Tensors of what is on its way: sums by how long it was (d) and how long it will be (j).

    Rows [G] of `total` [G, M], `weight`, `shift` and `extra/...`: those of d = 1 with j = 1, of
    d = 2 with j = 1 and 2, and so on; the last is the buffer. `version` counts the server's steps,
    `started` [most] is the version with which each of the last rounds began, the latest first.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.rows = most * (most + 1) // 2 + 1

    def row(self, d: int, j: int) -> int:
        """Where messages of delay d stand that arrive in j rounds, 1 <= j <= d."""
        return d * (d - 1) // 2 + j - 1

    def fresh(self, sent: Upload) -> Server:
        """Nothing on its way, of messages like `sent`."""
        sums = empty(sent.update.shape[1], sent.update.device)
        zero = torch.zeros_like(sums.weight)
        sums.extra = {name: zero for name in (*sent.extra, COUNT)}
        sums.shift = None if sent.log_weight is None else zero - torch.inf
        counts = torch.zeros(self.most, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        started, version = (t.to(zero.device) for t in counts)
        own = self.packed([sums] * self.rows)
        return own | {PREFIX + "started": started, PREFIX + "version": version}

    def packed(self, sums: list[Aggregate]) -> Server:
        """The tensors of all rows."""
        stacks = {"total": [s.total for s in sums], "weight": [s.weight for s in sums]}
        shifts = [s.shift for s in sums if s.shift is not None]
        stacks |= {"shift": shifts} if shifts else {}
        stacks |= {f"extra/{name}": [s.extra[name] for s in sums] for name in sums[0].extra}
        return {PREFIX + name: torch.stack(rows) for name, rows in stacks.items()}

    def at(self, server: Server, row: int) -> Aggregate:
        """The sums of a row, copied."""
        kept = part(PREFIX, server)
        sums = empty(kept["total"].shape[1], kept["total"].device)
        merge_(sums, Aggregate(kept["total"][row], kept["weight"][row], None, sums.bound))
        sums.shift = kept["shift"][row].clone() if "shift" in kept else None
        extra = part("extra/", kept)
        return replace(sums, extra={name: values[row] for name, values in extra.items()})

    def arrived(self, server: Server, sums: Aggregate, discount: Discount | None) -> Came:
        """What is there at the end of a round whose clients sent `sums`."""
        version, started = server[PREFIX + "version"], server[PREFIX + "started"]
        ages = [0, *(version - started).tolist()]
        parts = [
            sent(server, sums),
            *(self.at(server, self.row(d, 1)) for d in range(1, self.most + 1)),
        ]
        buffer, clients, years = self.at(server, self.rows - 1), 0, 0
        for age, some in zip(ages, parts, strict=True):
            count = int(some.extra[COUNT])
            clients, years = clients + count, years + age * count
            if discount is not None:
                some.total *= discount(age)
            merge_(buffer, some)
        mean = years / clients if clients else float("nan")
        return Came(buffer, int(buffer.extra[COUNT]), clients, mean)

    def next(self, server: Server, sums: Aggregate, came: Came) -> Server:
        """The tensors after the round, the buffer not used."""
        rows = []
        for d in range(1, self.most + 1):
            rows += [self.at(server, self.row(d, j + 1)) for j in range(1, d)]
            late = sums.late[d] if d in sums.late else none_like(sums)
            rows.append(sent(server, late))
        version, started = server[PREFIX + "version"], server[PREFIX + "started"]
        return self.packed([*rows, came.buffer]) | {
            PREFIX + "started": torch.cat((version[None], started))[: self.most],
            PREFIX + "version": version,
        }

    def emptied(self, own: Server) -> Server:
        """The tensors `own` after a step by all that was in the buffer."""
        *rows, used = [self.at(own, row) for row in range(self.rows)]
        return self.packed([*rows, none_like(used)]) | {
            PREFIX + "version": own[PREFIX + "version"] + 1
        }
