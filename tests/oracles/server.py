"""The server of the oracle: optimizers, schedules and plateaus in plain PyTorch, tensor by tensor.

Where torch.optim has an optimizer or a scheduler it is that; the others are written from their
papers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TORCH = {
    "sgd": lambda p, s: torch.optim.SGD(p, s.lr),
    "momentum": lambda p, s: torch.optim.SGD(p, s.lr, s.beta),
    "adam": lambda p, s: torch.optim.Adam(p, s.lr, s.betas, s.eps),
    "adamw": lambda p, s: torch.optim.AdamW(p, s.lr, s.betas, s.eps, s.weight_decay),
    "adamax": lambda p, s: torch.optim.Adamax(p, s.lr, s.betas, s.eps),
}


@dataclass(frozen=True)
class ServerSetting:
    """How a server moves; `lr` of the others is `Setting.server_lr`."""

    optimizer: str = "sgd"  # a name of TORCH | adagrad | yogi | fedadam | lars | lamb
    lr: float = 1.0
    schedule: Callable[[int], float] | None = None
    clip: float | None = None
    beta: float = 0.7
    betas: tuple[float, float] = (0.6, 0.9)
    eps: float = 0.01  # of the adaptive ones tau
    weight_decay: float = 0.2
    trust: float = 0.5


class Server:
    """The optimizer of a run; params are float64 copies of the model's, which `step` moves."""

    def __init__(self, s: ServerSetting, params: list[Tensor]) -> None:
        self.s, self.params = s, [nn.Parameter(p.detach().double().clone()) for p in params]
        first = s.eps**2 if s.optimizer in ("adagrad", "yogi", "fedadam") else 0.0
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.full_like(p, first) for p in self.params]
        self.t = 0
        self.torch = TORCH[s.optimizer](self.params, s) if s.optimizer in TORCH else None

    @torch.no_grad()
    def step(self, params: list[Tensor], grads: list[Tensor], round: int, share: float) -> None:
        """Move `params` in place; `share` of a plateau multiplies what they move by."""
        s, factor = self.s, share * (self.s.schedule(round) if self.s.schedule else 1.0)
        if s.clip is not None:
            length = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
            grads = [g * min(1.0, s.clip / float(length)) for g in grads]
        for p, there in zip(self.params, params, strict=True):
            p.copy_(there)
        self.t += 1
        if self.torch is not None:
            for p, g in zip(self.params, grads, strict=True):
                p.grad = g.clone()
            self.torch.param_groups[0]["lr"] = s.lr * factor
            self.torch.step()
        else:
            for p, m, v, g in zip(self.params, self.m, self.v, grads, strict=True):
                p -= factor * self.move(p, m, v, g)
        for p, there in zip(self.params, params, strict=True):
            there.copy_(p)

    def move(self, w: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Tensor:
        """What a tensor moves by; m and v change in place."""
        s, (b1, b2) = self.s, self.s.betas
        if s.optimizer == "lars":
            below = g.norm() + s.weight_decay * w.norm()
            rate = s.trust * w.norm() / below if w.norm() > 0 and below > 0 else 1.0
            m.copy_(s.beta * m + s.lr * rate * (g + s.weight_decay * w))
            return m
        m.copy_(b1 * m + (1 - b1) * g)
        if s.optimizer == "adagrad":
            v.add_(g * g)
        elif s.optimizer == "yogi":
            v.sub_((1 - b2) * g * g * torch.sign(v - g * g))
        else:
            assert s.optimizer in ("fedadam", "lamb")
            v.copy_(b2 * v + (1 - b2) * g * g)
        if s.optimizer != "lamb":
            return s.lr * m / (v.sqrt() + s.eps)
        u = (m / (1 - b1**self.t)) / ((v / (1 - b2**self.t)).sqrt() + s.eps) + s.weight_decay * w
        rate = w.norm() / u.norm() if w.norm() > 0 and u.norm() > 0 else 1.0
        return s.lr * rate * u


class Plateau:
    """A factor by torch's scheduler, stepped with one value a round."""

    def __init__(self, factor: float, patience: int) -> None:
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, "min", factor, patience, threshold=0.0, eps=0.0
        )

    @property
    def share(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def look(self, value: float) -> None:
        self.scheduler.step(value)
