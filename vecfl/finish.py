"""The end of a recorded run: its model, its summary and its picture."""

import signal
import tempfile
from pathlib import Path

import torch

from vecfl.errors import InputError
from vecfl.keeper import Keeper, reason
from vecfl.model_file import SAFE, save_model
from vecfl.report import draw_curves, summary
from vecfl.signals import Stopped
from vecfl.simulation import Simulation
from vecfl.state import State


def told(run_dir: Path, stopped: str | None) -> str:
    """The summary of a run, and why it was stopped."""
    return "\n".join([summary(run_dir), *([f"stopped         {stopped}"] if stopped else [])])


def finish(sim: Simulation, state: State, safetensors: bool, keeper: Keeper) -> None:
    """Save the model, print the summary and draw the curves of a run that is complete."""
    model, run_dir = sim.state_dict(state), keeper.run_dir
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
        print(told(run_dir, keeper.stopped))
        if keeper.watch is not None and (best := keeper.watch.back_at(state)) is not None:
            print(f"model.pt        of round {best}, the best by {keeper.watch.metric}")


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
