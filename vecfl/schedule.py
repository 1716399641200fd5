"""The schedule of a round: how many batches each client works through, and in which slot.

Axes: C clients of the cohort, S slots, B batch.
"""

import heapq
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vecfl.errors import InputError, is_integer
from vecfl.random import Kind, stream
from vecfl.work import (
    Amount,
    amounts,
    checked,
    fits,
    occurrences,
    said,
    token_prefix,
    whole_numbers,
)


@dataclass(frozen=True)
class Batches:
    """The work of a client in a round, as batches of its examples.

    size          examples in a batch (B)
    epochs        passes over the client's examples (1 if neither epochs nor steps is given); also
                  numbers by client [N], or a function (clients [C], round, seed) -> int64 [C], such
                  as `random_epochs`. With 0 a client takes no step.
    steps         instead of epochs, and likewise: optimizer steps, running through as many epochs
                  as they need
    last          a short last batch of an epoch is kept, dropped, or wrapped around (filled up
                  with the first examples of the same epoch)
    full          one optimizer step per epoch on all examples, accumulated over batches of `size`
    max_examples  a client with more examples takes part with this many, drawn anew each round
    max_tokens    a client takes part with as many examples, in the order of that draw, as come to
                  at most this many tokens, and with one at least
    tokens        of every example of the dataset, [n_examples]; for max_tokens (`count_tokens`)
    """

    size: int
    epochs: Amount | None = None
    steps: Amount | None = None
    last: Literal["keep", "drop", "wrap"] = "keep"
    full: bool = False
    max_examples: int | None = None
    max_tokens: int | None = None
    tokens: Tensor | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise InputError("Batches takes epochs or steps, not both")
        if (self.max_tokens is None) != (self.tokens is None):
            raise InputError("Batches takes max_tokens and tokens, one with the other")
        for name in ("size", "max_examples", "max_tokens"):
            value = getattr(self, name)
            if value is not None and not (is_integer(value) and value >= 1):
                raise InputError(f"Batches({name}={value!r}): must be an integer of at least 1")
        for name in ("epochs", "steps"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, checked(name, value))
        if self.tokens is not None:
            tokens = whole_numbers("Batches(tokens)", self.tokens, "example")
            object.__setattr__(self, "tokens", tokens)
        if self.last not in ("keep", "drop", "wrap"):
            raise InputError(f"Batches(last={self.last!r}): must be keep, drop or wrap")
        if self.full and self.last != "keep":
            raise InputError(f"Batches(last={self.last!r}): a full batch keeps every example")

    def __repr__(self) -> str:
        values = (f"{f.name}={said(getattr(self, f.name))}" for f in fields(self))
        return f"Batches({', '.join(values)})"

    def check(self, offsets: Tensor) -> None:
        """InputError unless numbers by client or example are as many as `offsets` [N + 1] say."""
        for name in ("epochs", "steps"):
            if isinstance(numbers := getattr(self, name), Tensor):
                fits(f"Batches({name})", numbers, len(offsets) - 1, "clients")
        if self.tokens is not None:
            fits("Batches(tokens)", self.tokens, int(offsets[-1]), "examples")


