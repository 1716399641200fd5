"""Federated averaging: McMahan et al., AISTATS 2017, arXiv:1602.05629, Algorithm 1."""

import math
from collections.abc import Callable

from torch import Tensor

from vecfl.aggregate import Aggregate
from vecfl.algorithms.base import (
    Algorithm,
    Begin,
    Finished,
    Gradient,
    Metrics,
    Round,
    Server,
    Starting,
    Upload,
)
from vecfl.algorithms.weights import Weights, by_examples, most
from vecfl.engine.rule import LocalRule
from vecfl.layout import Layout
from vecfl.optim import ClientOptimizer, sgd
from vecfl.schedule import Batches
from vecfl.server_optim import ServerOptimizer, norm, server_sgd
from vecfl.work import said


def fedavg(
    *,
    lr: float | Callable[[int], float],
    batches: Batches,
    optimizer: ClientOptimizer | None = None,
    clip: float | None = None,
    weights: Weights = by_examples,
    server: ServerOptimizer | None = None,
) -> Algorithm:
    """Clients train from the model of the round; the server moves by the mean of w - w_k.

    lr         client learning rate, a number or a function of the round (from 0)
    optimizer  client optimizer, plain SGD by default; clip: norm of a step's raw gradient
    server     server optimizer on the mean; the default makes the new model the mean of models
    """
    rule = LocalRule(optimizer or sgd(), batches, lr, clip)
    return averaging("fedavg", rule, weights, server)


def averaging(
    name: str, rule: LocalRule, weights: Weights, server: ServerOptimizer | None
) -> Algorithm:
    """The algorithm that averages models trained by `rule`."""
    server = server or server_sgd()

    def upload(state: Server, done: Finished) -> Upload:
        return Upload(state["w"] - done.model, weights(done))

    init, step, metrics = server_init(server), server_step(server), server_metrics(server)
    facts = known(server, weights)
    made = Algorithm(
        name,
        rule,
        init,
        broadcast,
        upload,
        step,
        metrics=metrics,
        facts=facts,
        max_weight=most(weights),
    )
    return made.sends(Gradient(weights) if rule.one_gradient else None)


def known(server: ServerOptimizer, weights: Weights) -> dict[str, object]:
    """`Algorithm.facts` of a server optimizer and of weights."""
    return {"server": server.name, "weights": said(weights)}


def broadcast(state: Server, starting: Starting) -> Begin:
    """Every client starts from the model."""
    return Begin(state["w"])


def server_init(optimizer: ServerOptimizer) -> Callable[[Tensor, Layout], Server]:
    """The server state of a model w [P]: "w" and the optimizer's tensors [trainable]."""
    return lambda w, layout: {"w": w} | optimizer.init(w[: layout.trainable].double())


def server_step(optimizer: ServerOptimizer) -> Callable[[Server, Aggregate, Round], Server]:
    """w moves by the optimizer in float64; behind it, changing buffers become their mean.

    Without a client of positive weight nothing moves. Of several messages it takes the model's.
    """

    def step(state: Server, aggregate: Aggregate, round: Round) -> Server:
        mean, layout, trainable = aggregate.mean(), round.layout, round.layout.trainable
        if mean is None:
            return state
        moved = state["w"].double() - mean[: layout.size]
        rest = {name: t for name, t in state.items() if name != "w"}
        moved[:trainable], rest = optimizer.step(
            state["w"][:trainable].double(), mean[:trainable], rest, layout, round.number
        )
        return {"w": moved.to(state["w"].dtype)} | rest

    return step


def server_metrics(
    optimizer: ServerOptimizer,
) -> Callable[[Server, Aggregate, Round], Metrics]:
    """`server/lr`, and `server/update_norm`: |mean update|, NaN without a client that counts."""

    def metrics(state: Server, aggregate: Aggregate, round: Round) -> Metrics:
        mean, lr = aggregate.mean(), optimizer.lr(round.number)
        size = math.nan if mean is None else float(norm(mean[: round.layout.trainable]))
        return {"server/lr": lr, "server/update_norm": size}

    return metrics
