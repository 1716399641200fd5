"""How many rounds the messages of clients are on their way.

Axes: C clients of the cohort, N of the population, T rounds of a trace.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecfl.errors import InputError, is_integer
from vecfl.random import Kind, stream, words
from vecfl.work import fits, occurrences, said, whole_numbers

DELAY = 6  # step of streams of kind cohort: see `vecfl.work.WORK`


@dataclass(frozen=True)
class Delay:
    """A model of delays.

    name  with what the result depends on
    most  rounds; messages of that many rounds wait at a time
    draw  (clients [C], round, seed) -> int64 [C], 0 to `most`: a function of these alone
    clients  N, where it knows so many by name; None: any number
    """

    name: str
    most: int
    draw: Callable[[Tensor, int, int], Tensor] = field(repr=False)
    clients: int | None = None

    def check(self, clients: int) -> None:
        """InputError for another population than that of a trace."""
        if self.clients not in (None, clients):
            raise InputError(f"delay_trace: {self.clients} clients, but there are {clients}")

    def of(self, clients: Tensor, round: int, seed: int) -> np.ndarray:
        """The delays int64 [C] of a cohort; InputError where they are none."""
        what = f"{self.name}, round {round + 1}"
        found = whole_numbers(what, self.draw(clients, round, seed), "client drawn")
        fits(what, found, len(clients), "clients of the cohort")
        if len(found) and found.max() > self.most:
            raise InputError(f"{what}: a delay of {int(found.max())}, which has most={self.most}")
        return found.long().numpy()


def stale(probability: float, rounds: int = 1) -> Delay:
    """A message is `rounds` rounds late with that probability, else in time.

    With the default it is the staleness of FLUTE (Dimitriadis et al. 2022, arXiv:2203.13789).
    """
    if not (0 <= probability <= 1 and is_integer(rounds) and rounds >= 1):
        raise InputError(
            f"stale({probability!r}, rounds={rounds!r}): a probability is in [0, 1], rounds an "
            "integer of at least 1"
        )
    drawn = drawn_delay([1 - probability, *[0.0] * (rounds - 1), probability])
    return Delay(f"stale({float(probability)}, {rounds})", rounds, drawn.draw)


def drawn_delay(probabilities: Sequence[float]) -> Delay:
    """0, 1, 2, ... rounds with these probabilities, anew for each client in each round."""
    shares = np.asarray(probabilities, dtype=np.float64)
    if (
        shares.ndim != 1
        or not len(shares)
        or (shares < 0).any()
        or not abs(shares.sum() - 1) <= 1e-9
    ):
        raise InputError(
            f"drawn_delay({probabilities!r}): expected a probability for each number of "
            "rounds from 0 on, 1 in all"
        )
    steps = torch.from_numpy(np.floor(shares.cumsum()[:-1] * 2.0**32)).long()

    def draw(clients: Tensor, round: int, seed: int) -> Tensor:
        again = torch.from_numpy(occurrences(clients.numpy()))
        streams = stream(Kind.COHORT, client=clients, round=round, occurrence=again, step=DELAY)
        word = words(seed, streams, 1)[:, 0]
        return (word[:, None] >= steps).sum(1)

    said = ", ".join(f"{float(share)}" for share in shares)
    return Delay(f"drawn_delay([{said}])", len(shares) - 1, draw)


def delay_trace(rounds: Any) -> Delay:
    """Delays by client, [N], or by round and client, [T, N]; round t has row t mod T."""
    table = torch.as_tensor(rounds)
    table = table[None] if table.dim() == 1 else table
    if table.dim() != 2 or not table.numel():
        raise InputError(f"delay_trace: expected [N] or [T, N], got {list(table.shape)}")
    checked = whole_numbers("delay_trace", table.flatten(), "client").view(table.shape).long()

    def draw(clients: Tensor, round: int, seed: int) -> Tensor:
        return checked[round % len(checked)][clients]

    return Delay(f"delay_trace({said(checked)})", int(checked.max()), draw, checked.shape[1])
