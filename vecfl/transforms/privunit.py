"""Locally private directions and lengths: PrivUnit2 and ScalarDP.

Bhowmick et al. 2018, arXiv:1812.00984: Algorithms 1 (PrivUnit2) and 3 (ScalarDP).
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecfl.algorithms.base import Finished, Server, Upload
from vecfl.errors import InputError
from vecfl.layout import Layout
from vecfl.random import uniform
from vecfl.rows import lengths, moments
from vecfl.transforms.base import Transform
from vecfl.transforms.local_privacy import CHOICES, finite, gaussian, streams
from vecfl_kernels import row_largest

LARGEST = 100.0  # epsilon
COIN = 30.0  # of it for one choice: coins of 64 bits have chances of e^-30 to seven digits


def privunit2(epsilon: float, longest: float, *, norm_share: float = 0.1) -> Transform:
    """The direction of each message by PrivUnit2, its norm by ScalarDP: epsilon a message.

    longest     norms are clipped to it
    norm_share  of epsilon, which is for the norm; the rest is for the direction

    The mean of what arrives is the clipped message. The norm is rounded to one of k + 1 levels, k =
    ceil(exp(e / 3)) for its share e, as the paper has it. Weights leave clients as they are:
    `uniform_weights` tell nothing. Metrics: none, for a norm is private. Raises InputError for
    numbers out of range, and when a run starts for a message of one number.
    """
    finite("privunit2", epsilon=epsilon, longest=longest)
    if epsilon > LARGEST:
        raise InputError(f"privunit2(epsilon) must be at most {LARGEST:g}, not {epsilon}")
    if not 0 < norm_share < 1:
        raise InputError(f"privunit2(norm_share) must be between 0 and 1, not {norm_share}")
    of_norm, of_direction = norm_share * epsilon, (1 - norm_share) * epsilon
    if of_norm > COIN:
        raise InputError(
            f"privunit2(norm_share): at most {COIN:g} is for the norm, not {of_norm:g}"
        )
    special()

    def init(layout: Layout) -> Server:
        cap_of(layout.size, of_direction)
        return {}

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        rows, coins = upload.update.double(), fair(done, 5)
        largest = row_largest(rows)[:, None]
        scaled = (rows / largest).where(largest != 0, 1)  # zeros have any direction
        u, norm = scaled / lengths(scaled)[:, None], lengths(rows)
        across = gaussian(done, rows.shape[1])
        sent = directions(u, cap_of(rows.shape[1], of_direction), coins[:, :2], across)
        length = scalars(norm / longest, of_norm, coins[:, 2:]) * longest
        return replace(upload, update=(sent * length[:, None]).to(upload.update.dtype))

    said = f"{float(epsilon)} {float(longest)} {float(norm_share)}"
    return Transform(f"privunit2 {said}", client, init=init)


def fair(done: Finished, n: int) -> Tensor:
    """n numbers uniform in (0, 1) of each client, of 64 bits: float64 [K, n]."""
    high, low = uniform(done.round.seed, streams(done, CHOICES), 2 * n).split(n, 1)
    return high + (low - 0.5) * 2.0**-32


@dataclass(frozen=True)
class Cap:
    """How PrivUnit2 draws V from the sphere in `size` dimensions, about a unit vector u.

    share  of the sphere is the cap, where <V, u> is at least gamma
    far    the probability that V is not in the cap
    mean   E[<V, u>]: V / mean is unbiased
    """

    size: int
    share: float
    far: float
    mean: float


@lru_cache(maxsize=64)
def cap_of(size: int, epsilon: float) -> Cap:
    """The cap for an epsilon that has the largest mean, and so the least variance.

    Densities in the cap and elsewhere are (1 - far) / share and far / (1 - share). With far =
    1 / (1 + e^c), share = 1 / (1 + e^(epsilon - c)) their ratio is e^epsilon, whatever c goes into
    the choice of the side: gamma is a quantile of the uniform law, which the paper's conditions on
    it bound from below (on c: Asi et al., ICML 2022, arXiv:2205.02466). Raises InputError for a
    size below 2.
    """
    if size < 2:
        raise InputError(f"privunit2: a message of {size} numbers has no direction; take 2 or more")
    alpha = (size - 1) / 2
    side = np.linspace(0, min(epsilon, COIN), 258)[1:-1]
    far, share = 1 / (1 + np.exp(side)), 1 / (1 + np.exp(epsilon - side))
    x = special().betaincinv(alpha, alpha, share)  # gamma is 1 - 2x
    # int_gamma^1 t (1 - t^2)^(alpha - 1) dt = (1 - gamma^2)^alpha / (2 alpha), over B(alpha, 1/2)
    log = alpha * np.log(4 * x * (1 - x)) - math.log(2 * alpha) - math.log(math.pi) / 2
    moment = np.exp(log) * special().poch(alpha, 0.5)
    # moment (1 - far) / share - moment far / (1 - share)
    mean = moment * (1 - far) / share * -math.expm1(-epsilon)
    best = int(mean.argmax())
    return Cap(size, float(share[best]), float(far[best]), float(mean[best]))


def directions(u: Tensor, cap: Cap, coins: Tensor, normals: Tensor) -> Tensor:
    """Unbiased private directions of unit rows u [K, d]: a point of the cap, or of the rest.

    coins [K, 2] are uniform: for the side, and for how far V is from u; normals [K, d] say whither.
    """
    alpha, near = (cap.size - 1) / 2, coins[:, 0] >= cap.far
    part = torch.where(near, cap.share, 1 - cap.share) * coins[:, 1]
    # (1 - <V, u>) / 2 has the law Beta(alpha, alpha), cut off at the edge of the cap.
    x = torch.from_numpy(special().betaincinv(alpha, alpha, part.cpu().numpy())).to(part)
    along = torch.where(near, 1 - 2 * x, 2 * x - 1)[:, None]
    across = normals - moments(normals * u)[0][:, None] * u
    across *= (2 * (x * (1 - x)).sqrt() / lengths(across))[:, None]
    return (along * u + across) / cap.mean


def scalars(x: Tensor, epsilon: float, coins: Tensor) -> Tensor:
    """Unbiased private numbers of x [K] from 0, clipped to 1: one of k + 1 levels, or another.

    coins [K, 3] are uniform: for the level next to x, for telling another, and for which.
    """
    k = levels(epsilon)
    at = (x * k + coins[:, 0]).floor().clamp(max=k)
    other = (coins[:, 2] * k).floor().clamp(max=k - 1)
    other = other + (other >= at)
    wrong = k / (math.exp(epsilon) + k)
    told = torch.where(coins[:, 1] < wrong, other, at)
    # E[told] = at (1 - wrong) + (k (k + 1) / 2 - at) wrong / k
    slope = math.expm1(epsilon) / (math.exp(epsilon) + k)
    return (told - wrong * (k + 1) / 2) / (slope * k)


def levels(epsilon: float) -> int:
    """k of ScalarDP, with which its variance is of the order e^(-2 epsilon / 3)."""
    return math.ceil(math.exp(epsilon / 3))


def special() -> Any:
    """scipy's functions; InputError that names the extra where they are missing."""
    try:
        from scipy import special
    except ImportError as error:
        raise InputError('privunit2 needs scipy: pip install "vecfl[privacy]"') from error
    return special
