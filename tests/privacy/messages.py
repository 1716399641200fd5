"""Rows of clients that have finished, and what a transform makes of what they send."""

from typing import Any

import torch
from torch import Tensor

from vecfl.algorithms import Finished, Round, Upload
from vecfl.layout import Entry, Layout
from vecfl.transforms import Transform


def layout_of(size: int, dtype: torch.dtype = torch.float64) -> Layout:
    """Two parameters, and behind them a buffer, of `size` numbers together."""
    first = max(1, size // 3)
    sizes = [first, max(0, size - 2 * first), min(first, size - first)]
    starts = [0, sizes[0], sizes[0] + sizes[1]]
    a, b, c = (
        Entry(name, (n,), at, dtype) for name, n, at in zip("abc", sizes, starts, strict=True)
    )
    return Layout((a, b), (c,))


def finished(rows: Tensor, *, number: int = 0, seed: int = 0, **columns: Any) -> Finished:
    """Of clients 0, 1, ... unless `client` says others; each a first time, unless `occurrence`."""
    zeros = torch.zeros(len(rows), dtype=torch.int64)
    given = {"client": torch.arange(len(rows)), "occurrence": zeros} | columns
    double = zeros.double()
    return Finished(
        Round(number, seed, layout_of(rows.shape[1], rows.dtype), 10 * len(rows)),
        *(rows, [], None, given.pop("client"), given.pop("occurrence")),
        *(zeros, double, double, zeros),
        **given,
    )


def sent(
    transform: Transform, rows: Tensor, weight: float = 1.0, logs: Tensor | None = None, **how: Any
) -> Upload:
    """What the client side makes of rows [K, M] of the same weight."""
    done = finished(rows, **how)
    own = transform.init(done.round.layout)
    upload = Upload(rows, torch.full((len(rows),), weight).double(), log_weight=logs)
    return transform.client(own, done, upload)
