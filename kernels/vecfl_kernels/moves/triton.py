"""Optimizer steps as Triton kernels: one launch a parameter, each number read and written once."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from vecfl_kernels.choice import launch

if TYPE_CHECKING:
    from vecfl_kernels.moves import Rows

BLOCK = 1024


def momentum_(rows: "Rows", grads: list[Tensor], lr: float, beta: float, nesterov: bool) -> None:
    for w, g, v in zip(rows.w, packed(grads), *rows.state, strict=True):
        parts, numbers = triton.cdiv(w[0].numel(), BLOCK), (lr, beta)
        arguments = *by_row(w, g, v), *numbers, parts, w[0].numel()
        launch(momentum_step, len(w) * parts, *arguments, AHEAD=nesterov, BLOCK=BLOCK)


@triton.jit
def momentum_step(
    w, w_stride, g, g_stride, v, v_stride, lr: tl.float64, beta: tl.float64, parts, n,
    AHEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k = (tl.program_id(0) // parts).to(tl.int64)
    at = (tl.program_id(0) % parts) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    w += k * w_stride
    v += k * v_stride
    x = tl.load(w + at, mask=inside)
    gradient = tl.load(g + k * g_stride + at, mask=inside)
    lr, beta = tl.full((1,), lr, x.dtype), tl.full((1,), beta, x.dtype)
    velocity = tl.load(v + at, mask=inside) * beta + gradient
    tl.store(v + at, velocity, mask=inside)
    move = gradient + beta * velocity if AHEAD else velocity
    tl.store(w + at, x - lr * move, mask=inside)


def adam_(
    rows: "Rows",
    grads: list[Tensor],
    lr: float,
    rule: Callable,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    assert rows.steps is not None
    rows.steps += 1
    steps = rows.steps.double()
    rate = lr / (1 - beta1**steps)
    root = (1 - beta2**steps).sqrt()
    apart = rule is torch._fused_adamw_
    shrink, pull = (1 - lr * weight_decay, 0.0) if apart else (1.0, weight_decay)
    numbers = 1 - beta1, beta2, 1 - beta2, eps, shrink, pull
    for w, g, m, v in zip(rows.w, packed(grads), *rows.state, strict=True):
        parts = triton.cdiv(w[0].numel(), BLOCK)
        arguments = *by_row(w, g, m, v), rate, root, *numbers, parts, w[0].numel()
        launch(adam_step, len(w) * parts, *arguments, BLOCK=BLOCK)


@triton.jit
def adam_step(
    w, w_stride, g, g_stride, m, m_stride, v, v_stride, rate, root,
    share: tl.float64, beta: tl.float64, rest: tl.float64, eps: tl.float64,
    shrink: tl.float64, pull: tl.float64, parts, n, BLOCK: tl.constexpr,
):  # fmt: skip
    k = (tl.program_id(0) // parts).to(tl.int64)
    at = (tl.program_id(0) % parts) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    w += k * w_stride
    m += k * m_stride
    v += k * v_stride
    x = tl.load(w + at, mask=inside)
    share, beta = tl.full((1,), share, x.dtype), tl.full((1,), beta, x.dtype)
    rest, eps = tl.full((1,), rest, x.dtype), tl.full((1,), eps, x.dtype)
    shrink, pull = tl.full((1,), shrink, x.dtype), tl.full((1,), pull, x.dtype)
    rate, root = tl.load(rate + k).to(x.dtype), tl.load(root + k).to(x.dtype)
    gradient = tl.load(g + k * g_stride + at, mask=inside) + pull * x
    mean, square = tl.load(m + at, mask=inside), tl.load(v + at, mask=inside)
    mean += share * (gradient - mean)
    square = beta * square + rest * gradient * gradient
    tl.store(m + at, mean, mask=inside)
    tl.store(v + at, square, mask=inside)
    if x.dtype == tl.float64:
        move = rate * mean / (tl.sqrt(square) / root + eps)
    else:
        move = tl.div_rn(rate * mean, tl.div_rn(tl.sqrt_rn(square), root) + eps)
    tl.store(w + at, shrink * x - move, mask=inside)


def packed(grads: list[Tensor]) -> list[Tensor]:
    """Gradients [R, *shape] with the numbers of a row side by side."""
    return [g if g[:1].is_contiguous() else g.contiguous() for g in grads]


def by_row(*tensors: Tensor) -> tuple[Tensor | int, ...]:
    """Tensors [R, *shape] and the distances of their rows, whose numbers lie side by side."""
    return tuple(part for t in tensors for part in (t, t.stride(0)))
