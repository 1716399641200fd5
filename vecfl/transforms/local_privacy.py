"""Local differential privacy: each client sends noise with its message, and trusts nobody.

Everything is per message: a client that takes part in T rounds has sent T of them, and two messages
of the same client are whatever its examples make them, so any two. Only the message is protected.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vecfl.algorithms.base import Finished, Server, Upload
from vecfl.errors import InputError, inside
from vecfl.random import Kind, normal, stream
from vecfl.random import laplace as draw_laplace
from vecfl.rows import lengths
from vecfl.transforms.base import Transform
from vecfl.transforms.clip import clip_by_norm, clip_factors, counted, told
from vecfl.transforms.clip_l1 import clip_by_l1
from vecfl_kernels import scaled_rows

NUMBERS, CHOICES = 2, 3  # steps of the streams of clients' noise; 0 and 1 are the server's
Draw = Callable[[Finished, int], Tensor]


def local_gaussian(norm: float, epsilon: float, delta: float) -> Transform:
    """Messages of norm at most `norm`, each number with Gaussian noise: (epsilon, delta) a message.

    The deviation is the least that is enough for two messages 2 `norm` apart: the analytic Gaussian
    mechanism of Balle and Wang, ICML 2018, arXiv:1805.06530, Algorithm 1. Weights leave clients as
    they are: `uniform_weights` tell nothing. Metrics as those of `clip_by_norm`, without noise.
    Raises InputError for numbers out of range.
    """
    finite("local_gaussian", norm=norm, epsilon=epsilon)
    std = analytic_gaussian(2 * norm, epsilon, delta)
    said = f"{float(norm)} {float(epsilon)} {float(delta)}"
    return noisy(clip_by_norm(norm), f"local_gaussian {said}", gaussian, std)


def local_laplace(norm: float, epsilon: float) -> Transform:
    """Messages whose absolute numbers add up to at most `norm`, each with Laplace noise.

    Its scale is 2 norm / epsilon: epsilon a message, delta 0 (Dwork et al., TCC 2006). Weights
    leave clients as they are: `uniform_weights` tell nothing. Metrics as those of `clip_by_l1`,
    without noise. Raises InputError for numbers out of range.
    """
    finite("local_laplace", norm=norm, epsilon=epsilon)
    said = f"{float(norm)} {float(epsilon)}"
    return noisy(clip_by_l1(norm), f"local_laplace {said}", laplace, 2 * norm / epsilon)


def noisy(clip: Transform, name: str, draw: Draw, scale: float) -> Transform:
    """`clip`, and noise on each number of what it gives; a row that is not finite stays so."""

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        sent = clip.client(own, done, upload)
        noise = draw(done, sent.update.shape[1]) * scale
        return replace(sent, update=sent.update + noise.to(sent.update))

    return replace(clip, name=name, client=client, bound=None, limit=None)


def gaussian(done: Finished, numbers: int) -> Tensor:
    """Standard normals of each client, float64 [K, numbers]."""
    return normal(done.round.seed, streams(done, NUMBERS), numbers)


def laplace(done: Finished, numbers: int) -> Tensor:
    """Laplace numbers of scale 1 of each client, float64 [K, numbers]."""
    return draw_laplace(done.round.seed, streams(done, NUMBERS), numbers)


def streams(done: Finished, step: int) -> Tensor:
    """Counter words [K, 3] of the clients' noise at this place of the chain."""
    number, place = done.round.number, done.place
    who, times = done.client, done.occurrence
    return stream(Kind.NOISE, round=number, client=who, occurrence=times, layer=place, step=step)


def analytic_gaussian(sensitivity: float, epsilon: float, delta: float) -> float:
    """The least standard deviation of (epsilon, delta): delta falls as it grows, so by halves."""
    inside("local_gaussian(delta)", delta)

    def cdf(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    def excess(std: float) -> float:
        half, rest = sensitivity / (2 * std), epsilon * std / sensitivity
        tail = cdf(-half - rest)
        return cdf(half - rest) - (math.exp(epsilon + math.log(tail)) if tail else 0.0) - delta

    low, high = 0.0, sensitivity
    while excess(high) > 0:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) <= 0 else (middle, high)
    return high


