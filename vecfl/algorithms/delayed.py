"""Messages that arrive late, and servers that wait for a buffer of them.

Nguyen et al., AISTATS 2022, arXiv:2106.06639 (FedBuff, Algorithm 1), in rounds.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vecfl.aggregate import Aggregate, copied, empty, merge_, none_like
from vecfl.algorithms.base import Algorithm, Finished, Metrics, Round, Server, Upload
from vecfl.algorithms.carrying import carrying
from vecfl.algorithms.nobody import nobody
from vecfl.delays import Delay
from vecfl.errors import InputError, is_integer
from vecfl.layout import Layout

PREFIX = "late/"
COUNT = "late/clients"  # in `extra`: how many of the messages count
Discount = Callable[[int], float]


def polynomial(power: float) -> Discount:
    """(1 + age)^-power, 1/2 in the experiments of the paper (section 5)."""
    if not 0 <= power < float("inf"):
        raise InputError(f"polynomial(power={power}): must be at least 0 and finite")

    def discount(age: int) -> float:
        return float((1 + age) ** -power)

    discount.__qualname__ = f"polynomial({power:g})"
    return discount


def delayed(
    algorithm: Algorithm,
    delay: Delay | None = None,
    *,
    buffer: int = 1,
    discount: Discount | None = None,
) -> Algorithm:
    """`algorithm` whose messages arrive late, and whose server waits for `buffer` of them.

    delay     how many rounds each message is on its way (None: none); it was made from the model
              and by the examples of its own round
    buffer    the server steps at the end of a round in which as many have come as the buffer holds
              or more, by all of them; until then the model stays
    discount  by age, the server's steps since the client began, what a message is multiplied by;
              its weight is not, so old messages make steps shorter. None: 1

    `stale(p)` alone is the staleness of FLUTE; a discount and a buffer make it FedBuff. Without
    delay and with `buffer` 1 it is `algorithm`. What clients keep they keep when they have trained.
    The server keeps what is on its way, summed up by rounds: with d the most rounds of the delay
    [d (d + 1) / 2 + 1, M] float64, and the buffer. It stands around all transforms; not around an
    aggregator, which would need the messages one by one. Tells `late/arrived`, `late/age` (mean,
    of those), `late/waiting` (on their way), `late/buffered` and `late/steps` (of the server).

    Raises InputError for these, for a second one, and, where the run begins, for a discount with
    an algorithm of several messages or with rows of its own: its invariants would break.
    """
    if algorithm.aggregator is not None or algorithm.delay is not None:
        why = "needs all messages at once" if algorithm.aggregator is not None else "is delayed"
        raise InputError(f"{algorithm.name}: {why}; delayed cannot stand around it")
    if not is_integer(buffer) or buffer < 1:
        raise InputError(f"delayed(buffer={buffer!r}): must be an integer of at least 1")
    store = Store(delay.most if delay is not None else 0)

    def start(w: Tensor, layout: Layout) -> Server:
        if discount is not None:
            check_invariants(algorithm, layout)
        return store.fresh(nobody(algorithm, w, layout))

    def upload(server: Server, done: Finished) -> Upload:
        sent = algorithm.upload(rest(server), done)
        return replace(sent, extra=sent.extra | {COUNT: (sent.weight > 0).double()})

    def step(server: Server, sums: Aggregate, round: Round) -> Server:
        came = store.arrived(server, sums, discount)
        inner, own = rest(server), store.next(server, sums, came)
        if came.count < buffer:
            return inner | own
        used = algorithm.server(inner, plain(came.buffer), round)
        return used | own | store.emptied(own)

    def metrics(server: Server, sums: Aggregate, round: Round) -> Metrics:
        came = store.arrived(server, sums, discount)
        steps = came.count >= buffer
        used = came.buffer if steps else none_like(came.buffer)
        waiting = store.next(server, sums, came)[f"{PREFIX}extra/{COUNT}"][:-1].sum()
        return {
            **algorithm.metrics(rest(server), plain(used), round),
            "late/arrived": came.clients,
            "late/age": came.age,
            "late/waiting": int(waiting),
            "late/buffered": 0 if steps else came.count,
            "late/steps": int(server[PREFIX + "version"]) + steps,
        }

    parts = [delay.name if delay else "", f"buffer {buffer}" if buffer > 1 else ""]
    parts.append(getattr(discount, "__qualname__", "") if discount is not None else "")
    return replace(
        carrying(algorithm, PREFIX, start),
        name=f"{algorithm.name}, delayed({'; '.join(p for p in parts if p)})",
        upload=upload,
        server=step,
        metrics=metrics,
        delay=delay or Delay("", 0, lambda clients, round, seed: torch.zeros_like(clients)),
    )


def check_invariants(algorithm: Algorithm, layout: Layout) -> None:
    """InputError where old messages cannot be made smaller; transforms may keep rows."""
    rows = [name for name in algorithm.table(layout) if not name[0].isdigit()]
    if len(algorithm.messages) > 1 or rows:
        raise InputError(
            f"{algorithm.name}: no discount: what its clients keep would no longer add up to what "
            "the server keeps; delays and a buffer are fine"
        )


def rest(server: Server) -> Server:
    """The state of the algorithm inside."""
    return {name: t for name, t in server.items() if not name.startswith(PREFIX)}


def plain(sums: Aggregate) -> Aggregate:
    """The sums without the number of clients, which the algorithm inside did not send."""
    return replace(sums, extra={n: v for n, v in sums.extra.items() if n != COUNT})


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
        kept = {n.removeprefix(PREFIX): t for n, t in server.items() if n.startswith(PREFIX)}
        sums = empty(kept["total"].shape[1], kept["total"].device)
        merge_(sums, Aggregate(kept["total"][row], kept["weight"][row], None, sums.bound))
        sums.shift = kept["shift"][row].clone() if "shift" in kept else None
        extra = {n.removeprefix("extra/"): t for n, t in kept.items() if n.startswith("extra/")}
        return replace(sums, extra={name: values[row] for name, values in extra.items()})

    def arrived(self, server: Server, sums: Aggregate, discount: Discount | None) -> Came:
        """What is there at the end of a round whose clients sent `sums`."""
        version, started = server[PREFIX + "version"], server[PREFIX + "started"]
        ages = [0, *(version - started).tolist()]
        parts = [copied(sums), *(self.at(server, self.row(d, 1)) for d in range(1, self.most + 1))]
        buffer, clients, years = self.at(server, self.rows - 1), 0, 0
        for age, part in zip(ages, parts, strict=True):
            count = int(part.extra[COUNT])
            clients, years = clients + count, years + age * count
            if discount is not None:
                part.total *= discount(age)
            merge_(buffer, part)
        mean = years / clients if clients else float("nan")
        return Came(buffer, int(buffer.extra[COUNT]), clients, mean)

    def next(self, server: Server, sums: Aggregate, came: Came) -> Server:
        """The tensors after the round, the buffer not used."""
        rows = []
        for d in range(1, self.most + 1):
            rows += [self.at(server, self.row(d, j + 1)) for j in range(1, d)]
            rows.append(sums.late[d] if d in sums.late else none_like(copied(sums)))
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
