"""Client ids on disk: read one at a time, and found by binary search."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from vecfl.errors import InputError, is_integer

# Python's strings may hold lone surrogates, as names that an HDF5 file spells in no known encoding.
UTF8 = ("utf-8", "surrogatepass")


class StoredIds(Sequence[Hashable]):
    """N distinct ids, all integers or all strings.

    words   the integers, int64 [N], or the bytes of all strings in UTF-8, uint8 [bytes]
    order   int64 [N]: the positions of the ids in rising order
    bounds  int64 [N + 1]: string k is words[bounds[k] : bounds[k + 1]]; None for integers
    """

    def __init__(
        self, words: NDArray[Any], order: NDArray[np.int64], bounds: NDArray[np.int64] | None = None
    ) -> None:
        self.words, self.order, self.bounds = words, order, bounds

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, k: int) -> Hashable: ...
    @overload
    def __getitem__(self, k: slice) -> list[Hashable]: ...
    def __getitem__(self, k: int | slice) -> Hashable | list[Hashable]:
        if isinstance(k, slice):
            return [self[i] for i in range(len(self))[k]]
        k = range(len(self))[k]  # negative positions, and IndexError
        if self.bounds is None:
            return int(self.words[k])
        start, end = self.bounds[k : k + 2]
        return self.words[start:end].tobytes().decode(*UTF8)

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        """The position of an id among start..stop, in log2(N) steps; ValueError if it is none."""
        # The order of strings in Python, by code point, is that of their bytes in UTF-8.
        try:
            rank = bisect_left(self.order, value, key=lambda k: self[int(k)])
        except TypeError:  # a string among integers, or the reverse
            rank = len(self)
        k = int(self.order[rank]) if rank < len(self) else -1
        if k not in range(len(self))[start:stop] or self[k] != value:
            raise ValueError(f"{value!r} is no id")
        return k

    def __contains__(self, value: object) -> bool:
        try:
            return self.index(value) >= 0
        except ValueError:
            return False

    def check(self) -> None:
        """InputError unless the ids are distinct and `order` is theirs; reads all of them."""
        n, order = len(self), self.order.tolist()
        if self.bounds is not None:
            ends = (self.bounds[0], self.bounds[-1])
            if ends != (0, len(self.words)) or (np.diff(self.bounds) < 0).any():
                raise InputError("client ids: their bounds do not rise from 0 to their last byte")
        if not all(0 <= k < n for k in order):
            raise InputError(f"client ids: their order holds positions outside 0..{n - 1}")
        ranked: list[Any] = [self[k] for k in order]
        for rank, (a, b) in enumerate(pairwise(ranked)):
            if a >= b:
                first, second = order[rank : rank + 2]
                wrong = f"are in wrong order: {b!r} after {a!r}; their order must rise"
                if a == b:
                    wrong = f"have the same id {a!r}; ids must be distinct"
                raise InputError(f"client_ids: clients {first} and {second} {wrong}")


def pack(ids: Sequence[Any]) -> range | StoredIds:
    """Ids as they stand on disk: range(N), or sorted; InputError where a store holds none such."""
    texts = [id_ for id_ in ids if isinstance(id_, str)]
    if odd := [id_ for id_ in ids if not isinstance(id_, str) and not is_integer(id_)]:
        raise InputError(f"client ids: a store holds integers or strings, got {odd[0]!r}")
    if 0 < len(texts) < len(ids):
        raise InputError(f"client ids: all integers or all strings, got {texts[0]!r} among others")
    if texts:
        words = [id_.encode(*UTF8) for id_ in texts]
        order = np.array(sorted(range(len(ids)), key=texts.__getitem__), np.int64)
        bounds = np.cumsum([0, *map(len, words)])
        packed = StoredIds(np.frombuffer(b"".join(words), np.uint8), order, bounds)
    else:
        try:
            numbers = np.array([operator.index(id_) for id_ in ids], np.int64)
        except OverflowError:
            raise InputError("client ids: a store holds integers from -2^63 to 2^63 - 1") from None
        if np.array_equal(numbers, np.arange(len(ids))):
            return range(len(ids))
        packed = StoredIds(numbers, np.argsort(numbers, kind="stable"))
    packed.check()
    return packed
