"""SCAFFOLD: Karimireddy et al., ICML 2020, arXiv:1910.06378, Algorithm 1."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vecfl.aggregate import Aggregate
from vecfl.algorithms.base import Algorithm, Begin, Finished, Round, Server, Starting, Upload
from vecfl.algorithms.fedavg import server_init, server_metrics, server_step
from vecfl.algorithms.fedsgd import fedsgd
from vecfl.engine.rule import LocalRule
from vecfl.errors import InputError
from vecfl.layout import Layout
from vecfl.optim import ClientOptimizer, sgd
from vecfl.schedule import Batches
from vecfl.server_optim import ServerOptimizer, server_sgd


def scaffold(
    *,
    lr: float | Callable[[int], float],
    batches: Batches,
    option: Literal[1, 2] = 2,
    optimizer: ClientOptimizer | None = None,
    server: ServerOptimizer | None = None,
) -> Algorithm:
    """Control variates against client drift: every local gradient becomes g - c_k + c.

    x is the server's model, y_k the client's after its K steps of size lr. Then

        option 2   c_k+ = c_k - c + (x - y_k) / (K lr)
        option 1   c_k+ = the mean gradient, at x, of the examples that the client takes part with,
                   by a pass over them before it trains; a rank holds these rows [c, P] of the
                   clients that it trains. Dropout and augmentation draw as in the first epoch
        server     x moves by the mean of x - y_k, as `server` says (server_sgd(lr): the paper's
                   global step size); c <- c + |S|/N mean of c_k+ - c_k

    Where transforms change what is sent, c_k moves by the change that arrives. A clip sees a
    message as one row, whose second half is about 1 / (K lr) times as large as the first; codecs
    treat both halves by themselves.

    S are the clients whose message came in finite, all with weight 1, and N is the population, so c
    stays the mean of all c_k. A client that makes no step, or steps of size 0, keeps its c_k and
    counts as one that stands still. Clients keep "variate" [T] (c_k), the server "variate" [T] (c)
    in float64. A message is one row: the update, then the change of the variate.

    Raises InputError for another client optimizer than plain SGD.
    """
    optimizer, server = optimizer or sgd(), server or server_sgd()
    check(optimizer, option)
    return Algorithm(
        "scaffold",
        LocalRule(optimizer, batches, lr, bias=True),
        init(server),
        begin,
        upload,
        step(server),
        table=lambda layout: {"variate": (layout.trainable,)},
        metrics=server_metrics(server),
        messages=("model", "variate"),
        downlink=2,
        keeps=keeps,
        before=fedsgd(lr=1.0, size=batches.size) if option == 1 else None,
        facts={"server": server.name, "option": option},
        max_weight=1.0,
    )


def check(optimizer: ClientOptimizer, option: object) -> None:
    """Raise InputError for what the paper does not have."""
    if not optimizer.plain:
        raise InputError(
            "scaffold: its variates are means of gradients, which only plain SGD adds up; give "
            f"optimizer=sgd() without weight_decay, not {optimizer.name}"
        )
    if option not in (1, 2):
        raise InputError(f"scaffold(option={option!r}): must be 1 or 2")


def init(server: ServerOptimizer) -> Callable[[Tensor, Layout], Server]:
    """The state of FedAvg under `server`, and c = 0."""
    plain = server_init(server)
    return lambda w, layout: (
        plain(w, layout) | {"variate": w.new_zeros(layout.trainable, dtype=torch.float64)}
    )


def begin(state: Server, starting: Starting) -> Begin:
    """The gradients of a client are corrected by c - c_k."""
    own = starting.table["variate"]
    return Begin(state["w"], (state["variate"] - own).to(own.dtype))


def upload(state: Server, done: Finished) -> Upload:
    """x - y_k, and behind it c_k+ - c_k, zero for buffers."""
    update, own = state["w"] - done.model, done.table["variate"]
    walked = (done.steps.double() * done.lr)[:, None]  # K lr
    if done.before is not None:
        new = done.before[:, : own.shape[1]]
    else:
        mean = update[:, : own.shape[1]].double() / walked
        new = (own - state["variate"] + mean).to(own.dtype)
    new = new.where(walked > 0, own)
    change = F.pad(new - own, (0, update.shape[1] - own.shape[1]))
    one = torch.ones_like(done.loss)
    return Upload(torch.cat((update, change), 1), one, {"variate": new}, {"clients": one})


def keeps(rows: Server, sent: Tensor, layout: Layout) -> Server:
    """c_k moves by what the server is told of it, so that c stays the mean of all."""
    return {"variate": rows["variate"] + sent[:, layout.size : layout.size + layout.trainable]}


def step(server: ServerOptimizer) -> Callable[[Server, Aggregate, Round], Server]:
    """The model moves by `server`, c by |S|/N times the mean change."""
    move = server_step(server)

    def both(state: Server, sums: Aggregate, round: Round) -> Server:
        mean, layout = sums.mean(), round.layout
        if mean is None:
            return state
        rest = {name: t for name, t in state.items() if name != "variate"}
        change = mean[layout.size : layout.size + layout.trainable]
        share = sums.extra["clients"] / round.clients
        return move(rest, sums, round) | {"variate": state["variate"] + share * change}

    return both
