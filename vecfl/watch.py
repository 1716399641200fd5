"""The best model of a run by a metric, and the fall back to it after a failed validation."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch

from vecfl.algorithms.base import Server
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
               value is no reason for it.
    """

    def __init__(self, rule: str, fall_back: bool = False) -> None:
        self.metric, _, direction = rule.rpartition(":")
        if not self.metric or direction not in SIGN:
            raise InputError(f"--watch: expected METRIC:min or METRIC:max, got {rule}")
        self.rule, self.fall_back, self.sign = rule, fall_back, SIGN[direction]
        self.round: int | None = None
        self.value = math.nan
        self.server: Server | None = None

    def look(self, state: State, metrics: Metrics, evaluated: bool) -> tuple[State, bool]:
        """The state that the next round starts from, and whether this round's is the best so far.

        Rounds without the metric change nothing. Raises InputError where an evaluation lacks it.
        """
        found = metrics.get(self.metric)
        if isinstance(found, str):
            raise InputError(f"--watch: {self.metric} is text, {found!r}; expected a number")
        if found is None:
            if evaluated:
                self._refuse(metrics, cutoff=0)
            return state, False
        value = self.sign * float(found)
        if value > self.sign * self.value or (self.round is None and value == value):
            self.round, self.value = state.round, float(metrics[self.metric])
            self.server = state.server if self.fall_back else None
            return state, True
        if self.server is not None and not value >= self.sign * self.value:
            said = "round %d: %s %g is worse than %g: back to the model of round %d"
            log.info(said, state.round, self.metric, self.sign * value, self.value, self.round)
            state = replace(state, server=self.server)
        return state, False

    def check(self, metrics: Metrics) -> None:
        """InputError where the metric is misspelt, as far as the first evaluations tell.

        Metrics of rounds are not known yet: another name is taken for one of these.
        """
        group = self.metric.partition("/")[0]
        if self.metric not in metrics and group not in OF_ROUNDS:
            same = any(name.startswith(f"{group}/") for name in metrics)
            self._refuse(metrics, cutoff=0 if same else 0.8)

    def _refuse(self, metrics: Metrics, cutoff: float) -> None:
        """InputError with the metric that comes nearest, if one does."""
        near = get_close_matches(self.metric, metrics, 1, cutoff=cutoff)
        if near or not cutoff:
            what = f"--watch: no metric {self.metric} in this run; is it {', '.join(near)}?"
            raise InputError(what)

    def back_at(self, state: State) -> int | None:
        """The best round, where the server's tensors of `state` are those of it again."""
        if self.server is None or state.round == self.round:
            return None
        same = all(torch.equal(t, state.server[name]) for name, t in self.server.items())
        return self.round if same else None

    def save(self) -> dict[str, Any]:
        """What `load` needs; the best round's tensors where it may be fallen back to."""
        kept = {"rule": self.rule, "round": self.round, "value": self.value}
        if self.server is None:
            return kept
        return kept | {"server": {name: value.cpu() for name, value in self.server.items()}}

    def load(self, kept: Mapping[str, Any] | None, now: Server) -> None:
        """Go on from what was saved, unless the rule is another; `now` says on which device."""
        if kept is None or kept["rule"] != self.rule or (self.fall_back and "server" not in kept):
            return
        self.round, self.value = kept["round"], kept["value"]
        if self.fall_back:
            self.server = {name: t.to(now[name].device) for name, t in kept["server"].items()}
