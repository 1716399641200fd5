"""What SCAFFOLD and FedDyn remember, and the coefficients of FedNova, written from the papers.

Rows are float64, over the trainable parameters. Karimireddy et al. 2020, Algorithm 1; Acar et al.
2021, Algorithm 1; Wang et al. 2020, section 4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Memory:
    """c_k and c of SCAFFOLD, the gradients of clients and h of FedDyn: zero at first."""

    own: list[Tensor]
    server: Tensor

    @classmethod
    def zeros(cls, clients: int, size: int) -> "Memory":
        rows = torch.zeros(clients + 1, size, dtype=torch.float64)
        return cls(list(rows[1:]), rows[0])


def new_variate(own: Tensor, c: Tensor, moved: Tensor, steps: list[float]) -> Tensor:
    """Option II: c_k - c + (x - y) / (K eta); `moved` is x - y, `steps` the size of each step."""
    return own - c + moved / sum(steps) if sum(steps) else own


def coefficients(tau: int, momentum: float, pull: float) -> list[float]:
    """a of FedNova: how much of lr g_j is in the update, for each step j; pull is lr mu.

    By walking: what one gradient of 1 in step j has moved at the end.
    """
    found = []
    for j in range(tau):
        moved, velocity = 0.0, 0.0
        for step in range(tau):
            gradient = float(step == j) - pull * moved  # moved against the gradient
            velocity = momentum * velocity + gradient
            moved += velocity
        found.append(moved)
    return found
