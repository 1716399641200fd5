"""Damage to files: whatever a reader is given, it answers with a dataset or one line."""

import random
from collections.abc import Callable
from pathlib import Path

from vecfl.data import FederatedDataset
from vecfl.errors import InputError


def answers(read: Callable[[], object]) -> str | None:
    """The line of the InputError that `read` raises, or None for data; anything else fails."""
    try:
        data = read()
    except InputError as error:
        assert "\n" not in str(error)
        return str(error)
    assert isinstance(data, FederatedDataset) and data.num_examples > 0
    return None


def mutate(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out, or put in twice; or the end cut off."""
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(damaged) or 1)
        match rng.randrange(5):
            case 0:
                damaged[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                damaged[at : at + 1] = bytes(
                    [(damaged[at] if damaged else 0) ^ 1 << rng.randrange(8)]
                )
            case 2:
                del damaged[at : at + rng.randrange(1, 20)]
            case 3:
                damaged[at:at] = damaged[at : at + rng.randrange(1, 20)]
            case 4:
                del damaged[at:]
    return bytes(damaged)


def fuzz(read: Callable[[Path], object], good: bytes, path: Path, runs: int, seed: int = 0) -> int:
    """How many of `runs` damaged copies of a good file were refused, each with its path named."""
    rng, refused = random.Random(seed), 0
    for _ in range(runs):
        path.write_bytes(mutate(good, rng))
        said = answers(lambda: read(path))
        assert said is None or str(path) in said
        refused += said is not None
    return refused
