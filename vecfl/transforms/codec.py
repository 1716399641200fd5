"""What a codec is, and the bytes of a message: K rows of M numbers, encoded part by part.

A part is a tensor of the model or the whole message. Of each part a client sends, as bits without
gaps: its scales; where not all of its numbers have a symbol, how many and which; the symbols. The
bits of a message are filled up to bytes at its end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vecfl.layout import Layout
from vecfl.random import Kind, stream
from vecfl.transforms.bits import Bits, Reader, float_bits, to_bits
from vecfl_kernels import words_of

COUNT = 32  # bits of how many symbols a part has


@dataclass(frozen=True)
class Code:
    """A part of K messages as symbols.

    symbols  [K, n] integers from 0, in any dtype
    scales   each [K, 1] in the dtype of the message
    kept     [K, n] bool, which of the numbers have a symbol; None: all
    """

    symbols: Tensor
    scales: tuple[Tensor, ...] = ()
    kept: Tensor | None = None


@dataclass(frozen=True)
class Codec:
    """How a part of n numbers becomes symbols and numbers again.

    quantise  (x [K, n], finite, words [K, n] or None) -> Code
    restore   (Code, dtype) -> [K, n]
    per       the parts: every "tensor", or each whole "message" of a row of P
    scales    how many stand before the symbols
    width     bits of a symbol; None: those of a number
    kept      (n, words [k, n] or None) -> which numbers have a symbol: None for all, their number,
              -1 where the message says how many, or a mask [k, n] that both sides draw
    draws     whether it takes words
    fused     (x, seed, streams [K, 3], first word) -> what `restore` makes of all that `quantise`
              gives, at once; None: no operation does that
    """

    quantise: Callable[[Tensor, Tensor | None], Code]
    restore: Callable[[Code, torch.dtype], Tensor]
    per: Literal["tensor", "message"]
    scales: int
    width: int | None
    kept: Callable[[int, Tensor | None], None | int | Tensor] = lambda n, words: None
    draws: bool = False
    fused: Callable[[Tensor, int, Tensor, int], Tensor] | None = None


@dataclass(frozen=True)
class Senders:
    """Who sends K messages and when: the key of their draws.

    client, occurrence  [K] int64; layout  of a row of P, of which a message has one or more
    """

    seed: int
    round: int
    client: Tensor
    occurrence: Tensor
    layout: Layout

    @property
    def streams(self) -> Tensor:
        """Of each message, [K, 3]: kind 6."""
        at = {"client": self.client, "occurrence": self.occurrence}
        return stream(Kind.CODEC, round=self.round, **at)

    def words(self, n: int) -> Tensor:
        """Words 0..n-1 of each message, int64 [K, n] in [0, 2^32)."""
        return words_of(self.seed, self.streams, 0, n)


def encode(codec: Codec, rows: Tensor, senders: Senders) -> tuple[Tensor, Tensor]:
    """What the server has of finite rows [K, M], and their bytes [K], int64."""
    words = senders.words(rows.shape[1]) if codec.draws and codec.fused is None else None
    streams = senders.streams
    bits = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    restored = []
    for span in spans(codec, senders.layout, rows.shape[1]):
        part, drawn = rows[:, span], words[:, span] if words is not None else None
        if codec.fused is not None:
            restored.append(codec.fused(part, senders.seed, streams, span.start))
            code = Code(part)
        else:
            code = codec.quantise(part, drawn)
            restored.append(codec.restore(code, rows.dtype))
        bits += size(codec, code, codec.kept(part.shape[1], drawn), rows.dtype)
    return restored[0] if len(restored) == 1 else torch.cat(restored, 1), (bits + 7) // 8


def pack(codec: Codec, row: Tensor, sender: Senders) -> bytes:
    """The bytes of one finite row [M]."""
    rows = row[None]
    words = sender.words(len(row)) if codec.draws else None
    parts: list[Bits] = []
    for span in spans(codec, sender.layout, len(row)):
        drawn = words[:, span] if words is not None else None
        code = codec.quantise(rows[:, span], drawn)
        parts += [float_bits(scale[0]) for scale in code.scales]
        symbols = code.symbols[0]
        if code.kept is not None:
            kept = code.kept[0]
            if isinstance(known := codec.kept(len(kept), drawn), int):
                parts += places(kept, known)
            symbols = symbols[kept]
        parts.append(to_bits(symbols, width(codec, row.dtype)))
    return np.packbits(np.concatenate(parts)).tobytes()


def unpack(codec: Codec, data: bytes, length: int, dtype: torch.dtype, sender: Senders) -> Tensor:
    """The row [M = length] that the server makes of the bytes; it knows who sends them when."""
    words = sender.words(length) if codec.draws else None
    reader, restored = Reader(data), []
    for span in spans(codec, sender.layout, length):
        n, drawn = span.stop - span.start, words[:, span] if words is not None else None
        scales = tuple(reader.floats(1, dtype)[None] for _ in range(codec.scales))
        known = codec.kept(n, drawn)
        kept = read_places(reader, n, known) if isinstance(known, int) else known
        symbols = torch.zeros(1, n, dtype=torch.int64)
        some = torch.ones(1, n, dtype=torch.bool) if kept is None else kept
        symbols[some] = reader.integers(int(some.sum()), width(codec, dtype))
        restored.append(codec.restore(Code(symbols, scales, kept), dtype))
    return torch.cat(restored, 1)[0]


def spans(codec: Codec, layout: Layout, length: int) -> list[slice]:
    """The parts of a message of `length` numbers."""
    return layout.spans(length) if codec.per == "tensor" else layout.rows(length)


def width(codec: Codec, dtype: torch.dtype) -> int:
    """The bits of a symbol."""
    return 8 * dtype.itemsize if codec.width is None else codec.width


def size(codec: Codec, code: Code, known: None | int | Tensor, dtype: torch.dtype) -> Tensor | int:
    """The bits of a part of K messages: one number for all, or [K] int64."""
    n, symbol = code.symbols.shape[1], width(codec, dtype)
    front = codec.scales * 8 * dtype.itemsize
    if code.kept is None:
        return front + n * symbol
    if isinstance(known, int) and known >= 0:
        return front + min(n * (known < n), known * index_width(n)) + known * symbol
    number = code.kept.sum(1)
    if isinstance(known, Tensor):
        return front + number * symbol
    told = (number * index_width(n)).clamp(max=n).where(number < n, 0)
    return front + COUNT + told + number * symbol


def index_width(n: int) -> int:
    """The bits of a position among n."""
    return (n - 1).bit_length()


def places(kept: Tensor, known: int) -> list[Bits]:
    """Which of the numbers [n] are kept: their positions, or a bit for each, as is shorter."""
    number, n = int(kept.sum()), len(kept)
    told = [to_bits(torch.tensor([number]), COUNT)] if known < 0 else []
    if number < n:
        short = number * index_width(n) < n
        told.append(to_bits(*((kept.nonzero()[:, 0], index_width(n)) if short else (kept, 1))))
    return told


def read_places(reader: Reader, n: int, known: int) -> Tensor:
    """What `places` wrote: bool [1, n]."""
    number = int(reader.integers(1, COUNT)) if known < 0 else known
    if number == n:
        return torch.ones(1, n, dtype=torch.bool)
    if number * index_width(n) >= n:
        return reader.integers(n, 1)[None] > 0
    kept = torch.zeros(1, n, dtype=torch.bool)
    kept[0, reader.integers(number, index_width(n))] = True
    return kept
