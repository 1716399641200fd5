"""The tape: which client sits in which slot at which step of a round, and on which examples.

All of it is known when the round starts, so the tape is data. Slots are assigned for the whole
round; shuffles and batch indices are made per window of steps, so that memory does not grow with
the cohort. Axes: C clients of the cohort, S slots, B batch, L steps of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vecfl.random import Kind, ragged_permutation, stream
from vecfl.schedule import Batches, Plan, assign

WINDOW = 1 << 19  # batch entries whose indices are held at a time (4 MiB of int64)


@dataclass(frozen=True)
class Block:
    """L steps between two events; who sits where is constant.

    starts, finishes  (slots [k], positions in the cohort [k]) before and after the steps
    active            how many slots have a client: the first ones
    index             examples [L, S, B]; padding repeats an example of the same client and batch,
                      and a slot without a client what another one has
    valid             [L, S] how many of the B count
    apply             [L, S] where an accumulated gradient is applied; None: at every step
    streams           [L, S, 3] Philox counter words of the step's draws; None: nothing is drawn
    full              whether every active entry of `valid` is B
    """

    starts: tuple[np.ndarray, np.ndarray]
    finishes: tuple[np.ndarray, np.ndarray]
    active: int
    index: Tensor
    valid: Tensor
    apply: Tensor | None
    streams: Tensor | None
    full: bool


@dataclass(frozen=True)
class Columns:
    """The columns of `Block` for a window of steps; whole [L]: every busy slot has a full batch."""

    index: np.ndarray
    valid: np.ndarray
    whole: np.ndarray
    apply: np.ndarray | None
    streams: Tensor | None


class Tape:
    """A round laid out on `slots` slots; `blocks()` plays it."""

    def __init__(
        self, plan: Plan, batches: Batches, slots: int, *, seed: int, round: int, draws: bool
    ) -> None:
        self.plan, self.batches, self.slots = plan, batches, slots
        self.seed, self.round, self.draws = seed, round, draws
        slot, self.begin = assign(plan.steps, slots)
        self.end = self.begin + plan.steps
        self.slot = latest_first(slot, self.end, slots)
        # (Client, epoch) pairs whose order is kept, where it starts, and the examples of all.
        self.pairs = self.starts = self.examples = np.empty(0, np.int64)

    @property
    def idle(self) -> np.ndarray:
        """Positions in the cohort of the clients that take no step."""
        return np.flatnonzero(self.slot < 0)

    def blocks(self) -> Iterator[Block]:
        """The blocks of the round in order; starts of a block come after finishes of the last."""
        busy = np.flatnonzero(self.slot >= 0)
        length = int(self.end.max(initial=0))
        span = max(1, WINDOW // (self.slots * self.batches.size))
        cuts = np.arange(0, length + span, span).clip(max=length)
        events = np.unique(np.concatenate((self.begin[busy], self.end[busy], cuts)))
        by_begin, by_end = (
            busy[np.argsort(t[busy], kind="stable")] for t in (self.begin, self.end)
        )
        begun = np.searchsorted(self.begin[by_begin], events, side="right").tolist()
        ended = np.searchsorted(self.end[by_end], events, side="right").tolist()
        sitting = np.full(self.slots, -1)
        window = -1
        for i, (t0, t1) in enumerate(pairwise(events.tolist())):
            starts = by_begin[begun[i - 1] if i else 0 : begun[i]]
            finishes = by_end[ended[i] : ended[i + 1]]
            sitting[self.slot[starts]] = starts
            if t0 // span != window:
                window = t0 // span
                rows = self._window(window * span, min((window + 1) * span, length))
            part = slice(t0 - window * span, t1 - window * span)
            yield self._block(starts, finishes, int((sitting >= 0).sum()), rows, part)
            sitting[self.slot[finishes]] = -1

    def _block(
        self,
        starts: np.ndarray,
        finishes: np.ndarray,
        active: int,
        rows: Columns,
        part: slice,
    ) -> Block:
        valid, streams = rows.valid[part], rows.streams
        return Block(
            (self.slot[starts], starts),
            (self.slot[finishes], finishes),
            active,
            torch.from_numpy(rows.index[part]),
            torch.from_numpy(valid),
            None if rows.apply is None else torch.from_numpy(rows.apply[part]),
            None if streams is None else streams[part],
            bool(rows.whole[part].all()),
        )

    def _window(self, t0: int, t1: int) -> Columns:
        """The columns for steps t0..t1-1."""
        size, plan = self.batches.size, self.plan
        sitting = np.full((t1 - t0, self.slots), -1)
        here = np.flatnonzero((self.slot >= 0) & (self.begin < t1) & (self.end > t0))
        first, end = self.begin[here].clip(min=t0), self.end[here].clip(max=t1)
        step = spans(first - t0, end - first)
        sitting[step, np.repeat(self.slot[here], end - first)] = np.repeat(here, end - first)
        empty = sitting < 0
        c = np.where(empty, sitting.max(1, keepdims=True), sitting)  # idle slots copy a busy one
        step = np.where(empty, 0, np.arange(t0, t1)[:, None] - self.begin[c])
        epoch, batch = np.divmod(step, plan.per_epoch[c])
        start, example = self._orders(c, epoch)
        position = batch[..., None] * size + np.arange(size)
        left = plan.n[c] - batch * size
        if self.batches.last == "wrap":
            valid = np.full_like(left, size)
            position %= plan.n[c][..., None]
        else:
            valid = left.clip(max=size)
            position = np.where(
                np.arange(size) < valid[..., None], position, batch[..., None] * size
            )
        apply = (batch == plan.per_epoch[c] - 1) & ~empty if self.batches.full else None
        return Columns(
            example[start[..., None] + position],
            np.where(empty, 0, valid),
            ((valid == size) | empty).all(1),
            apply,
            self._streams(Kind.DROPOUT, c, step) if self.draws else None,
        )

    def _orders(self, c: np.ndarray, epoch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(start [L, S], example [sum of sizes]): where each (client, epoch) pair's order begins.

        Orders of the window's last step are kept: an epoch may go on in the next window.
        """
        span, kept = int(self.plan.steps.max()) + 1, self.plan.kept  # more than there are epochs
        pairs, where = np.unique(c * span + epoch, return_inverse=True)
        known = np.isin(pairs, self.pairs)
        fresh, start = pairs[~known], np.empty_like(pairs)
        sizes = kept[fresh // span]
        start[known] = self.starts[np.searchsorted(self.pairs, pairs[known])]
        start[~known] = len(self.examples) + np.cumsum(sizes) - sizes
        example = np.concatenate((self.examples, self._shuffle(*np.divmod(fresh, span))))
        last = np.unique(where.reshape(c.shape)[-1])
        sizes = kept[pairs[last] // span]
        self.pairs, self.starts = pairs[last], np.cumsum(sizes) - sizes
        self.examples = example[spans(start[last], sizes)]
        return start[where].reshape(c.shape), example

    def _shuffle(self, c: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        """The examples of each (position in the cohort, epoch) pair [I], in their order."""
        plan, sizes = self.plan, self.plan.kept[c]
        order = self._permute(Kind.SHUFFLE, c, epoch, sizes)
        capped = sizes < plan.total[c]
        if capped.any():
            who, where = np.unique(c[capped], return_inverse=True)
            total, some = plan.total[who], np.repeat(capped, sizes)
            drawn, begin = self._permute(Kind.SUBSET, who, 0 * who, total), np.cumsum(total) - total
            order[some] = drawn[np.repeat(begin[where], sizes[capped]) + order[some]]
        return np.repeat(plan.first[c], sizes) + order

    def _permute(
        self, kind: Kind, c: np.ndarray, step: np.ndarray, sizes: np.ndarray
    ) -> np.ndarray:
        streams = self._streams(kind, c, step)
        return ragged_permutation(self.seed, streams, torch.from_numpy(sizes)).numpy()

    def _streams(self, kind: Kind, c: np.ndarray, step: np.ndarray) -> Tensor:
        """Philox counter words [..., 3] for positions c in the cohort."""
        return stream(
            kind,
            client=torch.from_numpy(self.plan.client[c]),
            round=self.round,
            occurrence=torch.from_numpy(self.plan.occurrence[c]),
            step=torch.from_numpy(step),
        )


def latest_first(slot: np.ndarray, end: np.ndarray, slots: int) -> np.ndarray:
    """`slot` [C] by other names: the slot whose last client ends latest is 0, and so on.

    A slot that has begun has no gap until then, so those with a client are always the first ones.
    """
    last, busy = np.zeros(slots, np.int64), slot >= 0
    np.maximum.at(last, slot[busy], end[busy])
    name = np.empty_like(last)
    name[np.argsort(-last, kind="stable")] = np.arange(slots)
    return np.where(busy, name[slot], -1)


def spans(start: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """start[i], start[i] + 1, ..., sizes[i] numbers for each i, one after the other."""
    return np.arange(sizes.sum()) + np.repeat(start - np.cumsum(sizes) + sizes, sizes)
