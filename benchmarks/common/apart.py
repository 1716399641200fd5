"""A contestant in processes of its own: what it printed, and the memory that it took."""

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

LEFT_OUT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")  # contestants choose threads by themselves
EVERY = 1.0  # seconds between two looks at the memory


class Failed(Exception):
    """A contestant ended with an error, or took too long; says how it ended."""


def run_apart(command: list[str], env: dict[str, str], limit: float) -> dict[str, Any]:
    """The last line that `command` prints, as JSON, with `peak_mib` and `startup_s`.

    The start is counted from before the first process to the end of the first round. Raises Failed.
    """
    kept = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.monotonic()
        process = subprocess.Popen(
            command, stdout=out, stderr=err, env=kept | env, start_new_session=True
        )
        watch = Memory(process.pid)
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"no end after {limit:.0f} s"
        finally:
            watch.stop()
            end_all(process)
        out.seek(0), err.seek(0)
        lines, said = out.read().splitlines(), err.read().strip().splitlines()
    if code:
        raise Failed(f"{code}: {(said or lines or ['it said nothing'])[-1]}")
    found = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
    return found | {"startup_s": found["times"][1] - began, "peak_mib": watch.peak_mib}


def end_all(process: subprocess.Popen) -> None:
    """End what is left of a contestant, its children too."""
    for pid in [*family(process.pid), process.pid] if process.poll() is None else []:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Memory:
    """Looks at a process and all that come from it: the largest sum of their memory (Linux)."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak, self.over = pid, 0, threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def look(self) -> None:
        while not self.over.wait(EVERY):
            self.peak = max(self.peak, sum(map(proportional, [self.pid, *family(self.pid)])))

    def stop(self) -> None:
        self.over.set()
        self.thread.join()

    @property
    def peak_mib(self) -> float | None:
        return round(self.peak / 1024, 1) if self.peak else None


def proportional(pid: int) -> int:
    """KiB of a process; what n processes share counts 1/n for each."""
    return resident(pid, "Pss:")


def resident(pid: int, *kinds: str) -> int:
    """KiB of these kinds of a process's memory, added up; 0 where it cannot be read."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(kinds))


def family(pid: int) -> Iterator[int]:
    """The children of a process, their children, and so on."""
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in file.read_text().split()]
        except OSError:
            continue
        for child in children:
            yield child
            yield from family(child)
