"""A small recipe for several ranks: `torchrun -m tests.ranks.recipe`, with planted faults.

PLANT is "kill:N", "error:N" or "other:N": after N rounds rank 1, in the first attempt, is killed,
raises, or goes on with a model of its own. Each rank writes a line a round to OUT.rank<r>.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import vecfl.record
from tests.persist import tiny
from vecfl.cli import main
from vecfl.flags import RunArgs
from vecfl.simulation import Simulation

RANK, ATTEMPT = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
train = Simulation.round


def planted(sim: Simulation, state: Any) -> Any:
    """A round that is written down, and its fault."""
    with Path(os.environ["DIARY"] + RANK).open("a") as diary:
        diary.write(f"{state.round + 1}\n")
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


if __name__ == "__main__":
    Simulation.round = planted  # type: ignore[method-assign]
    vecfl.record.draw_curves = lambda run_dir: None  # half a second
    sys.argv[0] = "recipe"
    main(tiny.run, RunArgs)