def flute_local_dp(
    epsilon: float,
    norm: float,
    *,
    delta: float = 1e-7,
    weight_scaler: float = 1.0,
    weights_between: tuple[float, float] | None = None,
) -> Transform:
    """The local privacy of FLUTE (Hipolito Garcia et al. 2022, arXiv:2203.13789), as it is there.

    epsilon          below 0: messages are clipped to `norm`, and nothing else
    weights_between  (least, most): the client's weight, times `weight_scaler` and at most the most,
                     gets noise with the message, is brought between them, and divided by
                     `weight_scaler`; None: weights stay as they are, and leave clients so

    Above 0 a message is scaled to `norm`, a shorter one too, and gets noise of deviation
    sqrt(2 ln(1.25 / delta)) S / epsilon, S = norm, or sqrt(norm^2 + most^2) with the weight. That
    formula is proven for epsilon up to 1, and for messages `norm` apart, while two of them may
    be 2 `norm` apart: use `local_gaussian` for a guarantee. A message of zeros gets noise alone; a
    client of weight 0 keeps it. Metrics as those of `clip_by_norm`, without noise. Raises
    InputError for numbers out of range.
    """
    finite("flute_local_dp", norm=norm, weight_scaler=weight_scaler)
    inside("flute_local_dp(delta)", delta)
    if epsilon < 0:
        return replace(clip_by_norm(norm), name=f"flute_local_dp clip {float(norm)}")
    least, most = weights_between or (0.0, 0.0)
    check_flute(epsilon, least, most)
    std = math.sqrt(2 * math.log(1.25 / delta)) * math.hypot(norm, most) / epsilon

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        rows, length = upload.update, lengths(upload.update)
        scaled = scaled_rows(rows, *clip_factors(rows, length, norm), length > 0)
        noise = gaussian(done, rows.shape[1] + 1) * std
        sent = counted(upload, scaled + noise[:, :-1].to(rows), length, length > norm)
        if weights_between is None:
            return sent
        amount = (weight_of(upload) * weight_scaler).clamp(max=most) + noise[:, -1]
        weight = (amount.clamp(least, most) / weight_scaler).where(upload.weight > 0, 0)
        return replace(sent, weight=weight, log_weight=None)

    bounds = weights_between and (float(least), float(most))
    said = f"{float(epsilon)} {float(norm)} {float(delta)} {float(weight_scaler)} {bounds}"
    return Transform(f"flute_local_dp {said}", client, metrics=told)


def weight_of(upload: Upload) -> Tensor:
    """How much clients count [K], float64; NaN where an exponent is not finite."""
    logs = upload.log_weight
    if logs is None:
        return upload.weight.double()
    return upload.weight * logs.exp().where(logs.isfinite(), torch.nan)


def check_flute(epsilon: float, least: float, most: float) -> None:
    """InputError for numbers out of range; a warning where the formula is not proven."""
    if not 0 < epsilon < math.inf:
        raise InputError(
            "flute_local_dp(epsilon) must be positive and finite, or below 0 to clip alone, not "
            f"{epsilon}"
        )
    if not 0 <= least <= most < math.inf:
        raise InputError(
            f"flute_local_dp(weights_between={(least, most)}): expected 0 <= least <= most"
        )
    if epsilon > 1:
        logging.getLogger("vecfl").warning(
            "flute_local_dp(epsilon=%g): its formula is proven up to epsilon 1 alone; that of "
            "local_gaussian holds for any",
            epsilon,
        )


def finite(name: str, **numbers: float) -> None:
    """InputError for a number that is not positive, and for infinity."""
    for what, value in numbers.items():
        if not 0 < value < math.inf:
            raise InputError(f"{name}({what}) must be positive and finite, not {value}")
