"""An algorithm with two columns, so that the per-client table can be held to the oracle.

A client starts from w + habit / 2 (its parameters), counts 1 + visits times, and remembers the mean
of its own moves.
"""

from dataclasses import replace

import torch
from torch import Tensor

import vecfl
from vecfl.aggregate import Aggregate
from vecfl.algorithms import Algorithm, Begin, Finished, Round, Starting, Upload
from vecfl.layout import Layout


def habit(**averaging: object) -> Algorithm:
    """FedAvg, whose clients keep "habit" [P] and "visits" []; arguments as those of `fedavg`."""
    plain = vecfl.fedavg(**averaging)

    def init(w: Tensor, layout: Layout) -> dict[str, Tensor]:
        half = (torch.arange(len(w)) < layout.trainable).to(w) / 2
        return plain.init(w, layout) | {"half": half}

    def begin(server: dict[str, Tensor], starting: Starting) -> Begin:
        return Begin(server["w"] + server["half"] * starting.table["habit"])

    def upload(server: dict[str, Tensor], done: Finished) -> Upload:
        sent, visits = plain.upload(server, done), done.table["visits"]
        mean = (visits[:, None] * done.table["habit"] - sent.update) / (visits[:, None] + 1)
        rows = {"habit": mean, "visits": visits + 1}
        return Upload(sent.update, sent.weight * (1 + visits), rows)

    def server(state: dict[str, Tensor], sums: Aggregate, round: Round) -> dict[str, Tensor]:
        return plain.server(state, sums, round) | {"half": state["half"]}

    return replace(
        plain,
        name="habit",
        init=init,
        begin=begin,
        upload=upload,
        server=server,
        table=lambda layout: {"habit": (layout.size,), "visits": ()},
    )
