"""A run with a directory of its own: what the recipes do between the first round and the last."""

import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import current_thread, main_thread
from typing import Literal

from vecfl.errors import InputError
from vecfl.report import draw_curves, summary
from vecfl.simulation import Metrics, Simulation, State
from vecfl.track import Console, Jsonl, Wandb, create_run_dir, save_model


def record_run(
    sim: Simulation,
    rounds: int,
    evaluate: Callable[[State], Metrics],
    *,
    out: str | None,
    recipe: str,
    config: Mapping[str, object],
    eval_every: int = 1,
    track: Literal["auto", "wandb", "none"] = "auto",
) -> None:
    """`rounds` rounds into the run directory `out`, or a dated one: metrics, model, curves.

    `evaluate` is called every `eval_every` rounds and after the last; `config` are the settings
    for config.yaml, where the arrangement that was chosen stands for "auto". Progress goes to
    stderr, the summary to stdout; `track` is that of `vecfl.track.Wandb`. A run that is
    interrupted, or whose disk is full, keeps its metrics and its model: the KeyboardInterrupt or
    InputError says where.
    """
    settings = {**config, **asdict(sim.arrangement)}
    run_dir = create_run_dir(out, recipe, settings)
    with Wandb(run_dir, settings, group=recipe, track=track) as board:
        run_rounds(sim, rounds, evaluate, run_dir, board, eval_every)
        board.log_image("curves", run_dir / "curves.png")


def run_rounds(
    sim: Simulation,
    rounds: int,
    evaluate: Callable[[State], Metrics],
    run_dir: Path,
    board: Wandb,
    eval_every: int,
) -> None:
    """The rounds of `record_run` and their end, whichever it is."""
    state = sim.start()
    try:
        with closing(Jsonl(run_dir / "metrics.jsonl")) as log, closing(Console(rounds)) as bar:
            while state.round < rounds:
                state, metrics = sim.round(state)
                if state.round % eval_every == 0 or state.round == rounds:
                    metrics |= evaluate(state)
                log.log(metrics)
                bar.log(metrics)
                board.log(metrics)
    except (KeyboardInterrupt, OSError) as stop:
        with no_ctrl_c():  # pressed again, it would lose the model
            kept = keep_model(sim, state, run_dir / f"model-round-{state.round}.pt")
        so_far = f"after round {state.round} of {rounds}, not finished; metrics so far: {run_dir}"
        if isinstance(stop, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted {so_far}; model so far: {kept}") from None
        raise InputError(f"{_reason(stop)}; stopped {so_far}; model so far: {kept}") from stop
    finish(sim, state, run_dir)


@contextmanager
def no_ctrl_c() -> Iterator[None]:
    """Ctrl-C does nothing inside; other threads than the main one never get it."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def finish(sim: Simulation, state: State, run_dir: Path) -> None:
    """Save the model, print the summary and draw the curves of a run that is complete."""
    kept = keep_model(sim, state, run_dir / "model.pt")
    try:
        draw_curves(run_dir)
    except KeyboardInterrupt:
        done = f"interrupted; training finished and {kept} is complete, curves.png was not drawn"
        raise KeyboardInterrupt(done) from None
    except OSError as error:
        raise InputError(f"{_reason(error)}; training finished, model: {kept}") from error
    finally:
        print(summary(run_dir))


def keep_model(sim: Simulation, state: State, path: Path) -> Path:
    """Save the model at `path`, or in a temporary directory if that cannot be written.

    Raises InputError where neither can.
    """
    model = sim.state_dict(state)
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
                f"{_reason(error)}; the model of {state.round} rounds fits nowhere: metrics are in "
                f"{path.parent}, free some space and run again"
            ) from error


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}"
