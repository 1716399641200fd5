"""Runs `tiny` in forks of this process, which has imported all of it once, and kills some of them.

Reads one JSON object a line, {"args": {...}, "kill_at": "STEP:n" or null, "after": seconds or
null}, and answers with {"code": as of `waitpid`, negative for a signal; "seconds", "rounds": those
that were run; "steps": how often each step was reached, of a run that ended}.
"""

import json
import os
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import vecfl.files as files
import vecfl.finish
import vecfl.record
from tests.persist.tiny import arguments, run
from vecfl.cli import main
from vecfl.simulation import Simulation


def child(case: dict[str, Any], diary: int) -> None:
    """One run; a line in the diary for each round that begins, and one for the steps at its end."""
    train = Simulation.round

    def counted(sim: Simulation, state: Any) -> Any:
        os.write(diary, b"round\n")
        return train(sim, state)

    Simulation.round = counted  # type: ignore[method-assign]
    if case["kill_at"]:
        os.environ["VECFL_KILL_AT"] = case["kill_at"]
    args = arguments(**case["args"])
    main(lambda _: run(args), type(args))
    os.write(diary, json.dumps(files._seen).encode() + b"\n")


def answer(case: dict[str, Any]) -> dict[str, Any]:
    read, write = os.pipe()
    began = time.perf_counter()
    pid = os.fork()
    if not pid:
        sys.argv, code = ["tiny"], 1
        try:
            with (
                Path(case["args"]["out"] + ".log").open("a", buffering=1) as said,
                redirect_stdout(said),
                redirect_stderr(said),
            ):
                child(case, write)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    os.close(write)
    if case["after"] is not None:
        time.sleep(case["after"])
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(read) as diary:
        lines = diary.read().splitlines()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    rounds = lines.count("round")
    steps = json.loads(lines[-1]) if len(lines) > rounds else {}
    return {
        "code": code,
        "seconds": time.perf_counter() - began,
        "rounds": rounds,
        "steps": steps,
    }


def warm_up() -> None:
    """Have imported, before any fork, what the first rounds import; one worker starts no thread."""
    for backend in ("loop", "vmap", "stacked"):
        said = StringIO()
        with TemporaryDirectory() as folder, redirect_stdout(said), redirect_stderr(said):
            out = str(Path(folder, "run"))
            run(arguments(out, rounds=1, resume="auto", backend=backend, workers=1))
    files._seen.clear()


if __name__ == "__main__":
    torch.set_num_threads(1)
    vecfl.finish.draw_curves = lambda run_dir: (run_dir / "curves.png").touch()  # not for 0.5 s
    warm_up()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
