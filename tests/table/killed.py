"""Runs with a table on disk that die at every step, in processes that are forked for it.

    python -m tests.table.killed FOLDER {rows,rounds,scaffold} {killed,unplugged} STRIDE

Each call of the system that writes, syncs, names or makes room is a step. At every STRIDE-th of
them a process is killed, before it and, where it writes, in the middle of it; or the machine is
unplugged there, which also loses some of what was not synced. The next one goes on from the newest
checkpoint and is killed earlier, and the third one ends. Prints the number of steps, how many
processes died, and the steps after which the end was not that of a run that nobody disturbed, or
other rounds were played than those that were missing.
"""

import json
import os
import pickle
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import vecfl
from tests.oracles.toy import habit
from vecfl.table import Table, Tables

STEPS = ("write", "pwrite", "fsync", "ftruncate", "rename", "mkdir", "posix_fallocate")
STEPS = tuple(name for name in STEPS if hasattr(os, name))
CLIENTS, ROUNDS, EVERY = 7, 6, 2


class Death:
    """Counts the steps of this process; the one with number `at` is its last.

    half       its first half of bytes is written
    unplugged  what was not synced may be lost: bytes of a file, and the last names of folders
    """

    def __init__(self, at: int, half: bool, unplugged: bool) -> None:
        self.at, self.half, self.unplugged, self.count = at, half, unplugged, 0
        self.real = {name: getattr(os, name) for name in STEPS}
        self.loose: dict[str, list[tuple[int, bytes]]] = {}  # file -> (place, bytes before)
        self.names: list[tuple[str, str | None]] = []  # new name, and the one before
        self.open = os.open
        os.open = self.opened
        for name in STEPS:
            setattr(os, name, self.step(name))

    def opened(self, path: str, flags: int, *mode: int, **where: int) -> int:
        new = flags & os.O_CREAT and not os.path.exists(path)
        file = self.open(path, flags, *mode, **where)
        if new:
            self.names.append((os.path.abspath(path), None))
        return file

    def step(self, name: str) -> Callable:
        def act(*args):
            self.count += 1
            if self.count == self.at:
                if self.half and name in ("write", "pwrite"):
                    file, data, *place = args
                    self.note(name, args)
                    self.real[name](file, data[: len(data) // 2], *place)
                self.die()
            self.note(name, args)
            result = self.real[name](*args)
            if name == "mkdir":
                self.names.append((os.path.abspath(args[0]), None))
            if name == "rename":
                self.names.append((os.path.abspath(args[1]), os.path.abspath(args[0])))
            return result

        return act

    def note(self, name: str, args: tuple) -> None:
        """Remember what a step overwrites, until file or folder is synced."""
        if name == "fsync":
            path = os.readlink(f"/proc/self/fd/{args[0]}")
            self.loose.pop(path, None)
            self.names = [names for names in self.names if os.path.dirname(names[0]) != path]
        if name in ("write", "pwrite"):
            file, data, *place = args
            at = place[0] if place else os.fstat(file).st_size
            path = os.readlink(f"/proc/self/fd/{file}")
            with open(path, "rb") as content:
                content.seek(at)
                before = content.read(len(data))
            self.loose.setdefault(path, []).append((at, before))

    def die(self) -> None:
        dice = random.Random(self.at)
        for path, writes in self.loose.items() if self.unplugged else ():
            if not os.path.exists(path):
                continue
            for at, before in reversed(writes):
                if dice.random() < 0.5:  # the page never came to the disk
                    with open(path, "r+b") as file:
                        file.seek(at)
                        if before:
                            file.write(before)
                        elif dice.random() < 0.5:
                            file.truncate()
                        else:  # the file is as long, but its end is zeros
                            end = file.seek(0, 2)
                            file.seek(at)
                            file.write(bytes(end - at))
        lost = self.names[dice.randrange(len(self.names) + 1) :] if self.unplugged else []
        for path, before in reversed(lost):
            if before is not None and os.path.exists(path):
                self.real["rename"](path, before)
            elif os.path.isdir(path):
                shutil.rmtree(path)
            elif os.path.exists(path):
                os.unlink(path)
        os.kill(os.getpid(), signal.SIGKILL)


def save(path: Path, content: object) -> None:
    """A checkpoint: written beside, synced, renamed."""
    part = path.with_suffix(".part")
    file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(file, pickle.dumps(content))
    os.fsync(file)
    os.close(file)
    os.rename(part, path)
    names = os.open(path.parent, os.O_RDONLY)
    os.fsync(names)
    os.close(names)


def load(folder: Path) -> dict | None:
    """The newest checkpoint."""
    found = sorted(folder.glob("checkpoint-*.pkl"))
    return pickle.loads(found[-1].read_bytes()) if found else None


def checkpoint(folder: Path, round: int, server: object, table: Table) -> None:
    """Save, then forget what leads back to checkpoints but the last two."""
    content = {"round": round, "server": server, "table": table.content(round)}
    save(folder / f"checkpoint-{round}.pkl", content)
    for old in sorted(folder.glob("checkpoint-*.pkl"))[:-2]:
        old.unlink()
    oldest = sorted(folder.glob("checkpoint-*.pkl"))[0]
    table.checkpointed(int(oldest.stem.removeprefix("checkpoint-")))


def rows(folder: Path) -> tuple[list[int], object]:
    """Rounds on a bare table: the rounds that were played, and all numbers at the end."""
    start = load(folder) or {"round": 0, "server": 1}
    tables = Tables({"a": (3,), "b": ()}, CLIENTS, torch.float32, folder / "table")
    table, server, played = tables.at(start["round"], start.get("table")), start["server"], []
    assert table is not None
    if "table" not in start:
        checkpoint(folder, 0, server, table)  # a table with rounds is no other start's
    for t in range(start["round"], ROUNDS):
        clients = torch.tensor([t % CLIENTS, (3 * t + 1) % CLIENTS, (2 * t + 4) % CLIENTS]).unique()
        table.begin(t, clients)
        for some in clients.split(2):
            old = table.gather(some)
            a = 0.5 * old["a"] + server * torch.tensor([1.0, 2.0, 3.0]) + some[:, None]
            table.scatter(some, {"a": a, "b": old["b"] + t + 1})
            server = int(server + a.sum()) % 97
        table.end()
        played.append(t)
        if (t + 1) % EVERY == 0:
            checkpoint(folder, t + 1, server, table)
    left = table.gather(torch.arange(CLIENTS))
    return played, (server, {name: values.tolist() for name, values in left.items()})


def rounds(folder: Path) -> tuple[list[int], object]:
    """A simulation of the toy algorithm, in two workers: the same."""
    return simulated(folder, habit(lr=0.1, batches=vecfl.Batches(2)))


def scaffold(folder: Path) -> tuple[list[int], object]:
    """Likewise of SCAFFOLD, with its two passes."""
    return simulated(folder, vecfl.scaffold(lr=0.1, option=1, batches=vecfl.Batches(2)))


def simulated(folder: Path, algorithm: vecfl.Algorithm) -> tuple[list[int], object]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5 * CLIENTS, 4, generator=generator)
    y = (x[:, 0] > 0).long()
    client = torch.arange(5 * CLIENTS) % CLIENTS
    data = vecfl.FederatedDataset.from_arrays({"x": x, "y": y}, client)
    module = nn.Linear(4, 2)
    for p in module.parameters():
        p.data.fill_(0.1)
    sim = vecfl.Simulation(
        vecfl.Task(module, vecfl.cross_entropy, example=data.examples(2)),
        data,
        algorithm,
        vecfl.uniform(3),
        backend="loop",
        workers=2,
        threads=1,
        slots=1,
        table=folder / "table",
    )
    start, played = load(folder), []
    if start is None:
        state = sim.start()
        checkpoint(folder, 0, numbers(state.server), state.table)
    else:
        table = sim.tables.at(start["round"], start["table"])
        layout = sim.task.layout
        fresh = algorithm.init(layout.flatten(sim.task.module), layout)
        server = {k: torch.tensor(v, dtype=fresh[k].dtype) for k, v in start["server"].items()}
        state = vecfl.State(start["round"], server, table)
    while state.round < ROUNDS:
        played.append(state.round)
        state, _ = sim.round(state)
        if state.round % EVERY == 0:
            checkpoint(folder, state.round, numbers(state.server), state.table)
    return played, (numbers(state.server), numbers(state.table.gather(torch.arange(CLIENTS))))


def numbers(tensors: dict[str, Tensor]) -> dict[str, list]:
    return {name: t.tolist() for name, t in tensors.items()}


def forked(run: Callable, folder: Path, death: tuple | None) -> tuple[int, dict | None]:
    """How a process ends that runs (its signal), and what it has to say."""
    said = folder.parent / "said.json"
    said.unlink(missing_ok=True)
    if (pid := os.fork()) == 0:
        try:
            folder.mkdir(exist_ok=True)
            counted = Death(*(death or (0, False, False)))
            played, end = run(folder)
            said.write_text(json.dumps({"steps": counted.count, "played": played, "end": end}))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("a run failed that nobody killed")
    return os.WTERMSIG(status), json.loads(said.read_text()) if said.exists() else None


def main() -> None:
    where, kind, how, stride = sys.argv[1:]
    run, folder, unplugged = (
        {"rows": rows, "rounds": rounds, "scaffold": scaffold}[kind],
        Path(where, "run"),
        how[0] == "u",
    )
    _, right = forked(run, folder, None)
    assert right is not None and right["played"] == list(range(ROUNDS))
    wrong, deaths = [], 0
    for at in range(1, right["steps"] + 1, int(stride)):
        for half in (False, True):
            shutil.rmtree(folder)
            for death in ((at, half, unplugged), (at // 2 + 1, half, unplugged)):
                died, _ = forked(run, folder, death)
                deaths += died == signal.SIGKILL
            newest = load(folder)
            first = newest["round"] if newest else 0
            _, said = forked(run, folder, None)
            assert said is not None
            if said["end"] != right["end"] or said["played"] != list(range(first, ROUNDS)):
                wrong.append((at, half))
    print(json.dumps({"steps": right["steps"], "deaths": deaths, "wrong": wrong}))


if __name__ == "__main__":
    main()
