"""Slots: the matrix W [S, P] of the clients that train now, and what each of them carries."""

import copy

import torch
from torch import Tensor

from vecfl.engine.rule import LocalRule, Statistics
from vecfl.errors import InputError
from vecfl.layout import Layout
from vecfl.optim import Rows

LINE = 16  # numbers


class Slots:
    """S rows over flat buffers, with views made once.

    flat   [S, P] parameters, then changing buffers; `model` and `buffers` are views of it
    state  optimizer state, each [S, trainable]
    bias   [S, trainable] correction rows, or None
    total  [S, trainable] accumulated gradient sums, and `count` [S] their weights, or None
    sums   [S, 2] float64: loss and loss weight over the client's batches
    seen   [S] examples visited
    statistics  of each row's steps, where the rule collects them
    """

    def __init__(
        self, layout: Layout, rule: LocalRule, slots: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        def rows(columns: int) -> Tensor:  # begin on cache lines: products run up to a fifth faster
            apart = -(-columns // LINE) * LINE
            return torch.zeros(slots, apart, device=device, dtype=dtype)[:, :columns]

        trainable, accumulates = layout.trainable, rule.batches.full
        self.layout, self.number = layout, slots
        self.flat = rows(layout.size)
        self.state = [rows(trainable) for _ in range(rule.optimizer.states)]
        self.bias = rows(trainable) if rule.bias else None
        self.total = rows(trainable) if accumulates else None
        self.count = rows(1)[:, 0] if accumulates else None
        self.steps = torch.zeros(slots, device=device) if rule.optimizer.counts else None
        self.sums = torch.zeros(slots, 2, device=device, dtype=torch.float64)
        self.seen = torch.zeros(slots, device=device, dtype=torch.int64)
        self.statistics = Statistics.zeros(slots, device) if rule.statistics else None
        self.all = self._rows(slice(None))
        self.one = [self._rows(slice(s, s + 1)) for s in range(slots)]
        self.model = [layout.param_views(row) for row in self.flat]
        self.buffers = layout.buffer_views(self.flat)
        kept = (*self.state, self.total, self.count, self.steps, self.sums, self.seen)
        self.cleared = [t for t in kept if t is not None]
        if self.statistics is not None:
            self.cleared += [self.statistics.gradients, self.statistics.batch_loss]

    def _rows(self, which: slice) -> Rows:
        def part(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[which]

        def views(t: Tensor | None) -> list[Tensor] | None:
            return None if t is None else self.layout.param_views(t[which])

        return Rows(
            w=self.layout.param_views(self.flat[which]),
            state=[self.layout.param_views(t[which]) for t in self.state],
            bias=views(self.bias),
            total=views(self.total),
            count=part(self.count),
            steps=part(self.steps),
            gradients=None if self.statistics is None else self.statistics.gradients[which],
        )

    def first(self, number: int) -> "Slots":
        """The first slots: views of these."""
        some = copy.copy(self)
        some.number, rows = number, slice(number)
        some.flat, some.sums, some.seen = self.flat[rows], self.sums[rows], self.seen[rows]
        some.all, some.buffers = self._rows(rows), self.layout.buffer_views(some.flat)
        some.statistics = None if self.statistics is None else self.statistics.of(rows)
        return some

    def start_(self, slots: Tensor | slice, model: Tensor, bias: Tensor | None) -> None:
        """Seat new clients in `slots` [k]: rows become `model` [P] or [k, P], all else is zero."""
        self.flat[slots] = model
        if self.bias is not None:
            if bias is None:
                raise InputError("the rule has a bias, but the algorithm's begin gives none")
            self.bias[slots] = bias
        for t in self.cleared:
            t[slots] = 0
