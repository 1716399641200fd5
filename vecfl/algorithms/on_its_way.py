"""What a server holds of messages that have not arrived, or that it has not used."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from vecfl.aggregate import Aggregate, copied, empty, merge_
from vecfl.algorithms.base import Server, Upload
from vecfl.algorithms.carrying import part
from vecfl.errors import InputError

PREFIX = "late/"
COUNT = "late/clients"  # in `extra`: how many of the messages count
BUFFER = "buffer"
Discount = Callable[[int], float]


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

    A row "d.j", 1 <= j <= d <= most, and the row "buffer" have each `total` [M], `weight`,
    `extra/...` and, of weights that are logs, `shift`; the total of an empty row takes the memory
    of one number.
    `version` counts the server's steps, `started` [most] is the version with which each of the last
    rounds began, the latest first.
    """

    def __init__(self, most: int) -> None:
        self.most = most

    def fresh(self, sent: Upload) -> Server:
        """Nothing on its way, of messages like `sent`."""
        sums = empty(sent.update.shape[1], sent.update.device)
        sums.extra = dict.fromkeys((*sent.extra, COUNT), sums.weight)
        sums.shift = None if sent.log_weight is None else sums.weight - torch.inf
        started = torch.zeros(self.most, dtype=torch.int64, device=sums.weight.device)
        own = {PREFIX + "started": started, PREFIX + "version": started.new_zeros(())}
        for row in (*self.rows(), BUFFER):
            own |= packed(row, none_like(sums))
        return own

    def rows(self) -> Iterator[str]:
        """The names of all rows but the buffer's."""
        return (f"{d}.{j}" for d in range(1, self.most + 1) for j in range(1, d + 1))

    def arrived(self, server: Server, sums: Aggregate, discount: Discount | None) -> Came:
        """What is there at the end of a round whose clients sent `sums`."""
        version, started = server[PREFIX + "version"], server[PREFIX + "started"]
        ages = [0, *(version - started).tolist()]
        rows = rows_of(server)
        parts = [sent(server, sums), *(rows[f"{d}.1"] for d in range(1, self.most + 1))]
        buffer = copied(rows[BUFFER])
        counts = torch.stack([some.extra[COUNT] for some in (*parts, buffer)]).long().tolist()
        before = counts.pop()
        for age, some in zip(ages, parts, strict=True):
            if not is_empty(some):
                some = copied(some)
                if discount is not None:
                    some.total *= checked(discount(age), age)
                merge_(buffer, some)
        clients = sum(counts)
        years = sum(age * count for age, count in zip(ages, counts, strict=True))
        return Came(buffer, before + clients, clients, years / clients if clients else math.nan)

    def waiting(self, server: Server, sums: Aggregate) -> int:
        """How many messages that count do not arrive in this round."""
        rows = rows_of(server)
        there = [rows[row] for row in self.rows() if not row.endswith(".1")]
        counts = [some.extra[COUNT] for some in (*there, *sums.late.values())]
        return int(sum(counts)) if counts else 0

    def next(self, server: Server, sums: Aggregate, came: Came) -> Server:
        """The tensors after the round, the buffer not used."""
        version, started = server[PREFIX + "version"], server[PREFIX + "started"]
        began = torch.cat((version[None], started))[: self.most]
        own, rows = {PREFIX + "started": began, PREFIX + "version": version}, rows_of(server)
        for d in range(1, self.most + 1):
            for j in range(1, d):
                own |= packed(f"{d}.{j}", rows[f"{d}.{j + 1}"])
            late = sums.late[d] if d in sums.late else none_like(sums)
            own |= packed(f"{d}.{d}", sent(server, late))
        return own | packed(BUFFER, came.buffer)

    def emptied(self, own: Server) -> Server:
        """The tensors of `own` that a step by all that was in the buffer changes."""
        version = {PREFIX + "version": own[PREFIX + "version"] + 1}
        return packed(BUFFER, none_like(rows_of(own)[BUFFER])) | version


def packed(row: str, sums: Aggregate) -> Server:
    """The tensors of a row."""
    values = {"total": sums.total, "weight": sums.weight}
    values |= {f"extra/{name}": value for name, value in sums.extra.items()}
    values |= {} if sums.shift is None else {"shift": sums.shift}
    return {f"{PREFIX}{row}/{name}": value for name, value in values.items()}


def rows_of(server: Server) -> dict[str, Aggregate]:
    """The sums of all rows by their names, not copied."""
    kept: dict[str, Server] = {}
    for name, tensor in part(PREFIX, server).items():
        row, slash, what = name.partition("/")
        if slash:
            kept.setdefault(row, {})[what] = tensor
    zero = server[PREFIX + BUFFER + "/weight"].new_zeros(())
    return {
        row: Aggregate(t["total"], t["weight"], None, zero, part("extra/", t), t.get("shift"))
        for row, t in kept.items()
    }


def none_like(sums: Aggregate) -> Aggregate:
    """Sums of no message, whose total repeats one number."""
    zero = torch.zeros_like(sums.weight)
    total, extra = zero.expand(len(sums.total)), dict.fromkeys(sums.extra, zero)
    shift = None if sums.shift is None else zero - torch.inf
    return Aggregate(total, zero, None, zero, extra, shift)


def is_empty(sums: Aggregate) -> bool:
    """Whether these are sums of no message, as `none_like` makes them."""
    return len(sums.total) > 1 and sums.total.stride(0) == 0


def sent(server: Server, sums: Aggregate) -> Aggregate:
    """Sums of a round; on a grid weights that are logs stand as they are, at shift 0."""
    shift = sums.shift
    if shift is None and f"{PREFIX}{BUFFER}/shift" in server:
        shift = torch.zeros_like(sums.weight)
    return Aggregate(sums.total, sums.weight, None, sums.bound, sums.extra, shift)


def checked(value: float, age: int) -> float:
    """A discount; InputError where it is none."""
    if not 0 <= value < math.inf:
        raise InputError(f"delayed: the discount of age {age} is {value}: at least 0 and finite")
    return value
