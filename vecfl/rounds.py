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

    Where the number of the round is a multiple of `evaluate_every`, and after the last one, the
    model is evaluated on `test` (columns [n, ...], if given) and on the clients, and of a private
    algorithm epsilon is told, exact after the last round. So two calls have the evaluations of one,
    and one after the last round of the first call: a plateau sees it, too.
    """
    if rounds < 1 or evaluate_every < 1:
        raise InputError(f"rounds={rounds}, evaluate_every={evaluate_every}: both at least 1")
    state = state or sim.start()
    trackers = list(trackers)
    last = state.round + rounds
    while state.round < last:
        state, metrics = sim.round(state)
        if state.round % evaluate_every == 0 or state.round == last:
            metrics |= sim.evaluate_clients(state) | (sim.evaluate(state, test) if test else {})
            metrics |= sim.releases.told(state, exact=state.round == last)
        state = sim.observe(state, metrics)
        for tracker in trackers:
            tracker.log(metrics)
    return state
