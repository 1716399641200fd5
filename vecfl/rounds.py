"""Rounds in one call, without a directory."""

from collections.abc import Iterable

from vecfl.errors import InputError
from vecfl.losses import Batch
from vecfl.simulation import Simulation
from vecfl.state import State
from vecfl.track import Tracker


def run(
    sim: Simulation,
    rounds: int,
    *,
    test: Batch | None = None,
    trackers: Iterable[Tracker] = (),
    evaluate_every: int = 1,
    state: State | None = None,
) -> State:
    """`rounds` rounds in one call.

    Every `evaluate_every` rounds, and after the last, the model is evaluated on `test` (columns
    [n, ...], if given) and on the clients.
    """
    if rounds < 1 or evaluate_every < 1:
        raise InputError(f"rounds={rounds}, evaluate_every={evaluate_every}: both at least 1")
    state = state or sim.start()
    trackers = list(trackers)
    for i in range(1, rounds + 1):
        state, metrics = sim.round(state)
        if i % evaluate_every == 0 or i == rounds:
            metrics |= sim.evaluate_clients(state) | (sim.evaluate(state, test) if test else {})
        state = sim.observe(state, metrics)
        for tracker in trackers:
            tracker.log(metrics)
    return state
