"""What stands around an algorithm with tensors of its own in the server's state."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from vecfl.aggregate import Aggregate
from vecfl.algorithms.base import Algorithm, Metrics, Round, Server
from vecfl.errors import InputError
from vecfl.layout import Layout

MEAN = "ema/"  # the prefix of a mean of models, which has to see where w ends up
T = TypeVar("T")


def carrying(
    inner: Algorithm, prefix: str, init: Callable[[Tensor, Layout], Server], moves: bool = False
) -> Algorithm:
    """`inner`, whose functions do not see the tensors of names that begin with `prefix`.

    init   (w [P], Layout) -> these tensors, under their whole names; they stay as they are until
           another function changes them
    moves  whether the caller moves w behind `inner`: where that has an EMA it is an InputError,
           when the run begins, for the mean would be of models that the run never has
    """

    def rest(server: Server) -> Server:
        return others(prefix, server)

    def own(server: Server) -> Server:
        return named(prefix, part(prefix, server))

    def start(w: Tensor, layout: Layout) -> Server:
        server = inner.init(w, layout)
        if own(server):
            raise InputError(f"{inner.name}: {prefix.rstrip('/')} stands around it already")
        if moves and any(name.startswith(MEAN) for name in server):
            raise InputError(
                f"{inner.name}: give ema behind replay and server_on_plateau, in Python around "
                "them: ema(replay(...)); its mean would be of models that the run never has"
            )
        return server | init(w, layout)

    def step(server: Server, sums: Aggregate, round: Round) -> Server:
        return inner.server(rest(server), sums, round) | own(server)

    def observe(server: Server, told: Metrics) -> Server:
        assert inner.observe is not None
        return inner.observe(rest(server), told) | own(server)

    return (
        replace(
            inner,
            init=start,
            begin=lambda server, starting: inner.begin(rest(server), starting),
            upload=lambda server, done: inner.upload(rest(server), done),
            server=step,
            local=lambda server, rule: inner.local(rest(server), rule),
            model=lambda server: inner.model(rest(server)),
            metrics=lambda server, sums, round: inner.metrics(rest(server), sums, round),
            observe=None if inner.observe is None else observe,
        )
        .sends(inner.one_gradient)
        .promises(inner.privacy)
    )


def named(prefix: str, values: Mapping[str, T]) -> dict[str, T]:
    """The values under names with the prefix."""
    return {prefix + name: value for name, value in values.items()}


def part(prefix: str, values: Mapping[str, T]) -> dict[str, T]:
    """The values whose names have the prefix, without it."""
    return {n.removeprefix(prefix): value for n, value in values.items() if n.startswith(prefix)}


def others(prefix: str, values: Mapping[str, T]) -> dict[str, T]:
    """The values whose names do not have the prefix."""
    return {name: value for name, value in values.items() if not name.startswith(prefix)}


def refuse_delays(inner: Algorithm, name: str) -> None:
    """InputError around `delayed`, outside of which nobody knows when the server steps."""
    if inner.delay is not None:
        raise InputError(f"{inner.name}: {name} first, and let delayed stand around it")
