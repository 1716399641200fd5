"""Learning rates that fall where a metric gets no better."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch
from torch import Tensor

from vecfl.aggregate import Aggregate
from vecfl.algorithms.base import OBSERVED, Algorithm, Metrics, Round, Server
from vecfl.algorithms.carrying import carrying
from vecfl.engine.rule import LocalRule
from vecfl.errors import InputError, is_integer
from vecfl.layout import Layout

KEPT = ("factor", "best", "bad")  # of a plateau, in the server's state


def server_on_plateau(
    algorithm: Algorithm,
    metric: str,
    direction: str,
    factor: float = 0.1,
    patience: int = 10,
) -> Algorithm:
    """`algorithm`, whose server moves `factor` times as far after each plateau of `metric`.

    metric     of a round, such as "eval/loss"; rounds that do not have it change nothing, nor
               does NaN in a round to which nobody came
    direction  "min" or "max": which values are better. An equal value is not, and NaN neither
    patience   values in a row that may be no better; after one more the rate falls, and the count
               begins anew

    `torch.optim.lr_scheduler.ReduceLROnPlateau` with threshold=0. What the server moves is scaled:
    w + share (w_new - w), of the trainable parameters. `share` is told as "server/lr_factor".
    """
    plateau = Plateau(f"{OBSERVED}server/", metric, direction, factor, patience)
    inner = plateau.around(algorithm, moves=True)

    def step(server: Server, sums: Aggregate, round: Round) -> Server:
        new, n, share = inner.server(server, sums, round), round.layout.trainable, plateau(server)
        w, moved = server["w"][:n].double(), new["w"][:n].double()
        short = torch.lerp(w, moved, share)  # the bits of `moved` where nothing has fallen yet
        return new | {"w": torch.cat((short.to(new["w"].dtype), new["w"][n:]))}

    def metrics(server: Server, sums: Aggregate, round: Round) -> Metrics:
        told, share = dict(inner.metrics(server, sums, round)), float(plateau(server))
        if isinstance(lr := told.get("server/lr"), int | float):
            told["server/lr"] = share * lr
        return told | {"server/lr_factor": share}

    name = f"{algorithm.name}, server {plateau}"
    made = replace(inner, name=name, server=step, metrics=metrics)
    return made.promises(algorithm.privacy)


def clients_on_plateau(
    algorithm: Algorithm,
    metric: str,
    direction: str,
    factor: float = 0.1,
    patience: int = 10,
) -> Algorithm:
    """`algorithm`, whose clients' learning rate is multiplied by `factor` after each plateau.

    Arguments as in `server_on_plateau`; the product so far is told as "train/lr_factor".
    """
    if algorithm.rule.lr == 0:
        raise InputError(f"{algorithm.name}: its clients have no learning rate; its server has one")
    plateau = Plateau(f"{OBSERVED}clients/", metric, direction, factor, patience)
    inner = plateau.around(algorithm)

    def local(server: Server, rule: LocalRule) -> LocalRule:
        rule, share = inner.local(server, rule), float(plateau(server))
        return replace(rule, lr=times(rule.lr, share))

    def metrics(server: Server, sums: Aggregate, round: Round) -> Metrics:
        share = float(plateau(server))
        return {**inner.metrics(server, sums, round), "train/lr_factor": share}

    return replace(inner, name=f"{algorithm.name}, clients {plateau}", local=local, metrics=metrics)


def times(lr: float | Callable[[int], float], share: float) -> float | Callable[[int], float]:
    """A learning rate, or a function of the round that gives one, times `share`."""
    if not callable(lr):
        return lr * share
    by_round = lr
    return lambda round: by_round(round) * share


@dataclass(frozen=True)
class Plateau:
    """Counts values of a metric that are no better, in tensors whose names begin with `prefix`."""

    prefix: str
    metric: str
    direction: str
    factor: float
    patience: int

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str):
            raise InputError(f"a plateau's metric must be a name, not {self.metric!r}")
        if self.direction not in ("min", "max"):
            raise InputError(f"a plateau's direction must be min or max, not {self.direction!r}")
        if not 0 < self.factor < 1:
            raise InputError(f"a plateau's factor must be in (0, 1), not {self.factor}")
        if not (is_integer(self.patience) and self.patience >= 0):
            raise InputError(f"a plateau's patience must be 0, 1, 2, ..., not {self.patience!r}")

    def __str__(self) -> str:
        rule = f"{self.metric}:{self.direction}"
        return f"on plateau of {rule} ({float(self.factor)}, {self.patience})"

    def __call__(self, server: Server) -> Tensor:
        """What the learning rate is multiplied by, float64 []."""
        return server[f"{self.prefix}factor"]

    def around(self, algorithm: Algorithm, moves: bool = False) -> Algorithm:
        """`algorithm`, which carries the tensors and lets them see the metrics."""

        def init(w: Tensor, layout: Layout) -> Server:
            like = torch.zeros((), dtype=torch.float64, device=w.device)
            return self._tensors(like, 1.0, -self._sign * math.inf, 0)

        inner = carrying(algorithm, self.prefix, init, moves)

        def observe(server: Server, told: Metrics) -> Server:
            if inner.observe is not None:
                server = inner.observe(server, told)
            value = self._value(told)
            return server if value is None else server | self._look(server, value)

        return replace(inner, observe=observe)

    def _look(self, server: Server, value: float) -> Server:
        """The tensors after one more value of the metric."""
        factor, best, bad = (float(server[self.prefix + name]) for name in KEPT)
        if self._sign * value > self._sign * best:
            best, bad = value, 0.0
        else:
            bad += 1
        if bad > self.patience:
            factor, bad = factor * self.factor, 0.0
        return self._tensors(self(server), factor, best, bad)

    @property
    def _sign(self) -> int:
        return 1 if self.direction == "max" else -1

    def _tensors(self, like: Tensor, *values: float) -> Server:
        """The values of KEPT as tensors of the type of `like`, where that lies."""
        named = zip(KEPT, values, strict=True)
        return {self.prefix + name: torch.full_like(like, value) for name, value in named}

    def _value(self, told: Mapping[str, float | int | str]) -> float | None:
        """The metric's value, None where none of its group is told, or nobody came to have one."""
        value = told.get(self.metric)
        if isinstance(value, str):
            raise InputError(f"a plateau of {self.metric}: it is text, {value!r}, not a number")
        group = self.metric.rpartition("/")[0] + "/"
        if value is None and any(name.startswith(group) for name in told):
            near = ", ".join(get_close_matches(self.metric, told, 1, cutoff=0))
            raise InputError(f"a plateau of {self.metric}: no such metric; is it {near}?")
        if value is None or (math.isnan(value) and nobody_came(told)):
            return None
        return float(value)


def nobody_came(told: Metrics) -> bool:
    """Whether no client sent anything; models that diverged were sent, and dropped."""
    return told.get("train/clients") == 0 and not told.get("train/dropped_clients")
