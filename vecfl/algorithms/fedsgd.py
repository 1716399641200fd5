"""FedSGD: McMahan et al., AISTATS 2017, arXiv:1602.05629, section 2 (the case E = 1, B = inf)."""

from vecfl.algorithms.base import Algorithm, Finished, Gradient, Server, Upload
from vecfl.algorithms.fedavg import broadcast, known, server_init, server_metrics, server_step
from vecfl.algorithms.weights import Weights, by_examples, most
from vecfl.engine.rule import LocalRule
from vecfl.errors import InputError
from vecfl.optim import keep_gradient
from vecfl.schedule import Batches
from vecfl.server_optim import ServerOptimizer, server_sgd


def fedsgd(
    *,
    lr: float | None = None,
    size: int = 64,
    max_examples: int | None = None,
    weights: Weights = by_examples,
    server: ServerOptimizer | None = None,
) -> Algorithm:
    """Clients send the gradient over all their examples at w; the server steps with the mean.

    lr            the server's learning rate for plain SGD; or give a `server` optimizer, not both
    size          examples in a micro-batch: it bounds memory, and where nothing is drawn (dropout,
                  augmentation) it does not change the result
    max_examples  cap per client and round
    """
    if (lr is None) == (server is None):
        raise InputError("fedsgd takes lr or server, one of the two")
    if lr is not None:
        server = server_sgd(lr)
    assert server is not None
    batches = Batches(size, epochs=1, full=True, max_examples=max_examples)
    rule = LocalRule(keep_gradient(), batches, lr=0.0)

    def upload(state: Server, done: Finished) -> Upload:
        update = state["w"] - done.model  # zero but for changing buffers
        update[:, : done.state[0].shape[1]] = done.state[0]
        return Upload(update, weights(done))

    init, step, metrics = server_init(server), server_step(server), server_metrics(server)
    facts = known(server, weights)
    made = Algorithm(
        "fedsgd",
        rule,
        init,
        broadcast,
        upload,
        step,
        metrics=metrics,
        facts=facts,
        max_weight=most(weights),
    )
    return made.sends(Gradient(weights, scale=1.0))
