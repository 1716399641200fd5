"""What may stand around any server optimizer: clipping and schedules."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vecfl.errors import InputError, positive
from vecfl.layout import Layout
from vecfl.server_optim.base import ServerOptimizer, Tensors, norm
from vecfl.work import said


def clipped(optimizer: ServerOptimizer, limit: float) -> ServerOptimizer:
    """The pseudo-gradient is scaled down to a norm of `limit` at most, then `optimizer` steps.

    The norm is that over all trainable parameters, in float64 (Pascanu et al., ICML 2013,
    Algorithm 1).
    """
    positive("clipped(limit)", limit)

    def step(
        w: Tensor, update: Tensor, state: Tensors, layout: Layout, round: int
    ) -> tuple[Tensor, Tensors]:
        scale = (limit / norm(update)).clamp(max=1)  # limit / 0 is inf, clamped to 1
        return optimizer.step(w, update * scale, state, layout, round)

    return replace(optimizer, name=f"{optimizer.name}, clipped to {float(limit)}", step=step)


def scheduled(optimizer: ServerOptimizer, schedule: Callable[[int], float]) -> ServerOptimizer:
    """`optimizer` whose learning rate is multiplied by schedule(round): see `vecfl.schedules`.

    It scales what the optimizer moves w by: for all optimizers here the same as another learning
    rate in that round, but for LARS, whose momentum has the learning rate of its time in it.
    """
    if not callable(schedule):
        raise InputError(f"scheduled(schedule): such as cosine(100), not {schedule!r}")

    def factor(round: int) -> float:
        value = float(schedule(round))
        if not 0 <= value < math.inf:
            said = "the schedule of the server gives"
            raise InputError(f"{said} {value} in round {round + 1}: at least 0 and finite")
        return value

    def step(
        w: Tensor, update: Tensor, state: Tensors, layout: Layout, round: int
    ) -> tuple[Tensor, Tensors]:
        moved, state = optimizer.step(w, update, state, layout, round)
        return torch.lerp(w, moved, factor(round)), state  # the bits of `moved` where that is 1

    return replace(
        optimizer,
        name=f"{optimizer.name}, scheduled by {said(schedule)}",
        step=step,
        lr=lambda round: optimizer.lr(round) * factor(round),
    )
