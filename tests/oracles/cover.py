"""A small set of rows that contains every pair of values of every two columns."""

from collections.abc import Mapping, Sequence
from itertools import combinations, product

Row = dict[str, str]


def pairwise(columns: Mapping[str, Sequence[str]]) -> list[Row]:
    """Greedy: each row is the one of the whole product that covers most uncovered pairs."""
    bits: dict[tuple, int] = {}
    rows = [tuple(zip(columns, values, strict=True)) for values in product(*columns.values())]
    masks = [sum(1 << bits.setdefault(p, len(bits)) for p in combinations(r, 2)) for r in rows]
    missing, chosen = (1 << len(bits)) - 1, []
    while missing:
        best = max(range(len(rows)), key=lambda i: (masks[i] & missing).bit_count())
        missing &= ~masks[best]
        chosen.append(dict(rows[best]))
    return chosen
