"""Locally private directions and lengths: PrivUnit2 and ScalarDP.

Bhowmick et al. 2018, arXiv:1812.00984: Algorithms 1 (PrivUnit2) and 3 (ScalarDP).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vecfl.algorithms.base import Finished, Server, Upload
from vecfl.errors import InputError, positive
from vecfl.random import uniform
from vecfl.transforms.base import Transform
from vecfl.transforms.local_privacy import draws, streams

CHOICES = 3  # step of the streams of what is chosen; normals of the direction have step 2


@dataclass(frozen=True)
class Cap:
    """How PrivUnit2 draws V from the sphere in `size` dimensions: near u with probability `near`.

    gamma  the cap is where <V, u> is at least gamma
    mean   E[<V, u>]: V / mean is unbiased
    """

    size: int
    near: float
    gamma: float
    mean: float
    outside: float  # the share of the sphere that is not in the cap


def cap_of(size: int, epsilon: float, share: float = 0.01) -> Cap:
    """The cap for an epsilon, a `share` of which goes into the choice of the side.

    gamma is (e^b - 1) / (e^b + 1) sqrt(pi / (2 (d - 1))), b = (1 - share) epsilon: Theorem 4 (a).
    """
    positive("privunit2(epsilon)", epsilon)
    if size < 2:
        raise InputError(f"privunit2: a message of {size} numbers has no direction; take 2 or more")
    near = 1 / (1 + math.exp(-share * epsilon))
    gamma = math.tanh((1 - share) * epsilon / 2) * math.sqrt(math.pi / (2 * (size - 1)))
    gamma, alpha = min(gamma, 1.0), (size - 1) / 2
    outside = float(special().betainc(alpha, alpha, (1 + gamma) / 2))
    # int t (1 - t^2)^(alpha - 1) dt = (1 - gamma^2)^alpha / (2 alpha), over B(alpha, 1/2)
    log = alpha * math.log1p(-(gamma**2)) if gamma < 1 else -math.inf
    beta = math.lgamma(alpha) + math.lgamma(0.5) - math.lgamma(alpha + 0.5)
    moment = math.exp(log - math.log(2 * alpha) - beta)
    mean = near * moment / (1 - outside) - (1 - near) * moment / outside
    return Cap(size, near, gamma, mean, outside)


def privunit2(epsilon: float, longest: float, *, levels: int = 32) -> Transform:
    """The direction of each message by PrivUnit2, its norm by ScalarDP: epsilon a message.

    epsilon  9/10 of it are for the direction, 1/10 for the norm
    longest  norms are clipped to it; levels: to which norms are rounded

    The mean of what arrives is the clipped message. Metrics: none, for a norm is private. Raises
    InputError for numbers out of range.
    """
    positive("privunit2(longest)", longest)

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        rows, norm = upload.update.double(), upload.update.double().norm(dim=1)
        fallback = torch.ones_like(rows) / math.sqrt(rows.shape[1])
        direction = torch.where(norm[:, None] > 0, rows / norm[:, None], fallback)
        sent = directions(direction, cap_of(rows.shape[1], 0.9 * epsilon), done)
        length = scalars(norm.clamp(max=longest), longest, 0.1 * epsilon, levels, done)
        update = (sent * length[:, None]).to(upload.update.dtype)
        return replace(upload, update=update.where(norm.isfinite()[:, None], torch.nan))

    return Transform(f"privunit2 {epsilon} {longest} {levels}", client)


def directions(u: Tensor, cap: Cap, done: Finished) -> Tensor:
    """Unbiased private directions of unit rows u [K, d]: a point of the cap, or of the rest."""
    chosen = uniform(done.round.seed, streams(done, CHOICES), 2)
    near, alpha = chosen[:, 0] < cap.near, (cap.size - 1) / 2
    inside = cap.outside + (1 - cap.outside) * chosen[:, 1]
    level = torch.where(near, inside, cap.outside * chosen[:, 1]).numpy()
    t = torch.from_numpy(2 * special().betaincinv(alpha, alpha, level) - 1)
    g = draws(done, cap.size, "gaussian")
    across = g - (g * u).sum(1, keepdim=True) * u
    across /= across.norm(dim=1, keepdim=True)
    v = t[:, None] * u + (1 - t.square()).clamp(min=0).sqrt()[:, None] * across
    return v / cap.mean


def scalars(x: Tensor, longest: float, epsilon: float, levels: int, done: Finished) -> Tensor:
    """Unbiased private numbers of x [K] in [0, longest]: one of levels + 1, by random rounding."""
    positive("privunit2(levels)", levels)
    u = uniform(done.round.seed, streams(done, CHOICES), 4)[:, 2:]
    place = x / longest * levels
    at = (place + u[:, 0]).floor().clamp(0, levels)  # to the next or the one below, unbiased
    keep = 1 / (1 + levels * math.exp(-epsilon))
    other = ((u[:, 1] - keep) / (1 - keep) * levels).floor().clamp(0, levels - 1)
    other = other + (other >= at)  # one of the others, each as likely
    told = at.where(u[:, 1] < keep, other)
    # E[told] = at p + (sum of all - at) (1 - p) / levels
    slope = keep - (1 - keep) / levels
    offset = (1 - keep) * (levels + 1) / 2
    return (told - offset) / slope * longest / levels


def special() -> Any:
    """scipy's functions; InputError that names the extra where they are missing."""
    try:
        from scipy import special
    except ImportError as error:
        raise InputError('privunit2 needs scipy: pip install "vecfl[privacy]"') from error
    return special
