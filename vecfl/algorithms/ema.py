"""An average of the models of a run: the one that is evaluated and kept."""

from dataclasses import replace

import torch
from torch import Tensor

from vecfl.aggregate import Aggregate
from vecfl.algorithms.base import Algorithm, Round, Server
from vecfl.algorithms.carrying import MEAN, carrying, refuse_delays
from vecfl.errors import InputError
from vecfl.layout import Layout

NAME = f"{MEAN}w"


def ema(algorithm: Algorithm, decay: float) -> Algorithm:
    """`algorithm`, of which mean <- decay mean + (1 - decay) w is evaluated and kept.

    The mean is float64, over the trainable parameters, and begins at the first model; buffers are
    those of the model that `algorithm` keeps, which is w. Clients go on from w. A round without a
    client that counts changes nothing. Polyak and Juditsky, SIAM J. Control Optim. 1992, with
    weights that decay.

    It stands outside of all that moves w, `replay` and `server_on_plateau`, which refuse to stand
    around it, and inside of `delayed`.
    """
    refuse_delays(algorithm, "ema")
    if not 0 <= decay < 1:
        raise InputError(f"ema(decay) must be in [0, 1), not {decay}")

    def init(w: Tensor, layout: Layout) -> Server:
        return {NAME: w[: layout.trainable].double()}

    inner = carrying(algorithm, MEAN, init)

    def step(server: Server, sums: Aggregate, round: Round) -> Server:
        new = inner.server(server, sums, round)
        if not algorithm.moves(sums):
            return new
        w = new["w"][: round.layout.trainable].double()
        return new | {NAME: decay * server[NAME] + (1 - decay) * w}

    def model(server: Server) -> Tensor:
        w, mean = inner.model(server), server[NAME]
        return torch.cat((mean.to(w.dtype), w[len(mean) :]))

    name = f"{algorithm.name}, ema {float(decay)}"
    return replace(inner, name=name, server=step, model=model).promises(algorithm.privacy)