@dataclass(frozen=True)
class Plan:
    """What every client of a cohort does in a round; arrays [C] of int64.

    client     its position in the dataset
    place      in the cohort; occurrence how often the client stands before it
    first      index of its first example; `total` is how many it has
    kept       examples after the caps; `n` is how many of them an epoch visits, 0 without a step
    per_epoch  batches of an epoch; `steps` is batches in all
    delay      rounds until its message arrives
    run        reserved for sweeps: always 0 today
    """

    client: np.ndarray
    place: np.ndarray
    occurrence: np.ndarray
    first: np.ndarray
    total: np.ndarray
    kept: np.ndarray
    n: np.ndarray
    per_epoch: np.ndarray
    steps: np.ndarray
    delay: np.ndarray
    run: np.ndarray

    def of(self, members: np.ndarray) -> "Plan":
        """The plan of some clients, given as positions [k] in the cohort."""
        return Plan(*(getattr(self, f.name)[members] for f in fields(self)))

    def updates(self, batches: Batches) -> np.ndarray:
        """The optimizer steps of each client, [C]."""
        return self.steps // self.per_epoch.clip(min=1) if batches.full else self.steps

    def once(self, size: int) -> "Plan":
        """One epoch, in batches of `size`, over all that the clients with a step take part with."""
        per_epoch = -(-self.kept // size)
        steps = np.where(self.steps > 0, per_epoch, 0)
        n = np.where(self.steps > 0, self.kept, 0)
        return replace(self, n=n, per_epoch=per_epoch, steps=steps)


def make_plan(batches: Batches, offsets: Tensor, cohort: Tensor, *, seed: int, round: int) -> Plan:
    """The plan of `cohort` [C] (positions in the dataset) for clients with `offsets` [N + 1].

    seed, round  key what is drawn for it: work that differs by client, examples under max_tokens
    """
    batches.check(offsets)
    client, bounds, size = cohort.numpy(), offsets.numpy(), batches.size
    first, occurrence = bounds[client], occurrences(client)
    total = bounds[client + 1] - first
    kept = total if batches.max_examples is None else np.minimum(total, batches.max_examples)
    if batches.tokens is not None and batches.max_tokens is not None:
        streams = stream(
            Kind.SUBSET, client=cohort, round=round, occurrence=torch.from_numpy(occurrence)
        )
        most = batches.max_tokens
        kept = np.minimum(kept, token_prefix(batches.tokens, most, first, total, streams, seed))
    per_epoch = kept // size if batches.last == "drop" else -(-kept // size)
    n = per_epoch * size if batches.last == "drop" else kept
    if batches.steps is None:
        amount = 1 if batches.epochs is None else batches.epochs
        steps = per_epoch * amounts("epochs", amount, client, round, seed)
    else:
        amount = amounts("steps", batches.steps, client, round, seed)
        steps = amount * (per_epoch if batches.full else np.minimum(per_epoch, 1))
    n, zeros, place = np.where(steps > 0, n, 0), np.zeros_like(client), np.arange(len(client))
    return Plan(client, place, occurrence, first, total, kept, n, per_epoch, steps, zeros, zeros)


def packed(
    client: np.ndarray, first: np.ndarray, total: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The examples [n] of clients [C], each client's once, and where among them each begins [C]."""
    _, some, where = np.unique(client, return_index=True, return_inverse=True)
    first, total = first[some], total[some]
    begin = np.cumsum(total) - total
    return np.repeat(first - begin, total) + np.arange(total.sum()), begin[where]


def assign(steps: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Longest-first refill: (slot [C], first step [C]); clients without steps get slot -1.

    List scheduling by longest processing time (Graham, SIAM J. Appl. Math. 1969): the slot that is
    free first takes the longest client that waits.
    """
    slot, begin = np.full(len(steps), -1), np.zeros(len(steps), np.int64)
    free = [(0, s) for s in range(slots)]
    for c in np.argsort(-steps, kind="stable"):
        if steps[c] == 0:
            break
        begin[c], slot[c] = heapq.heappop(free)
        heapq.heappush(free, (int(begin[c] + steps[c]), int(slot[c])))
    return slot, begin


def share(steps: np.ndarray, parts: int, together: int = 1) -> list[np.ndarray]:
    """Which entries of `steps` [C] each of `parts` takes, longest first.

    The sum of steps counts, or the longest slot where `together` slots of a part step at a time;
    entries without steps go to the last part.
    """
    if parts == 1:
        return [np.arange(len(steps))]
    lane, _ = assign(steps, parts * together)
    return [np.flatnonzero(lane % parts == i) for i in range(parts)]
