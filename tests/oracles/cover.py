"""A small set of rows that contains every pair of values of every two columns."""

from collections.abc import Mapping, Sequence
from itertools import combinations, product

Row = dict[str, str]


def pairwise(columns: Mapping[str, Sequence[str]]) -> list[Row]:
    """Greedy: a row begins with a missing pair; then each column, longest first, takes the value
    with most missing pairs."""
    missing = {
        frozenset(((a, x), (b, y))): None
        for a, b in combinations(columns, 2)
        for x, y in product(columns[a], columns[b])
    }
    longest_first, rows = sorted(columns, key=lambda name: -len(columns[name])), []
    while missing:
        row = dict(next(iter(missing)))
        for name in longest_first:
            if name not in row:
                gains = [
                    sum(frozenset(((name, value), pair)) in missing for pair in row.items())
                    for value in columns[name]
                ]
                row[name] = columns[name][gains.index(max(gains))]
        for pair in combinations(row.items(), 2):
            missing.pop(frozenset(pair), None)
        rows.append({name: row[name] for name in columns})
    return rows
