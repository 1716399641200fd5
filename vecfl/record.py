"""A run with a directory of its own: what the recipes do between the first round and the last."""

import logging
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import current_thread, main_thread
from traceback import format_exc

import torch

from vecfl.errors import InputError
from vecfl.files import reached
from vecfl.flags import RunArgs
from vecfl.keeper import Keeper, reason
from vecfl.mesh import RankError
from vecfl.model_file import SAFE, save_model
from vecfl.report import draw_curves, summary
from vecfl.resume import CHECKPOINTS, Before, go_on, settings
from vecfl.signals import Signals, Stopped
from vecfl.simulation import Metrics, Simulation, State
from vecfl.track import Console, Jsonl, Tracker, Wandb, create_run_dir, new_id

log = logging.getLogger("vecfl")
Evaluate = Callable[[State], Metrics]


def record_run(
    sim: Simulation, evaluate: Evaluate, args: RunArgs, *, recipe: str, before: Before | None
) -> None:
    """The rounds of `args` into a run directory: metrics, checkpoints, model, curves.

    `before` is the run to go on with (`vecfl.resume.resume`), None for a new one in `args.out` or
    a dated directory. `evaluate` is called every `args.eval_every` rounds and after the last.
    Progress goes to stderr, the summary to stdout. Raises Stopped after SIGINT or SIGTERM, and
    InputError for a full disk: their line says how to go on. Of several ranks the first writes and
    prints; what any of them raises is in `error.log`.
    """
    if args.fall_back and sim.tables.shapes:
        raise InputError(
            f"--fall-back: clients of {sim.algorithm.name} keep rows between rounds, which do not "
            "go back with the model; give --watch alone"
        )
    config, first = settings(args, sim.arrangement), sim.mesh.rank == 0
    if before is None:
        create = partial(create_run_dir, args.out, recipe, config)
        run_dir, state = sim.mesh.from_first(create), sim.start()
        keeper = Keeper(sim, args, run_dir, {"config": config, "recipe": recipe, "id": new_id()})
        if first:
            (run_dir / CHECKPOINTS).mkdir()
        keeper.save(state)
    else:
        run_dir, content = before.run_dir, before.content
        state = sim.load(content["run"], changed=args.resume_changed)
        results = ["model.pt", "curves.png", *([f"model{SAFE}"] if args.safetensors else [])]
        there = sim.mesh.from_first(lambda: all((run_dir / name).exists() for name in results))
        if state.round == args.rounds and there:
            log.info("%s is finished: nothing to do", run_dir)
            if first:
                print(summary(run_dir))
            return
        about = {"config": config, "recipe": recipe, "id": content["id"]}
        keeper = Keeper(sim, args, run_dir, about, state.round)
        keeper.go_on(content, state)
        if first:
            go_on(before, config)
    track, id = args.track if first else "none", keeper.about["id"]
    with (
        failures(run_dir, sim.mesh.rank, sim.mesh.size),
        Wandb(run_dir, config, group=recipe, track=track, id=id) as board,
    ):
        state = run_rounds(sim, state, evaluate, args, keeper, board)
        if first:
            finish(sim, state, run_dir, args.safetensors)
            board.log_image("curves", run_dir / "curves.png")


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
    evaluate: Evaluate,
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
                keeper.rows = files.enter_context(closing(Jsonl(keeper.run_dir / "metrics.jsonl")))
                trackers = [keeper.rows, files.enter_context(closing(Console(args.rounds))), board]
            while state.round < args.rounds and not came():
                state, metrics = sim.round(state)
                reached("round trained")
                evaluated = state.round % args.eval_every == 0 or state.round == args.rounds
                if evaluated:
                    metrics |= evaluate(state)
                    reached("round evaluated")
                for tracker in trackers:
                    tracker.log(metrics)
                reached("round logged")
                state, to_save = keeper.look(state, metrics, evaluated)
                if to_save:
                    keeper.save(state)
            if keeper.saved < state.round:  # the last round, or a signal came
                keeper.save(state)
    except KeyboardInterrupt:
        number = signals.came or signal.SIGINT
        raise Stopped(f"stopped at once {keeper.where(state)}", number) from None
    except OSError as error:
        raise InputError(f"{reason(error)}; stopped {keeper.where(state)}") from error
    finally:
        keeper.rows = None
    if state.round < args.rounds:
        raise Stopped(f"stopped {keeper.where(state)}", came())
    return state


def finish(sim: Simulation, state: State, run_dir: Path, safetensors: bool) -> None:
    """Save the model, print the summary and draw the curves of a run that is complete."""
    model = sim.state_dict(state)
    if safetensors:
        save_model(run_dir / f"model{SAFE}", model)
    kept = keep_model(model, run_dir / "model.pt", state.round)
    try:
        draw_curves(run_dir)
    except KeyboardInterrupt:
        done = f"interrupted; training finished and {kept} is complete, curves.png was not drawn"
        raise Stopped(done, signal.SIGINT) from None
    except OSError as error:
        raise InputError(f"{reason(error)}; training finished, model: {kept}") from error
    finally:
        print(summary(run_dir))


def keep_model(model: dict[str, torch.Tensor], path: Path, rounds: int) -> Path:
    """Save the model at `path`, or in a temporary directory if that cannot be written.

    Raises InputError where neither can.
    """
    try:
        save_model(path, model)
        return path
    except OSError as error:
        other = Path(tempfile.mkdtemp(prefix="vecfl-"), path.name)
        try:
            save_model(other, model)
            return other
        except OSError:
            raise InputError(
                f"{reason(error)}; the model of {rounds} rounds fits nowhere: metrics are in "
                f"{path.parent}, free some space and run again"
            ) from error
