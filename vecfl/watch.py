"""The best model of a run by a metric, and the fall back to it after a failed validation."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch

from vecfl.algorithms.base import OBSERVED, Server
from vecfl.errors import InputError
from vecfl.evaluate import OF_ROUNDS
from vecfl.simulation import Metrics
from vecfl.state import State

log = logging.getLogger("vecfl")
SIGN = {"max": 1, "min": -1}


class Watch:
    """Which round has the best value of a metric.

    rule       "eval/loss:min" or "eval/accuracy:max": the metric, and which values are better
    fall_back  where a round's value is worse than the best one, or NaN, the next round starts from
               the server's tensors of the best round, the model and the optimizer's; as many
               rounds have passed as before, so that other clients train with other draws. An equal
               value is no reason for it. What the algorithm learned from metrics, such as a
               learning rate that fell, stays.

    waited  values since the best one
    """

    def __init__(self, rule: str, fall_back: bool = False) -> None:
        self.metric, _, direction = rule.rpartition(":")
        if not self.metric or direction not in SIGN:
            raise InputError(f"--watch: expected METRIC:min or METRIC:max, got {rule}")
        self.rule, self.fall_back, self.sign = rule, fall_back, SIGN[direction]
        self.round: int | None = None
        self.value = math.nan
        self.server: Server | None = None
        self.waited = 0

    def look(self, state: State, metrics: Metrics, evaluated: bool) -> tuple[State, bool]:
        """The state that the next round starts from, and whether this round's is the best so far.

        Rounds without the metric change nothing. Raises InputError where it is missing and
        everything was evaluated.
        """
        found = value_of(self.metric, metrics, evaluated, "--watch")
        if found is None:
            return state, False
        value = self.sign * found
        if value > self.sign * self.value or (self.round is None and value == value):
            self.round, self.value, self.waited = state.round, found, 0
            self.server = state.server if self.fall_back else None
            return state, True
        self.waited += 1
        if self.server is not None and not value >= self.sign * self.value:
            said = "round %d: %s %g is worse than %g: back to the model of round %d"
            log.info(said, state.round, self.metric, self.sign * value, self.value, self.round)
            state = replace(state, server=self.server | learned(state.server))
        return state, False

    def back_at(self, state: State) -> int | None:
        """The best round, where the server's tensors of `state` are those of it again."""
        if self.server is None or state.round == self.round:
            return None
        own = {n: t for n, t in self.server.items() if not n.startswith(OBSERVED)}
        same = all(torch.equal(t, state.server[name]) for name, t in own.items())
        return self.round if same else None

    def save(self) -> dict[str, Any]:
        """What `load` needs; the best round's tensors where it may be fallen back to."""
        names = ("rule", "round", "value", "waited")
        kept = {name: getattr(self, name) for name in names}
        if self.server is None:
            return kept
        return kept | {"server": {name: value.cpu() for name, value in self.server.items()}}

    def load(self, kept: Mapping[str, Any] | None, now: Server) -> None:
        """Go on from what was saved, unless the rule is another; `now` says on which device."""
        if kept is None or kept["rule"] != self.rule or (self.fall_back and "server" not in kept):
            return
        self.round, self.value, self.waited = kept["round"], kept["value"], kept.get("waited", 0)
        if self.fall_back:
            self.server = {name: t.to(now[name].device) for name, t in kept["server"].items()}


def check_spelling(metric: str, metrics: Metrics, flag: str) -> None:
    """InputError where a metric that `flag` names is misspelt, as far as first evaluations tell.

    Metrics of rounds are not known yet: another name is taken for one of these.
    """
    group = metric.partition("/")[0]
    if metric in metrics or group in OF_ROUNDS:
        return
    same = any(name.startswith(f"{group}/") for name in metrics)
    near = get_close_matches(metric, metrics, 1, cutoff=0 if same else 0.8)
    if near:
        raise InputError(f"{flag}: no metric {metric} in this run; is it {near[0]}?")


def learned(server: Server) -> Server:
    """The tensors that the algorithm made of metrics."""
    return {name: t for name, t in server.items() if name.startswith(OBSERVED)}


def value_of(metric: str, metrics: Metrics, evaluated: bool, flag: str) -> float | None:
    """The value of a metric that `flag` names, None in a round without it.

    Raises InputError where an evaluation lacks it, with the nearest, and where it is text.
    """
    found = metrics.get(metric)
    if isinstance(found, str):
        raise InputError(f"{flag}: {metric} is text, {found!r}; expected a number")
    if found is None and evaluated:
        near = ", ".join(get_close_matches(metric, metrics, 1, cutoff=0))
        raise InputError(f"{flag}: no metric {metric} in this run; is it {near}?")
    return None if found is None else float(found)
