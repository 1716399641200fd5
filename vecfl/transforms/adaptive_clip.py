"""A clipping norm that follows a quantile of the clients' norms.

Andrew et al., "Differentially private learning with adaptive clipping", NeurIPS 2021,
arXiv:1905.03871, Algorithm 1.
"""

import math

import torch
from torch import Tensor

from vecfl.algorithms.base import Finished, Server, Upload
from vecfl.errors import InputError, positive
from vecfl.layout import Layout
from vecfl.transforms.base import Limit, Transform
from vecfl.transforms.clip import clip_rows, counted, told


def adaptive_clip(
    initial: float = 0.1,
    *,
    quantile: float = 0.5,
    lr: float = 0.2,
    count_noise: float,
) -> Transform:
    """Clip to a norm C that moves, after each round, towards a quantile of the clients' norms.

    initial      C of the first round
    quantile     gamma; C <- C exp(-lr (b - gamma)), b the share of clients whose norm is at most C
    count_noise  standard deviation of the noise on the number of those clients; the paper takes a
                 twentieth of the cohort

    For `vecfl.private`, which adds the noise to the count and takes what it spends from the noise
    multiplier of the sum. Metrics as those of `clip_by_norm`. Raises InputError for numbers out of
    range.
    """
    for name, value in (("initial", initial), ("lr", lr), ("count_noise", count_noise)):
        positive(f"adaptive_clip({name})", value)
    if not 0 <= quantile <= 1:
        raise InputError(f"adaptive_clip(quantile={quantile}): expected 0 to 1")

    def norm(own: Server) -> float:
        return float(own["norm"])

    def init(layout: Layout) -> Server:
        return {"norm": torch.tensor(initial, dtype=torch.float64)}

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        update, length, over = clip_rows(upload.update, norm(own))
        sent = counted(upload, update, length, over)
        return with_count(sent, over)

    def adapt(own: Server, share: float) -> Server:
        return {"norm": own["norm"] * math.exp(-lr * (share - quantile))}

    limit = Limit(norm, count_noise=count_noise, adapt=adapt)
    name = f"adaptive_clip {float(initial)} {float(quantile)} {float(lr)} {float(count_noise)}"
    return Transform(name, client, init=init, metrics=told, limit=limit)


def with_count(sent: Upload, over: Tensor) -> Upload:
    """`sent`, with 1/2 of each client that was not clipped, and -1/2 of each that was."""
    below = torch.where(over, -0.5, 0.5) * (sent.weight > 0)
    sent.extra["below"] = below.double()
    return sent
