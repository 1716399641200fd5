"""Held-out data: clients that never train, and examples that clients keep from training."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vecfl.data.dataset import FederatedDataset
from vecfl.data.partition import HELD_CLIENTS, HELD_SAMPLES, generator, integer, shuffle_groups
from vecfl.errors import InputError


@dataclass(frozen=True)
class Split:
    """What trains, and what was held out; None where nothing was asked to be.

    train          the examples that train
    test_samples   other examples of the clients in `train`, which has the same clients
    test_clients   all examples of other clients
    """

    train: FederatedDataset
    test_samples: FederatedDataset | None
    test_clients: FederatedDataset | None


def hold_out(
    data: FederatedDataset,
    seed: int,
    *,
    clients: float | None = None,
    samples: float | None = None,
) -> Split:
    """A random split of the data: held-out clients, held-out examples of the others, or both.

    clients: how many clients to hold out, an integer, or a fraction of them in (0, 1).
    samples: the fraction in (0, 1) of each training client's examples to hold out, rounded up or
    down at random without bias; at least one example stays for training.

    Ids and the order of clients and examples are kept. Equal seeds hold out the same; which
    examples of a client are held out does not depend on `clients`. Raises InputError for numbers
    out of range, and where a part would have no example. Source: Yuan et al. 2022,
    arXiv:2110.14216 (unseen clients and unseen examples measure different things).
    """
    if clients is None and samples is None:
        raise InputError("nothing to hold out: give clients, samples, or both")
    unseen = np.zeros(data.num_clients, dtype=bool)
    if clients is not None:
        held = _number(clients, data.num_clients)
        unseen[generator(seed, HELD_CLIENTS).permutation(data.num_clients)[:held]] = True
    owner = np.repeat(np.arange(data.num_clients), data.sizes.numpy())
    kept = ~_held_samples(data, owner, samples, seed)
    return Split(
        _part(data, ~unseen, kept & ~unseen[owner], "training"),
        None if samples is None else _part(data, ~unseen, ~kept & ~unseen[owner], "held-out"),
        None if clients is None else _part(data, unseen, unseen[owner], "held-out clients'"),
    )


def _number(clients: float, of: int) -> int:
    """The number of clients to hold out."""
    if of < 2:
        raise InputError(
            "clients: there is one client, which must train: get more clients, or hold out "
            "examples of it (samples=)"
        )
    fraction = isinstance(clients, float) and 0 < clients < 1
    held = round(clients * of) if fraction else integer(clients, "clients", 1)
    if not 0 < held < of:
        raise InputError(
            f"clients: expected a number or a fraction that holds out 1 to {of - 1} of the {of} "
            f"clients, got {clients}"
        )
    return held


def _held_samples(
    data: FederatedDataset, owner: NDArray[np.int64], fraction: float | None, seed: int
) -> NDArray[np.bool_]:
    """Which examples, [n], are held out as samples."""
    mask = np.zeros(data.num_examples, dtype=bool)
    if fraction is None:
        return mask
    if not 0 < fraction < 1:
        raise InputError(f"samples: expected a fraction in (0, 1), got {fraction}")
    rng, sizes = generator(seed, HELD_SAMPLES), data.sizes.numpy()
    held = np.floor(fraction * sizes + rng.random(len(sizes)))
    order, rank = shuffle_groups(owner, len(sizes), rng)
    mask[order] = rank < np.minimum(held, sizes - 1)[owner[order]]
    return mask


def _part(
    data: FederatedDataset, clients: NDArray[np.bool_], examples: NDArray[np.bool_], name: str
) -> FederatedDataset:
    """Some clients [N] with some of their examples [n]."""
    if not examples.any():
        raise InputError(f"the split leaves no example as {name} data: hold out more or less")
    rows = torch.from_numpy(np.flatnonzero(examples))
    columns = {name: column[rows.to(column.device)] for name, column in data.columns.items()}
    passed = np.concatenate([[0], np.cumsum(examples)])[data.offsets.numpy()]
    offsets = np.concatenate([[0], np.cumsum(np.diff(passed)[clients])])
    ids: Sequence[Hashable] = data.client_ids
    if not clients.all():
        ids = [ids[k] for k in np.flatnonzero(clients).tolist()]
    return FederatedDataset(columns, torch.from_numpy(offsets), ids)
