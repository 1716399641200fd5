"""The geometry of a round: how long the updates of its clients are, how they lie to the mean and to
one another.

Axes: C clients of the cohort, s of them sampled, K rows of a commit, P numbers of an update. An
update is what a client uploads, behind all transforms of its side; of several messages (SCAFFOLD)
that of the model alone, so that algorithms can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vecfl.aggregate import Aggregate, everyone
from vecfl.errors import InputError, is_integer
from vecfl.gram import cosines, diversity, effective_rank, gram
from vecfl.mesh import Mesh
from vecfl.random import Kind, stream, words
from vecfl.rows import lengths
from vecfl.schedule import Plan


@dataclass(frozen=True)
class Part:
    """What is measured where rows end.

    place, norm  [K] in the cohort, and the float64 norm; NaN where a client has no weight
    at, rows     [k] places of those that are sampled, and their updates [k, P]
    """

    place: np.ndarray
    norm: Tensor
    at: np.ndarray
    rows: Tensor


@dataclass(frozen=True)
class Updates:
    """The updates of a round; the same on all ranks but for `at` and `rows`.

    round    its number, from 0
    client   [C] positions in the dataset
    norm     [C] float64 Euclidean norms; NaN where a client has no weight
    mean     [P] float64, their weighted mean; None if no client has a weight
    sampled  [s] places in the cohort, rising; cosine [s] of the angle between update and mean,
             NaN where one of them is zero
    products [s, s] float64 of the sampled updates with one another (`vecfl.gram`), 0 with those of
             clients without weight
    at, rows [r] places and updates, each [P], of the sampled clients that this rank trained
    """

    round: int
    client: np.ndarray
    norm: np.ndarray
    mean: Tensor | None
    sampled: np.ndarray
    cosine: np.ndarray
    products: Tensor
    at: np.ndarray
    rows: list[Tensor]

    def metrics(self) -> dict[str, float | int]:
        """`update/...`: norms over the cohort, all else over its sample."""
        counted = np.flatnonzero(np.isfinite(self.norm[self.sampled]))
        products = self.products[counted][:, counted]
        first, second = np.triu_indices(len(counted), 1)
        length = np.nan if self.mean is None else float(torch.linalg.vector_norm(self.mean))
        return {
            **summary("update/norm", self.norm),
            "update/aggregate_norm": length,
            **summary("update/cosine", self.cosine),
            **summary("update/pairwise_cosine", cosines(products).numpy()[first, second]),
            "update/diversity": diversity(products),
            "update/effective_rank": effective_rank(products),
            "update/sampled": int(np.isfinite(self.cosine).sum()),
        }


def sample(plan: Plan, size: int, seed: int, round: int) -> np.ndarray:
    """Which clients of a cohort are sampled, bool [C]: `size` of those that take a step, or all.

    They have the smallest (word 0, client, occurrence) of kind 8, whoever trains them.
    """
    client, occurrence = torch.from_numpy(plan.client), torch.from_numpy(plan.occurrence)
    streams = stream(Kind.STATISTICS, client=client, round=round, occurrence=occurrence)
    word = words(seed, streams, 1)[:, 0].numpy()
    chosen = np.zeros(len(word), dtype=bool)
    order = np.lexsort((plan.occurrence, plan.client, word))
    chosen[order[plan.steps[order] > 0][:size]] = True
    return chosen


def measure(update: Tensor, weight: Tensor, place: np.ndarray, sampled: np.ndarray) -> Part:
    """What is known of the updates [K, P] with `weight` [K] at `place` [K] in the cohort."""
    norm = lengths(update)
    mine = np.flatnonzero(sampled[place])
    index = torch.from_numpy(mine).to(update.device, non_blocking=True)
    return Part(place, norm.where(weight > 0, torch.nan), place[mine], update[index])


def norms(parts: Sequence[Part], clients: int) -> Tensor:
    """The norms [C] that this rank knows, zero elsewhere."""
    result = torch.zeros(clients, dtype=torch.float64)
    if parts:
        where = torch.from_numpy(np.concatenate([part.place for part in parts]))
        result[where] = torch.cat([part.norm for part in parts]).cpu()
    return result


class Geometry:
    """Measures the updates of each round, where `size` clients of a cohort are compared.

    last  the updates of the last round; None before it, and where nothing is measured (`size` 0)
    row   P: what stands behind it in a message is not of the model
    """

    def __init__(self, mesh: Mesh, size: int, seed: int, row: int) -> None:
        if not is_integer(size) or size < 0:
            raise InputError(f"statistics: expected a number of clients, 0 for none, got {size!r}")
        self.mesh, self.size, self.seed, self.row = mesh, size, seed, row
        self.last: Updates | None = None

    def sample(self, plan: Plan, round: int) -> np.ndarray | None:
        """Which clients of a cohort are compared, bool [C]; None where nothing is measured."""
        return sample(plan, self.size, self.seed, round) if self.size else None

    def metrics(
        self,
        parts: Sequence[Part],
        norm: Tensor,
        aggregate: Aggregate,
        plan: Plan,
        sampled: np.ndarray | None,
        round: int,
    ) -> dict[str, float | int]:
        """`update/...` of a round, from this rank's parts and from what all ranks added up."""
        if sampled is None:
            return {}
        places, mean, norm = np.flatnonzero(sampled), everyone(aggregate).mean(), norm.cpu()
        at = np.concatenate([places[:0], *(part.at for part in parts)])
        rows = [row for part in parts for row in part.rows]
        where = np.searchsorted(places, at)
        among = gram(self.mesh, where, rows, len(places), self.row)
        length, dots = torch.tensor(0.0), torch.zeros(len(places), dtype=torch.float64)
        if mean is not None:
            mean = mean[: self.row]
            length = torch.linalg.vector_norm(mean).cpu()
        if mean is not None and rows:  # row by row: bits do not depend on the others
            products = torch.stack([(row * mean).sum() for row in rows])
            dots[torch.from_numpy(where)] = products.cpu()
        (dots,) = self.mesh.sum(dots)
        both = norm[torch.from_numpy(places)] * length
        cosine = torch.where(both > 0, dots / both, torch.nan).clamp(-1, 1)
        self.last = Updates(
            round, plan.client, norm.numpy(), mean, places, cosine.numpy(), among, at, rows
        )
        return self.last.metrics()

    def norms(self, rounds: int, clients: int) -> np.ndarray | None:
        """The norms by position in the dataset, [N], where `rounds` rounds are done; else None.

        NaN where a client sent nothing; of one that came more than once, its last update.
        """
        if self.last is None or self.last.round + 1 != rounds:
            return None
        result = np.full(clients, np.nan)
        result[self.last.client] = self.last.norm
        return result


def summary(name: str, values: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation (of the values themselves, /n), least, median and greatest."""
    known = values[np.isfinite(values)]
    known = known if len(known) else np.array([np.nan])
    return {
        f"{name}_mean": float(known.mean()),
        f"{name}_sd": float(known.std()),
        f"{name}_min": float(known.min()),
        f"{name}_p50": float(np.median(known)),
        f"{name}_max": float(known.max()),
    }
