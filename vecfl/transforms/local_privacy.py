"""Local differential privacy: each client sends noise with its message, and trusts nobody.

Everything is per message: a client that takes part in T rounds has sent T of them.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from vecfl.algorithms.base import Finished, Server, Upload
from vecfl.errors import InputError, positive
from vecfl.random import Kind, normal, stream, uniform
from vecfl.transforms.base import Transform
from vecfl.transforms.clip import clip_by_norm, counted, told
from vecfl.transforms.clip_l1 import clip_by_l1

LOCAL = 2  # step of the streams of clients' noise; 0 and 1 are the server's


def local_gaussian(norm: float, epsilon: float, delta: float) -> Transform:
    """Messages of norm at most `norm`, each number with Gaussian noise: (epsilon, delta) a message.

    The deviation is the least that is enough for two messages 2 `norm` apart: the analytic Gaussian
    mechanism of Balle and Wang, ICML 2018, arXiv:1805.06530, Algorithm 1. Metrics as those of
    `clip_by_norm`.
    """
    std = analytic_gaussian(2 * norm, epsilon, delta)
    return noisy(clip_by_norm(norm), f"local_gaussian {norm} {epsilon} {delta}", std, "gaussian")


def local_laplace(norm: float, epsilon: float) -> Transform:
    """Messages whose absolute numbers add up to at most `norm`, each with Laplace noise.

    Its scale is 2 norm / epsilon: epsilon a message, delta 0 (Dwork et al., TCC 2006). Metrics as
    those of `clip_by_l1`.
    """
    positive("local_laplace(epsilon)", epsilon)
    scale = 2 * norm / epsilon
    return noisy(clip_by_l1(norm), f"local_laplace {norm} {epsilon}", scale, "laplace")


def noisy(clip: Transform, name: str, scale: float, law: str) -> Transform:
    """`clip`, and noise on each number of what it gives."""

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        sent = clip.client(own, done, upload)
        noise = draws(done, sent.update.shape[1], law) * scale
        return replace(sent, update=sent.update + noise.to(sent.update))

    return replace(clip, name=name, client=client, bound=None, limit=None)


def draws(done: Finished, numbers: int, law: str) -> Tensor:
    """Standard normals, or Laplace numbers of scale 1, float64 [K, numbers], keyed by client."""
    at = streams(done)
    if law == "gaussian":
        return normal(done.round.seed, at, numbers)
    u = uniform(done.round.seed, at, numbers) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


def streams(done: Finished, step: int = LOCAL) -> Tensor:
    """Counter words [K, 3] of the clients' noise."""
    number, who = done.round.number, done.client
    return stream(Kind.NOISE, round=number, client=who, occurrence=done.occurrence, step=step)


def analytic_gaussian(sensitivity: float, epsilon: float, delta: float) -> float:
    """The least standard deviation of (epsilon, delta): delta falls as it grows, so by halves."""
    positive("epsilon", epsilon)
    positive("sensitivity", sensitivity)
    if not 0 < delta < 1:
        raise InputError(f"delta={delta}: must be between 0 and 1")

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
                     `weight_scaler`; None: weights stay as they are

    From 0 on a message is scaled to `norm` exactly, a shorter one too, and gets noise of deviation
    sqrt(2 ln(1.25 / delta)) S / epsilon, S = norm, or sqrt(norm^2 + most^2) with the weight. That
    formula is proven for epsilon up to 1, and for messages `norm` apart, while two of them may
    be 2 `norm` apart: use `local_gaussian` for a guarantee. A message of zeros stays one.
    """
    positive("flute_local_dp(norm)", norm)
    if epsilon < 0:
        clip = clip_by_norm(norm)
        return replace(clip, name=f"flute_local_dp clip {norm}", bound=None)
    least, most = weights_between or (0.0, 0.0)
    std = math.sqrt(2 * math.log(1.25 / delta)) * math.hypot(norm, most) / epsilon
    warn_above_one("flute_local_dp", epsilon)

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        length = upload.update.double().norm(dim=1)
        factor = (norm / length).where(length > 0, 0.0)
        noise = draws(done, upload.update.shape[1] + 1, "gaussian") * std
        update = upload.update * factor[:, None] + noise[:, :-1]
        sent = counted(upload, update.to(upload.update.dtype), length, length > norm)
        if weights_between is None:
            return sent
        amount = (upload.weight * weight_scaler).clamp(max=most) + noise[:, -1]
        weight = amount.clamp(least, most) / weight_scaler
        return replace(sent, weight=weight.where(upload.weight > 0, 0))

    said = f"{epsilon} {norm} {delta} {weight_scaler} {weights_between}"
    return Transform(f"flute_local_dp {said}", client, metrics=told)


def warn_above_one(name: str, epsilon: float) -> None:
    """Say that a formula is used outside of what is proven."""
    import logging

    if epsilon > 1:
        logging.getLogger("vecfl").warning(
            "%s(epsilon=%g): its formula is proven up to epsilon 1 alone; local_gaussian has none "
            "such limit",
            *(name, epsilon),
        )
