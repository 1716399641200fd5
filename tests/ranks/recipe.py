"""A small recipe for several ranks: `torchrun -m tests.ranks.recipe`, with planted faults.

PLANT is "kill:N", "error:N" or "other:N": after N rounds rank 1, in the first attempt, is killed,
raises, or goes on with a model of its own. DEATH is "RANK:STEP:n", see `vecfl.files.reached`, or
"RANK:after:SECONDS" from its first round on: there it is killed in the first attempt. Each rank
writes a line a round to DIARY<rank>.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import vecfl.finish
import vecfl.record
from tests.persist import tiny
from vecfl.cli import main
from vecfl.simulation import Simulation
from vecfl.track import Wandb

RANK, ATTEMPT = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
doomed, step, number = os.environ.get("DEATH", "-:-:-").split(":")
doomed = (doomed, "0") == (RANK, ATTEMPT)
train = Simulation.round


def planted(sim: Simulation, state: Any) -> Any:
    """A round that is written down, and its fault."""
    with Path(os.environ["DIARY"] + RANK).open("a") as diary:
        diary.write(f"{state.round + 1}\n")
    if state.round == 0 and doomed and step == "after":
        killer = threading.Timer(float(number), os.kill, (os.getpid(), signal.SIGKILL))
        killer.daemon = True
        killer.start()
    what, _, after = os.environ.get("PLANT", "none:0").partition(":")
    state, metrics = train(sim, state)
    if (RANK, ATTEMPT, state.round) == ("1", "0", int(after)):
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "error":
            raise ZeroDivisionError("planted")
        if what == "other":
            state.server["w"][0] += 1e-3
        if what == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
    return state, metrics


class Board(Wandb):
    """W&B whose `track` is written to DIARY<rank>.board."""

    def __init__(self, *args: Any, track: Any, **kwargs: Any) -> None:
        with Path(f"{os.environ['DIARY']}{RANK}.board").open("a") as diary:
            diary.write(f"{track}\n")
        super().__init__(*args, track=track, **kwargs)


if __name__ == "__main__":
    if doomed and step != "after":
        os.environ["VECFL_KILL_AT"] = f"{step}:{number}"
    Simulation.round = planted  # type: ignore[method-assign]
    vecfl.record.Wandb = Board  # type: ignore[misc]
    vecfl.finish.draw_curves = lambda run_dir: None  # half a second
    sys.argv[0] = "recipe"
    main(tiny.run, tiny.TinyArgs)
