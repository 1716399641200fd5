"""How much each client does in a round, where that is not the same for all.

Axes: C clients of the cohort, N of the population.
"""

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecfl.errors import InputError, is_integer
from vecfl.random import Kind, ragged_permutation, stream, uniform

Draw = Callable[[Tensor, int, int], Tensor]  # (clients [C], round, seed) -> int64 [C]
Amount = int | Tensor | np.ndarray | Sequence[int] | Draw
WORK = 5  # step of streams of kind cohort; those before are of samplers and participation
AT_A_TIME = 1 << 19  # examples whose order is drawn at a time


def random_epochs(low: int, high: int, share: float = 1.0) -> Draw:
    """`low` to `high` epochs, each number equally likely, anew for each client in each round.

    share  probability that a client draws; the others do `high` epochs. `random_epochs(1, 20, 0.9)`
           is the systems heterogeneity of Li et al., MLSys 2020 (FedProx), section 5.2, where 90 %
           of the clients are stragglers.
    """
    if not is_integer(low) or not is_integer(high) or not 0 <= low <= high:
        raise InputError(f"random_epochs({low!r}, {high!r}): must be integers 0 <= low <= high")
    if not 0 <= share <= 1:
        raise InputError(f"random_epochs(share={share!r}): a probability is in [0, 1]")

    def epochs(clients: Tensor, round: int, seed: int) -> Tensor:
        again = torch.from_numpy(occurrences(clients.numpy()))
        streams = stream(Kind.COHORT, client=clients, round=round, occurrence=again, step=WORK)
        amount, straggles = uniform(seed, streams, 2).unbind(-1)
        drawn = low + (amount * (high - low + 1)).long()
        return drawn.where(straggles < share, high)

    epochs.__qualname__ = f"random_epochs({low}, {high}, {share})"
    return epochs


def occurrences(client: np.ndarray) -> np.ndarray:
    """For each entry of `client` [C], how many equal ones stand before it, [C]."""
    order = np.argsort(client, kind="stable")
    ordered, result = client[order], np.empty_like(client)
    result[order] = np.arange(len(client)) - np.searchsorted(ordered, ordered)
    return result


def checked(name: str, value: Any) -> int | Tensor | Draw:
    """What `Batches` takes as `name`: an integer, a function, or numbers by client as a tensor."""
    if isinstance(value, (list, tuple, np.ndarray, Tensor)):
        return whole_numbers(f"Batches({name})", value, "client").long()
    if callable(value):
        return value
    if not is_integer(value) or value < 1:
        raise InputError(f"Batches({name}={value!r}): must be an integer of at least 1")
    return int(value)


def whole_numbers(what: str, values: Any, each: str) -> Tensor:
    """`values` on the CPU; InputError unless they are integers of at least 0, one for `each`."""
    what = f"{what}: expected an integer of at least 0 for each {each}"
    try:
        numbers = torch.as_tensor(values).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{what}, got {values!r}") from None
    if numbers.dim() != 1 or (len(numbers) and not is_whole(numbers.dtype)):
        raise InputError(f"{what}, got {numbers.dtype} {list(numbers.shape)}")
    if len(numbers) and numbers.min() < 0:
        first = int((numbers < 0).nonzero()[0])
        raise InputError(f"{what}, got {int(numbers[first])} for {each} {first}")
    return numbers


def is_whole(dtype: torch.dtype) -> bool:
    """Whether numbers of a type are integers."""
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def fits(what: str, values: Tensor, count: int, of: str) -> None:
    """InputError unless there are `count` values."""
    if len(values) != count:
        raise InputError(f"{what}: {len(values)} of them for {count} {of}")


def amounts(name: str, amount: Amount, client: np.ndarray, round: int, seed: int) -> np.ndarray:
    """How much each client of a cohort does, int64 [C]; `amount` is checked."""
    if isinstance(amount, int):
        return np.full(len(client), amount)
    if not callable(amount):
        return np.asarray(amount)[client]
    what = f"Batches({name}) of round {round + 1}"
    found = whole_numbers(what, amount(torch.from_numpy(client), round, seed), "client drawn")
    fits(what, found, len(client), "clients of the cohort")
    return found.long().numpy()


def token_prefix(
    tokens: Tensor, most: int, first: np.ndarray, total: np.ndarray, streams: Tensor, seed: int
) -> np.ndarray:
    """How many examples of each client, in the order of its subset, come to `most` tokens, [C].

    One at least; all, and no draw, where all come to no more. tokens [n_examples]; streams [C, 3].
    """
    kept, cuts = total.copy(), np.flatnonzero(np.diff(np.cumsum(total) // AT_A_TIME)) + 1
    for part in np.split(np.arange(len(total)), cuts):
        inside = ragged(total[part])
        owner = np.repeat(part, total[part])
        count = tokens.numpy()[first[owner] + inside]
        over = part[np.bincount(owner - part[:1], count, len(part)) > most]
        if not len(over):
            continue
        order = ragged_permutation(seed, streams[over], torch.from_numpy(total[over])).numpy()
        owner = np.repeat(np.arange(len(over)), total[over])
        running = tokens.numpy()[first[over][owner] + order].astype(np.int64).cumsum()
        begin = np.cumsum(total[over]) - total[over]
        before = np.concatenate(([0], running))[begin]
        within = np.bincount(owner, running - before[owner] <= most, len(over))
        kept[over] = within.astype(np.int64).clip(min=1)
    return kept


def ragged(sizes: np.ndarray) -> np.ndarray:
    """0..sizes[i]-1 for each i, one after the other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def said(value: object) -> str:
    """A value as text that is the same in every process: arrays by a hash, functions by a name."""
    if isinstance(value, Tensor):
        return f"{len(value)} numbers {sha256(value.numpy().tobytes()).hexdigest()[:16]}"
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    return repr(value)
