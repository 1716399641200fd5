"""What the rounds of a run have released, and what that costs."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vecfl.algorithms.base import Algorithm
from vecfl.errors import InputError
from vecfl.privacy.accountant import COARSE, FINE, epsilon
from vecfl.privacy.events import PASSES, Event, ExamplePrivacy, Ledger, Privacy, spend
from vecfl.state import State

SMALL = 0.1  # an epsilon below which the coarse one is too far above it


@dataclass(frozen=True)
class Releases:
    """What each round of a run releases under its algorithm's promise; None where it has none.

    examples  what clients promise about single examples
    """

    promise: Privacy | None = None
    event: Event | None = None
    examples: ExamplePrivacy | None = None

    def after(self, ledger: Ledger) -> Ledger:
        """The ledger after one more round."""
        return ledger if self.event is None else spend(ledger, self.event)

    def require_alike(self, ledger: Ledger) -> None:
        """InputError where one more round could not be accounted with those of a ledger."""
        if self.promise is not None:
            after = self.after(ledger)
            epsilon(after, self.promise.delta, accountant=self.promise.accountant, step=COARSE)

    def told(self, state: State, *, exact: bool = False) -> dict[str, float | str]:
        """What a state's rounds have spent; nothing without a promise.

        `privacy/epsilon`, `privacy/delta`, `privacy/noise_multiplier`, and `privacy/neighbours`:
        which populations are told apart no better than that. Epsilon is inf where the ledger has
        not all rounds, for some were played without the promise. Of examples
        `privacy/example_epsilon`, the largest of any client, and `privacy/example_delta`.

        exact  the last figure; else a little above it, in a tenth of a second
        """
        told, promise = dict[str, float | str](), self.promise
        if self.examples is not None:
            told["privacy/example_epsilon"] = example_cost(self.examples, int(passes(state).max()))
            told["privacy/example_delta"] = self.examples.delta
        if promise is None or self.event is None:
            return told
        found = self._spent(state, 0, FINE if exact else COARSE)
        if not exact and found < SMALL:
            found = self._spent(state, 0, FINE)
        return told | {
            "privacy/epsilon": found,
            "privacy/delta": promise.delta,
            "privacy/noise_multiplier": promise.multiplier,
            "privacy/neighbours": self.event.sampling.relation,
        }

    def after_more(self, state: State, more: int) -> float | None:
        """Epsilon of a state's rounds and of `more` of them, coarse; None without a promise."""
        return None if self.promise is None else self._spent(state, more, COARSE)

    def affordable(self, state: State, limit: float, most: int) -> int:
        """How many of the next rounds, at most `most`, spend no more than epsilon `limit` in all.

        By halves with the coarse epsilon; from there on with the one that is told at the end.
        """
        low, high = -1, most + 1  # -1 and `most` + 1: not tried
        if self._spent(state, most, COARSE) <= limit:
            low = most
        while high - low > 1:
            middle = (low + high) // 2
            if self._spent(state, middle, COARSE) <= limit:
                low = middle
            else:
                high = middle
        low = max(low, 0)
        while low < most and self._spent(state, low + 1, FINE) <= limit:
            low += 1
        while low and self._spent(state, low, FINE) > limit:
            low -= 1
        return low

    def _spent(self, state: State, more: int, step: float) -> float:
        """Epsilon of a state's rounds and of `more` of them."""
        promise, event, ledger = self.promise, self.event, state.ledger
        if promise is None or event is None:
            return 0.0
        if sum(event.times for event in ledger) < state.round:
            return math.inf
        if more:
            ledger = spend(ledger, replace(event, times=more))
        return epsilon(ledger, promise.delta, accountant=promise.accountant, step=step)

    @property
    def settings(self) -> dict[str, object]:
        """What a dashboard shows of the promise beside the settings of a run."""
        promise = self.promise
        if promise is None:
            return {}
        return {"noise_multiplier": promise.multiplier, "delta": promise.delta}

    @property
    def label(self) -> str:
        """What the name of a run has behind it where its noise is that of another population."""
        of = None if self.promise is None else self.promise.stands_for
        return "" if of is None else f"-as-of-{of.clients}"


def passes(state: State) -> Tensor:
    """The passes over its examples that each client has begun, int64 [N]."""
    assert state.table is not None
    return state.table.column(PASSES).long()


def example_cost(examples: ExamplePrivacy, passes: int) -> float:
    """Epsilon of so many passes."""
    ledger, delta = examples.after(passes), examples.delta
    found = epsilon(ledger, delta, step=COARSE)
    return found if found >= SMALL else epsilon(ledger, delta, step=FINE)


def example_epsilon(algorithm: Algorithm, state: State) -> Tensor:
    """Epsilon of every client's examples after the rounds of a state, float64 [N].

    It is at the delta of `vecfl.dp_sgd`, and 0 for a client that has not trained. InputError for
    an algorithm without `dp_sgd`.
    """
    if (examples := algorithm.examples) is None:
        raise InputError(f"{algorithm.name}: promises nothing about examples; use dp_sgd")
    counts, where = passes(state).unique(return_inverse=True)
    found = [example_cost(examples, n) for n in counts.tolist()]
    return torch.tensor(found, dtype=torch.float64)[where]
