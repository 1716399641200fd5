"""FedDyn: Acar et al., ICLR 2021, arXiv:2111.04263, Algorithm 1."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vecfl.aggregate import Aggregate
from vecfl.algorithms.base import Algorithm, Begin, Finished, Round, Server, Starting, Upload
from vecfl.algorithms.fedavg import server_metrics
from vecfl.engine.rule import LocalRule
from vecfl.errors import InputError
from vecfl.layout import Layout
from vecfl.optim import ClientOptimizer, sgd
from vecfl.schedule import Batches
from vecfl.server_optim import server_sgd


def feddyn(
    *,
    lr: float | Callable[[int], float],
    alpha: float,
    batches: Batches,
    optimizer: ClientOptimizer | None = None,
    clip: float | None = None,
) -> Algorithm:
    """Dynamic regularisation: clients minimise loss - <g_k, w_k> + alpha/2 |w_k - w|^2.

        client   g_k <- g_k - alpha (w_k - w), zero at first
        server   h <- h - alpha |S|/N (mean of w_k - w), zero at first
                 w <- mean of w_k - h / alpha; changing buffers become their mean

    S are the clients whose update came in finite, all with weight 1; N is the population, so h is
    the mean of all g_k. Clients keep "gradient" [T] (g_k), the server "h" [T] in float64. The pull
    and g_k enter a step behind `clip`. Other arguments as in `fedavg`. Raises InputError for an
    alpha that is not positive and finite.
    """
    if not 0 < alpha < math.inf:
        raise InputError(f"feddyn(alpha={alpha}): must be positive and finite")
    return Algorithm(
        "feddyn",
        LocalRule(optimizer or sgd(), batches, lr, clip, mu=alpha, bias=True),
        init,
        begin,
        partial(upload, alpha),
        partial(step, alpha),
        table=lambda layout: {"gradient": (layout.trainable,)},
        metrics=server_metrics(server_sgd()),
        keeps=partial(keeps, alpha),
        max_weight=1.0,
    )


def init(w: Tensor, layout: Layout) -> Server:
    """The model, and h = 0."""
    return {"w": w, "h": w.new_zeros(layout.trainable, dtype=torch.float64)}


def begin(state: Server, starting: Starting) -> Begin:
    """The gradients of a client are corrected by -g_k."""
    return Begin(state["w"], -starting.table["gradient"])


def upload(alpha: float, state: Server, done: Finished) -> Upload:
    """w - w_k; the client keeps g_k - alpha (w_k - w)."""
    update, own = state["w"] - done.model, done.table["gradient"]
    new = own + alpha * update[:, : own.shape[1]]
    one = torch.ones_like(done.loss)
    return Upload(update, one, {"gradient": new}, {"clients": one})


def keeps(alpha: float, rows: Server, sent: Tensor, layout: Layout) -> Server:
    """g_k moves by what the server is told, so that h stays the mean of all."""
    return {"gradient": rows["gradient"] + alpha * sent[:, : layout.trainable]}


def step(alpha: float, state: Server, sums: Aggregate, round: Round) -> Server:
    """h first, then the model."""
    update, n = sums.mean(), round.layout.trainable
    if update is None:
        return state
    h = state["h"] + alpha * sums.extra["clients"] / round.clients * update[:n]
    w = state["w"].double() - update
    w[:n] -= h / alpha
    return {"w": w.to(state["w"].dtype), "h": h}
