"""Server optimizers with a learning rate for each layer, here each tensor of the model.

Where a tensor is 0, or the norm below the papers' ratio, that is 0 or undefined, and a bias that
starts at zero would stay there: such a tensor moves with a ratio of 1.
"""

import torch
from torch import Tensor

from vecfl.errors import at_least_zero, fraction, positive
from vecfl.layout import Layout
from vecfl.server_optim.adam import Betas, check, corrected, counted, moments
from vecfl.server_optim.base import (
    ServerOptimizer,
    Tensors,
    called,
    constant,
    norm,
    zeros,
)


def server_lars(
    lr: float = 1.0, beta: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001
) -> ServerOptimizer:
    """m <- beta m + lr ratio (update + weight_decay w); w <- w - m, tensor by tensor, where
    ratio = trust |w| / (|update| + weight_decay |w|).

    You, Gitman and Ginsburg, arXiv:1708.03888, Algorithm 1.
    """
    at_least_zero("server_lars(lr)", lr)
    fraction("server_lars(beta)", beta)
    at_least_zero("server_lars(weight_decay)", weight_decay)
    positive("server_lars(trust)", trust)
    at_least_zero("server_lars(trust)", trust)

    def step(
        w: Tensor, update: Tensor, state: Tensors, layout: Layout, round: int
    ) -> tuple[Tensor, Tensors]:
        size = norms(w, layout)
        slope = norms(update, layout) + weight_decay * size
        ratio = where_moving(trust * size / slope, size, slope)
        decayed = update + weight_decay * w
        m = beta * state["m"] + lr * spread(ratio, layout) * decayed
        return w - m, {"m": m}

    name = called("lars", lr, beta, weight_decay, trust)
    return ServerOptimizer(name, zeros("m"), step, constant(lr))


def server_lamb(
    lr: float = 0.01,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> ServerOptimizer:
    """u = Adam's step with bias correction + weight_decay w; w <- w - lr |w| / |u| u, tensor by
    tensor.

    You et al., ICLR 2020, arXiv:1904.00962, Algorithm 2, with the identity for phi.
    """
    check("server_lamb", lr, betas, eps)
    at_least_zero("server_lamb(weight_decay)", weight_decay)

    def step(
        w: Tensor, update: Tensor, state: Tensors, layout: Layout, round: int
    ) -> tuple[Tensor, Tensors]:
        state = moments(update, state, betas)
        u = corrected(state, betas, eps) + weight_decay * w
        size, slope = norms(w, layout), norms(u, layout)
        ratio = where_moving(size / slope, size, slope)
        return w - lr * spread(ratio, layout) * u, state

    name = called("lamb", lr, *betas, eps, weight_decay)
    return ServerOptimizer(name, counted, step, constant(lr))


def norms(x: Tensor, layout: Layout) -> Tensor:
    """The norm of each tensor in x [trainable]."""
    return torch.stack([norm(part.reshape(-1)) for part in layout.param_views(x)])


def where_moving(ratio: Tensor, size: Tensor, slope: Tensor) -> Tensor:
    """The ratio of each tensor, 1 where its norm or that below the ratio is 0."""
    return ratio.where((size > 0) & (slope > 0), 1)


def spread(ratio: Tensor, layout: Layout) -> Tensor:
    """The ratio of each tensor, for each of its numbers: [trainable]."""
    sizes = torch.tensor([entry.size for entry in layout.params], device=ratio.device)
    return ratio.repeat_interleave(sizes, output_size=layout.trainable)
