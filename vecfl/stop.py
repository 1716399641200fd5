"""When a run is over before its last round: at a target, or where nothing gets better."""

import math
import re
from collections.abc import Mapping
from typing import Any

from vecfl.errors import InputError
from vecfl.simulation import Metrics
from vecfl.watch import Watch, value_of

RULE = re.compile(r"([^<>=\s]+)\s*(<=|>=)\s*([^<>=\s]+)")


class Stop:
    """Two rules, looked at in each row that has their metric; None: there is no such rule.

    at        "eval/accuracy>=0.97" or "eval/loss<=0.1": a metric and the value that is enough
    patience  values in a row, of the metric that is watched, that are no better
    epsilon   that no round may exceed, a rule that `vecfl.keeper` looks at
    """

    def __init__(
        self, at: str | None, patience: int | None, watch: str | None, epsilon: float | None = None
    ) -> None:
        self.rules: list[str | float | None] = [
            at,
            patience,
            watch if patience is not None else None,
        ]
        self.rules += [] if epsilon is None else [epsilon]  # older checkpoints have no such rule
        self.at, self.patience = at, patience
        if at is None:
            return
        parts = RULE.fullmatch(at.strip())
        try:
            metric, sign, value = parts.groups() if parts else ("", "", "nan")
            self.metric, self.sign, self.value = metric, sign, float(value)
        except ValueError:
            self.value = math.nan
        if math.isnan(self.value):
            raise InputError(f"--stop-at: expected METRIC>=VALUE or METRIC<=VALUE, got {at}")

    @classmethod
    def of(cls, args: Any) -> "Stop":
        """The rules that flags give (`vecfl.flags.RunArgs`)."""
        return cls(args.stop_at, args.patience, args.watch, args.stop_at_epsilon)

    def why(self, round: int, metrics: Metrics, evaluated: bool, watch: Watch | None) -> str | None:
        """Why the run ends after a round; None: it goes on.

        Raises InputError where everything was evaluated and the target's metric is missing.
        """
        if self.at is not None:
            found = value_of(self.metric, metrics, evaluated, "--stop-at")
            if found is not None and self._reached(found):
                said = f"{self.metric} {found:g} {self.sign} {self.value:g}"
                return f"after round {round}: {said}"
        if self.patience is None or watch is None or watch.metric not in metrics:
            return None
        if watch.waited >= self.patience:
            best = "none that is a number"
            if watch.round is not None:
                best = f"the best is {watch.value:g} of round {watch.round}"
            waited = f"{watch.waited} evaluation{'s' * (watch.waited > 1)}"
            return f"after round {round}: {waited} without a better {watch.metric}, {best}"
        return None

    def _reached(self, found: float) -> bool:
        return found >= self.value if self.sign == ">=" else found <= self.value

    def save(self, why: str | None) -> dict[str, Any] | None:
        """What a checkpoint holds of a run that was stopped by these rules."""
        return None if why is None else {"rules": self.rules, "why": why}

    def before(self, kept: Mapping[str, Any] | None) -> str | None:
        """Why the run of a checkpoint was stopped, where it was by these same rules."""
        return kept["why"] if kept is not None and kept["rules"] == self.rules else None
