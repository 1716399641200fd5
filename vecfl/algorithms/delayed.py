"""Messages that arrive late, and servers that wait for a buffer of them.

Nguyen et al., AISTATS 2022, arXiv:2106.06639 (FedBuff, Algorithm 1), in rounds.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vecfl.aggregate import Aggregate
from vecfl.algorithms.base import Algorithm, Finished, Metrics, Round, Server, Upload
from vecfl.algorithms.carrying import carrying, others
from vecfl.algorithms.nobody import nobody
from vecfl.algorithms.on_its_way import COUNT, PREFIX, Discount, Store, none_like
from vecfl.delays import Delay
from vecfl.errors import InputError, is_integer
from vecfl.layout import Layout

MOST = 100  # rounds, which make 5,050 sums


def polynomial(power: float) -> Discount:
    """(1 + age)^-power, 1/2 in the experiments of the paper (section 5)."""
    if not 0 <= power < float("inf"):
        raise InputError(f"polynomial(power={power}): must be at least 0 and finite")

    def discount(age: int) -> float:
        return float((1 + age) ** -power)

    discount.__qualname__ = f"polynomial({float(power)})"
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
    [d (d + 1) / 2 + 1, M] float64, of which those without a message take no memory. It stands
    around all transforms; not around an aggregator, which would need the messages one by one. Tells
    `late/arrived`, `late/age` (mean, of those), `late/waiting` (on their way), `late/buffered` and
    `late/steps` (of the server).

    Raises InputError for these, for a second one, and for a discount around SCAFFOLD or FedDyn:
    what their clients keep would no longer add up to what the server keeps.
    """
    check(algorithm, delay, buffer, discount)
    parts = [delay.name if delay else "", f"buffer {buffer}" if buffer > 1 else ""]
    parts.append(getattr(discount, "__qualname__", "") if discount is not None else "")
    late = Late(algorithm, Store(delay.most if delay is not None else 0), buffer, discount)
    return replace(
        carrying(algorithm, PREFIX, late.start),
        name=f"{algorithm.name}, delayed({'; '.join(p for p in parts if p)})",
        upload=late.upload,
        server=late.step,
        metrics=late.metrics,
        delay=delay or Delay("", 0, lambda clients, round, seed: torch.zeros_like(clients)),
    )


def check(algorithm: Algorithm, delay: object, buffer: int, discount: object) -> None:
    """Raise InputError for what `delayed` cannot stand around, or be given."""
    if not isinstance(delay, Delay | None) or not (discount is None or callable(discount)):
        raise InputError(
            f"delayed({delay!r}, discount={discount!r}): expected a delay, such as stale(0.3), and "
            "a function of the age, such as polynomial(0.5)"
        )
    if discount is not None and algorithm.keeps is not None:
        raise InputError(
            f"{algorithm.name}: no discount: what its clients keep would no longer add up to what "
            "the server keeps; delays and a buffer are fine"
        )
    if algorithm.privacy is not None:
        raise InputError(
            f"{algorithm.name}: a message that arrives late is released in another round than the "
            "accounting has it; nothing is delayed under privacy"
        )
    if algorithm.aggregator is not None or algorithm.delay is not None:
        why = "needs all messages at once" if algorithm.aggregator is not None else "is delayed"
        raise InputError(f"{algorithm.name}: {why}; delayed cannot stand around it")
    if delay is not None and delay.most > MOST:
        raise InputError(
            f"{delay.name}: up to {delay.most} rounds late; at most {MOST} can be, for the server "
            "keeps sums of what is on its way by both its delay and the rounds still to go"
        )
    if not is_integer(buffer) or buffer < 1:
        raise InputError(f"delayed(buffer={buffer!r}): must be an integer of at least 1")


@dataclass(frozen=True)
class Late:
    """The functions of a delayed algorithm, from that one and what `delayed` was given."""

    algorithm: Algorithm
    store: Store
    buffer: int
    discount: Discount | None

    def start(self, w: Tensor, layout: Layout) -> Server:
        """Nothing on its way."""
        return self.store.fresh(nobody(self.algorithm, w, layout))

    def upload(self, server: Server, done: Finished) -> Upload:
        """What the algorithm sends, and how many messages count."""
        sent = self.algorithm.upload(rest(server), done)
        return replace(sent, extra=sent.extra | {COUNT: (sent.weight > 0).double()})

    def step(self, server: Server, sums: Aggregate, round: Round) -> Server:
        """The algorithm's step by the whole buffer, where it is full."""
        came = self.store.arrived(server, sums, self.discount)
        inner, own = rest(server), self.store.next(server, sums, came)
        if came.count < self.buffer:
            return inner | own
        used = self.algorithm.server(inner, plain(came.buffer), round)
        return used | own | self.store.emptied(own)

    def metrics(self, server: Server, sums: Aggregate, round: Round) -> Metrics:
        """The algorithm's, of the messages that it used, and `late/...`."""
        came = self.store.arrived(server, sums, self.discount)
        steps = came.count >= self.buffer
        used = came.buffer if steps else none_like(came.buffer)
        return {
            **self.algorithm.metrics(rest(server), plain(used), round),
            "late/arrived": came.clients,
            "late/age": came.age,
            "late/waiting": self.store.waiting(server, sums),
            "late/buffered": 0 if steps else came.count,
            "late/steps": int(server[PREFIX + "version"]) + steps,
        }


def rest(server: Server) -> Server:
    """The state of the algorithm inside."""
    return others(PREFIX, server)


def plain(sums: Aggregate) -> Aggregate:
    """The sums without the number of clients, which the algorithm inside did not send."""
    return replace(sums, extra={n: v for n, v in sums.extra.items() if n != COUNT})
