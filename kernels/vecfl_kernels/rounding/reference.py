"""Plain torch: words, then the level next to each number, then the level's number."""

from collections.abc import Callable

import torch
from torch import Tensor

from vecfl_kernels.philox import philox
from vecfl_kernels.rounding.levels import Levels, Multiples

CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}  # words at a time: a CPU caches them


def round_to_levels(rows: Tensor, levels: Levels, seed: int, streams: Tensor, first: int) -> Tensor:
    def of(some: slice, x: Tensor, words: Tensor) -> Tensor:
        here = levels.of_rows(some)
        return here.values(here.rounded(x, words))

    return in_parts(rows, of, seed, streams, first)


def round_to_multiples(
    rows: Tensor, multiples: Multiples, seed: int, streams: Tensor, first: int
) -> Tensor:
    def of(some: slice, x: Tensor, words: Tensor) -> Tensor:
        here = multiples.of_rows(some)
        return here.values(here.rounded(x, words) + 0.0)  # no -0

    return in_parts(rows, of, seed, streams, first)


def in_parts(
    rows: Tensor,
    of: Callable[[slice, Tensor, Tensor], Tensor],
    seed: int,
    streams: Tensor,
    first: int,
) -> Tensor:
    """What `of` makes of some rows, a part [k, m] of them and its words [k, m]."""
    (k, n), found = rows.shape, torch.empty_like(rows, memory_format=torch.contiguous_format)
    chunk = CHUNK.get(rows.device.type, 1 << 24)
    together = max(1, chunk // max(1, n))
    for some in (slice(i, i + together) for i in range(0, k, together)):
        for start in range(0, n, chunk):
            part = rows[some, start : start + chunk]
            words = words_of(seed, streams[some], first + start, part.shape[1])
            found[some, start : start + chunk] = of(some, part, words)
    return found


def words_of(seed: int, streams: Tensor, first: int, n: int) -> Tensor:
    """Words first to first + n - 1 of each of the streams [K, 3]: int64 [K, n]."""
    start, found = first // 4, []
    block = torch.arange(start, -(-(first + n) // 4), device=streams.device)
    chunk = CHUNK.get(streams.device.type, 1 << 24)
    for some in streams.split(max(1, chunk // max(1, n))):
        pieces = [philox(counters(some, b), seed).flatten(1) for b in block.split(chunk // 4)]
        found.append(torch.cat(pieces, 1)[:, first - 4 * start :][:, :n])
    return torch.cat(found)


def counters(streams: Tensor, block: Tensor) -> Tensor:
    """The counter of each block [b] of each stream [K, 3]: [K, b, 4]."""
    each = len(streams), len(block)
    parts = block.expand(each)[..., None], streams[:, None].expand(*each, 3)
    return torch.cat(parts, -1)
