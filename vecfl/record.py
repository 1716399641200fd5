"""A run with a directory of its own: what the recipes do between the first round and the last."""

import logging
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import current_thread, main_thread
from traceback import format_exc
from typing import Any

from vecfl.errors import InputError
from vecfl.evaluations import Evaluate, Evaluation, Evaluations
from vecfl.files import reached
from vecfl.finish import finish, told
from vecfl.flags import RunArgs
from vecfl.keeper import Keeper, keep_first
from vecfl.mesh import RankError
from vecfl.model_file import SAFE
from vecfl.plugins import digests
from vecfl.processes import WorkerLost
from vecfl.profile import Profile
from vecfl.resume import CHECKPOINTS, FIRST, TABLE, Before, check_observed, go_on, settings
from vecfl.signals import Signals, Stopped
from vecfl.simulation import Simulation
from vecfl.state import State
from vecfl.stop import Stop
from vecfl.table import LARGE
from vecfl.track import (
    Console,
    Jsonl,
    Tracker,
    Wandb,
    create_run_dir,
    letting_go,
    new_id,
    write_clients,
)

log = logging.getLogger("vecfl")


def record_run(
    sim: Simulation,
    evaluate: Evaluate | Sequence[Evaluation],
    args: RunArgs,
    *,
    recipe: str,
    before: Before | None,
) -> None:
    """The rounds of `args` into a run directory: metrics, checkpoints, model, curves.

    `before` is the run to go on with (`vecfl.resume.resume`), None for a new one in `args.out` or
    a dated directory. `evaluate` is called every `args.eval_every` rounds and after the last, or
    it is several evaluations with periods of their own; before round 1 all are called, unless
    `args.initial_evaluation` says no: that is the row of round 0.
    Progress goes to stderr, the summary to stdout. Raises Stopped after SIGINT or SIGTERM, and
    InputError for a full disk: their line says how to go on. Of several ranks the first writes and
    prints; what any of them raises is in `error.log`.
    """
    if args.fall_back and sim.tables.shapes:
        raise InputError(
            f"--fall-back: clients of {sim.algorithm.name} keep rows between rounds, which do not "
            "go back with the model; give --watch alone"
        )
    if args.fall_back and sim.algorithm.delay is not None:
        why = "messages that have arrived since would arrive again"
        raise InputError(f"--fall-back: {why}; give --watch alone")
    config, first = settings(args, sim.arrangement), sim.mesh.rank == 0
    if before is not None and sim.algorithm.observe is not None:
        sim.mesh.from_first(partial(check_observed, before, args))
    if before is None:
        keeper, state = begin(sim, args, config, recipe)
    elif finished(sim, args, before):
        return
    else:
        keeper, state = begin_again(sim, args, config, before)
    keeper.allow(state)
    run_dir = keeper.run_dir
    track, id = args.track if first else "none", keeper.about["id"]
    with (
        letting_go(run_dir),
        failures(run_dir, sim.mesh.rank, sim.mesh.size),
        Wandb(run_dir, config | sim.releases.settings, group=recipe, track=track, id=id) as board,
    ):
        if args.client_results and first:
            sim.tell = lambda name, at, found: write_clients(run_dir, name, at.round, found)
        evaluations = Evaluations(evaluate, args.eval_every, args.rounds, sim.releases)
        state = run_rounds(sim, state, evaluations, args, keeper, board)
        if first:
            finish(sim, state, args.safetensors, keeper)
            board.log_image("curves", run_dir / "curves.png")


def begin(
    sim: Simulation, args: RunArgs, config: dict[str, Any], recipe: str
) -> tuple[Keeper, State]:
    """A new run: its directory, the first state, and that on the disk."""
    if sim.tables.folder is not None and Path(sim.tables.folder).exists():
        sim.mesh.from_first(partial(sim.tables.check, 0, None))  # before a directory is made
    name = recipe + sim.releases.label
    run_dir = sim.mesh.from_first(partial(create_run_dir, args.out, name, config))
    place_rows(sim, run_dir)
    state = sim.start()
    about = {"config": config, "recipe": recipe, "id": new_id(), "files": digests(config)}
    keeper = Keeper(sim, args, run_dir, about)
    sim.mesh.from_first(partial(keep_first, sim, run_dir))
    if sim.mesh.rank == 0:
        (run_dir / CHECKPOINTS).mkdir()
    keeper.save(state)
    return keeper, state


def finished(sim: Simulation, args: RunArgs, before: Before) -> bool:
    """Whether the run is over and all results are there; then its summary is printed."""
    stopped = Stop.of(args).before(before.content.get("stopped"))
    results = ["model.pt", "curves.png", *([f"model{SAFE}"] if args.safetensors else [])]
    there = sim.mesh.from_first(lambda: all((before.run_dir / name).exists() for name in results))
    if (before.content["run"]["round"] != args.rounds and stopped is None) or not there:
        return False
    log.info("%s is finished: nothing to do", before.run_dir)
    if sim.mesh.rank == 0:
        print(told(before.run_dir, stopped))
    with letting_go(before.run_dir):
        return True


