"""What a recorded run measures between its rounds: which evaluations, how often, and how long."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vecfl.data import FederatedDataset, hold_out
from vecfl.errors import InputError, is_integer
from vecfl.files import reached
from vecfl.releases import Releases
from vecfl.simulation import Metrics, Simulation
from vecfl.state import State

Evaluate = Callable[[State], Metrics]


@dataclass
class EvaluationArgs:
    """What is measured in a run, and how often."""

    eval_every: int = 1
    """rounds from one evaluation to the next; the last round is always evaluated"""
    test_every: int | None = None
    """rounds from one test to the next, with --validation; --eval-every if not given"""
    validation: float = 0.0
    """share of the training data that is held out and evaluated as validation/..."""
    initial_evaluation: bool = True
    """evaluate the first model, too: as round 0, before any training"""
    client_results: bool = False
    """write what each client came to in each evaluation: clients/round-000010.csv"""
    statistics: int = 0
    """clients of a round whose updates are compared with the mean, as update/...; 0 for none"""
    profile: bool = False
    """print where the time of rounds 2 and 3 went, and write a trace of round 4: trace.json"""


@dataclass(frozen=True)
class Evaluation:
    """A function of the state that gives metrics, called every `every` rounds and after the last.

    The first model is evaluated with all of them, as round 0. InputError for no whole number of
    rounds.
    """

    function: Evaluate
    every: int

    def __post_init__(self) -> None:
        if not is_integer(self.every) or self.every < 1:
            raise InputError(f"Evaluation(every={self.every!r}): expected rounds, at least 1")


class Evaluations:
    """Calls what is due after a round; the parts of a run's time that no round tells of.

    releases  of a private run, whose epsilon is told with each evaluation, and exact with the last
    """

    def __init__(
        self,
        evaluate: Evaluate | Sequence[Evaluation],
        every: int,
        rounds: int,
        releases: Releases = Releases(),  # noqa: B008
    ) -> None:
        self.releases = releases
        self.all = (
            list(evaluate) if isinstance(evaluate, Sequence) else [Evaluation(evaluate, every)]
        )
        self.rounds, self.ended = rounds, time.perf_counter()

    def __call__(self, state: State, metrics: Metrics) -> tuple[Metrics, bool]:
        """`metrics` of the round and of what is due after it, and whether that was everything.

        InputError where two evaluations call a metric the same.
        """
        idle = time.perf_counter() - self.ended - float(metrics.get("system/round_s", 0))
        due, last = self._due(state), state.round == self.rounds
        told = {**metrics, "system/housekeeping_s": idle}
        found = self._with(state, told, self.all if last else due)
        if last or due:
            found |= self.releases.told(state, exact=last)
        return found, last or due == self.all

    def last(self, state: State, metrics: Metrics, evaluated: bool) -> Metrics:
        """`metrics` with what was not due: the run ends early, and its model is evaluated whole."""
        due = self.all if evaluated else self._due(state)
        found = self._with(state, metrics, [one for one in self.all if one not in due])
        return found | self.releases.told(state, exact=True)

    def _due(self, state: State) -> list[Evaluation]:
        return [one for one in self.all if state.round % one.every == 0]

    def _with(self, state: State, metrics: Metrics, due: list[Evaluation]) -> Metrics:
        began, told = time.perf_counter(), dict(metrics)
        for one in due:
            found = one.function(state)
            if both := sorted(told.keys() & found.keys()):
                raise InputError(f"two evaluations give {both[0]}; give one another name=...")
            told |= found
        self.ended = time.perf_counter()
        if due:
            before = float(told.get("system/evaluate_s", 0))
            told["system/evaluate_s"] = before + self.ended - began
            reached("round evaluated")
        return told


def held_out(
    args: EvaluationArgs, train: FederatedDataset, seed: int, clients: bool = False
) -> tuple[FederatedDataset, FederatedDataset | None]:
    """Training data without --validation, and the held-out part, None where nothing is.

    It is a share of each client's examples, or of the `clients`. InputError with the flag's name.
    """
    if not args.validation:
        if args.test_every is not None:
            raise InputError("--test-every: needs --validation, a part of its own to evaluate")
        return train, None
    try:
        share = {"clients": args.validation} if clients else {"samples": args.validation}
        split = hold_out(train, seed, **share)
    except InputError as error:
        raise InputError(f"--validation: {error}") from error
    return split.train, split.test_clients if clients else split.test_samples


def validated(
    sim: Simulation, args: EvaluationArgs, validation: FederatedDataset | None, test: Evaluate
) -> Evaluate | list[Evaluation]:
    """`test`, every --eval-every rounds; with validation data that often they, and --test-every
    rounds the test."""
    if validation is None:
        return test
    columns = validation.columns
    return [
        Evaluation(lambda state: sim.evaluate(state, columns, "validation"), args.eval_every),
        Evaluation(test, args.test_every or args.eval_every),
    ]
