"""The checkpoints of a recorded run: when they are due, what they hold, how to go on from one."""

import logging
from pathlib import Path
from typing import Any

import torch

from vecfl.checkpoint import path_of, prune, rounds_in, save
from vecfl.errors import InputError
from vecfl.files import reached
from vecfl.flags import RunArgs
from vecfl.model_file import save_model
from vecfl.parts import plateau_metrics
from vecfl.processes import WorkerLost
from vecfl.resume import CHECKPOINTS, FIRST
from vecfl.simulation import Metrics, Simulation
from vecfl.state import State
from vecfl.stop import Stop
from vecfl.track import Jsonl
from vecfl.watch import Watch, check_spelling

log = logging.getLogger("vecfl")


class Keeper:
    """Saves the checkpoints of a run, on rank 0: `about` is what they hold beside its state.

    saved    the round of the last one that the disk has, -1 for none
    stopped  why the run is over before its last round, None while it is not
    last     the last round that --stop-at-epsilon allows, None where that is all of them
    """

    def __init__(
        self, sim: Simulation, args: RunArgs, run_dir: Path, about: dict[str, Any], saved: int = -1
    ) -> None:
        self.sim, self.args, self.run_dir, self.saved = sim, args, run_dir, saved
        self.about = about | {"torch": str(torch.__version__), "ranks": sim.mesh.size}
        self.rows: Jsonl | None = None  # of the rounds; on the disk before a checkpoint is
        self.watch = Watch(args.watch, args.fall_back) if args.watch else None
        self.stop = Stop.of(args)
        self.stopped: str | None = None
        self.last: int | None = None

    def go_on(self, content: dict[str, Any], state: State) -> None:
        """Know the best round again, and whether the run is over."""
        self.stopped = self.stop.before(content.get("stopped"))
        if self.watch is not None:
            self.watch.load(content["watch"], state.server)
        if content["torch"] != self.about["torch"]:
            log.warning("begun with torch %s: other bits may come", content["torch"])
        if content["ranks"] != self.about["ranks"] and not self.args.exact_sums:
            log.warning("begun with %d ranks: other last bits may come", content["ranks"])

    def allow(self, state: State) -> None:
        """Find out how far --stop-at-epsilon lets the run go, once, before its rounds."""
        limit, left = self.args.stop_at_epsilon, self.args.rounds - state.round
        self._forecast(state, left)
        if limit is None or self.stopped is not None or not left:
            return
        more = self.sim.releases.affordable(state, limit, left)
        if more < left:
            self.last = state.round + more
            log.info("--stop-at-epsilon %g: round %d is the last", limit, self.last)
        if not more:
            self.stopped = self._spent(state)

    def _forecast(self, state: State, left: int) -> None:
        """Tell what a run that goes on has spent, and will; InputError for more than --epsilon."""
        after = self.sim.releases.after_more(state, left)
        if after is None or not state.round:
            return
        log.info("privacy: epsilon %.4g after all rounds, those before included", after)
        if self.args.epsilon is not None and after > 1.001 * self.args.epsilon:
            raise InputError(
                f"--epsilon: with the {state.round} rounds that were played otherwise all of them "
                f"spend {after:.4g}; give --noise-multiplier, and --stop-at-epsilon beside it"
            )

    def _spent(self, state: State) -> str:
        """Why a run is over that may spend no more."""
        told, limit = self.sim.releases.told(state, exact=True), self.args.stop_at_epsilon
        spent, delta = float(told["privacy/epsilon"]), float(told["privacy/delta"])
        what = f"epsilon {spent:.4g} at delta {delta:.3g}"
        if spent > float(limit or 0):
            return f"after round {state.round}: {what}, more than {limit:g}, is spent already"
        return f"after round {state.round}: {what}; one more round would spend more than {limit:g}"

    def look(self, state: State, metrics: Metrics, evaluated: bool) -> tuple[State, bool]:
        """The state to go on from, and whether it is to be saved: see `Watch.look`."""
        due, best = state.round % self.args.checkpoint_every == 0, False
        if state.round == 0:
            self._check_spelling(metrics)
        if self.watch is not None or self.args.stop_at is not None:
            metrics = self.sim.mesh.from_first(lambda: metrics)  # times differ, and ranks must not
        if self.watch is not None:
            state, best = self.watch.look(state, metrics, evaluated)
        if state.round:  # the first model is there to be trained
            self.stopped = self.stop.why(state.round, metrics, evaluated, self.watch)
            if self.stopped is None and state.round == self.last:
                self.stopped = self._spent(state)
        return state, due or best

    def _check_spelling(self, metrics: Metrics) -> None:
        """InputError, with the flag, for a metric that no evaluation of the first model has."""
        if self.watch is not None:
            check_spelling(self.watch.metric, metrics, "--watch")
        if self.stop.at is not None:
            check_spelling(self.stop.metric, metrics, "--stop-at")
        for metric in plateau_metrics(self.args.around):
            check_spelling(metric, metrics, "--around")

    def save(self, state: State) -> None:
        """Save a checkpoint; where that fails the last one stays, and a warning says so.

        All ranks call it: each has rows of the table to bring to the disk.
        """
        folder = self.run_dir / CHECKPOINTS
        try:
            run = self.sim.save(state)
        except OSError as error:
            self._warn(state, error)
            return
        if self.sim.mesh.rank == 0:
            self._write(state, run, folder)
        else:
            self.saved = state.round
        if state.table is not None:
            oldest = self.sim.mesh.from_first(lambda: min(rounds_in(folder), default=0))
            state.table.checkpointed(oldest)

    def _write(self, state: State, run: dict[str, Any], folder: Path) -> None:
        if self.rows is not None:
            self.rows.sync()
        watch = self.watch
        content = self.about | {"run": run, "watch": watch.save() if watch else None}
        content["stopped"] = self.stop.save(self.stopped)
        try:
            save(path_of(folder, state.round), content)
            self.saved = state.round
            prune(folder, self.args.keep, watch.round if watch else None)
            reached("checkpoint pruned")
        except OSError as error:
            self._warn(state, error)

    def _warn(self, state: State, error: OSError) -> None:
        if self.sim.mesh.rank == 0:
            what = "round %d is not saved: %s; free some space, the run goes on"
            log.warning(what, state.round, reason(error))

    def where(self, state: State) -> str:
        """How far the run is, and how to go on with it."""
        so_far = f"after round {state.round} of {self.args.rounds}, not finished; to go on"
        if self.saved < 0:
            return f"{so_far}, start again: no checkpoint could be saved in {self.run_dir}"
        if self.saved < state.round:
            so_far += f" after round {self.saved}"
        return f"{so_far}: the same command with --resume {self.run_dir}"

    def ended(self, error: OSError | WorkerLost, state: State) -> InputError | WorkerLost:
        """What ends the run, with how to go on."""
        if isinstance(error, WorkerLost):
            return WorkerLost(f"{error}; stopped {self.where(state)}")
        return InputError(f"{reason(error)}; stopped {self.where(state)}")


def keep_first(sim: Simulation, run_dir: Path) -> None:
    """Write the first model, once, where it has what never changes and no checkpoint holds."""
    if not sim.task.layout.constants:
        return
    try:
        save_model(run_dir / FIRST, sim.task.module.state_dict())
    except OSError as error:
        raise InputError(f"{reason(error)}; free some space and start again") from error


def reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}"