def begin_again(
    sim: Simulation, args: RunArgs, config: dict[str, Any], before: Before
) -> tuple[Keeper, State]:
    """A run that is gone on with; what would be refused is refused before anything is changed.

    Later checkpoints go before the rows of clients go back: no checkpoint may be left that nothing
    leads to.
    """
    run, content = before.content["run"], before.content
    place_rows(sim, before.run_dir)
    sim.check(run, changed=args.resume_changed)
    if args.init in (None, str(before.run_dir / FIRST)):
        config = config | {"init": content["config"]["init"]}  # which is not read again
    about = {name: content[name] for name in ("recipe", "id")}
    about |= {"config": config, "files": digests(config)}
    keeper = Keeper(sim, args, before.run_dir, about, run["round"])
    sim.mesh.from_first(partial(go_on, before, config))
    if args.resume_changed:
        sim.mesh.from_first(partial(keep_first, sim, before.run_dir))
    state = sim.load(run, changed=args.resume_changed)
    keeper.go_on(content, state)
    return keeper, state


def place_rows(sim: Simulation, run_dir: Path) -> None:
    """Let clients' rows lie in the run's directory: many, or of several ranks, or there already."""
    tables, folder = sim.tables, run_dir / TABLE
    if not tables.shapes or tables.folder is not None:
        return
    if tables.bytes > LARGE or sim.mesh.size > 1 or folder.exists():
        tables.folder, size = folder, tables.bytes / (1 << 30)
        if sim.mesh.rank == 0:
            what = "what clients keep between rounds lies in %s: up to %.2f GiB"
            log.info(what, folder, size)


@contextmanager
def failures(run_dir: Path, rank: int, ranks: int) -> Iterator[None]:
    """An exception that ends a rank is written to `error.log`, if the directory is in reach."""
    try:
        yield
    except Exception as error:
        if ranks > 1 and current_thread() is main_thread():
            # A launcher sends it to all when one has ended; what is left to do is to say why.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        what = f"{error}\n" if isinstance(error, (RankError, InputError)) else format_exc()
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}, rank {rank}: {what}"
        with suppress(OSError), (run_dir / "error.log").open("a") as file:
            file.write(text)
        raise


def run_rounds(
    sim: Simulation,
    state: State,
    evaluate: Evaluations,
    args: RunArgs,
    keeper: Keeper,
    board: Wandb,
) -> State:
    """The rounds that are missing, tracked and saved; Stopped or InputError ends them early.

    A signal to one rank ends the round, and the run, of all.
    """
    signals, trackers = Signals(), list[Tracker]()
    sim.signal = lambda: signals.came

    def came() -> int:
        return signals.came if sim.mesh.size == 1 else sim.stopped

    try:
        with signals, ExitStack() as files:
            if sim.mesh.rank == 0:
                trackers = opened(files, keeper, args, board)
            if state.round == 0 and args.initial_evaluation:
                log_first(state, evaluate, keeper, trackers)
            while state.round < args.rounds and not keeper.stopped and not came():
                state, metrics = sim.round(state)
                reached("round trained")
                metrics, evaluated = evaluate(state, metrics)
                state = sim.observe(state, metrics)
                after, to_save = keeper.look(state, metrics, evaluated)
                if keeper.stopped:
                    metrics = evaluate.last(state, metrics, evaluated)
                state = after
                for tracker in trackers:
                    tracker.log(metrics)
                reached("round logged")
                if to_save:
                    keeper.save(state)
            if keeper.saved < state.round:  # the last round, a target, or a signal came
                keeper.save(state)
    except KeyboardInterrupt:
        number = signals.came or signal.SIGINT
        raise Stopped(f"stopped at once {keeper.where(state)}", number) from None
    except (OSError, WorkerLost) as error:
        raise keeper.ended(error, state) from error
    finally:
        keeper.rows = None
    if state.round < args.rounds and not keeper.stopped:
        raise Stopped(f"stopped {keeper.where(state)}", came())
    return state


def opened(files: ExitStack, keeper: Keeper, args: RunArgs, board: Wandb) -> list[Tracker]:
    """Where metrics go, open until `files` is closed."""
    keeper.rows = files.enter_context(closing(Jsonl(keeper.run_dir / "metrics.jsonl")))
    trackers: list[Tracker] = [keeper.rows, files.enter_context(closing(Console(args.rounds)))]
    if args.profile:
        trackers.append(files.enter_context(closing(Profile(keeper.sim, keeper.run_dir))))
    return [*trackers, board]


def log_first(
    state: State, evaluate: Evaluations, keeper: Keeper, trackers: Sequence[Tracker]
) -> None:
    """The evaluation of the first model, as the row of round 0; a misspelt --watch ends here."""
    metrics, _ = evaluate(state, {"round": 0})
    keeper.look(state, metrics, False)
    for tracker in trackers:
        tracker.log(metrics)
