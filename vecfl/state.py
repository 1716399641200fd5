"""The state of a run as tensors on the CPU and plain values, and back: what a checkpoint holds."""

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from vecfl.algorithms.base import Algorithm, Round, Server
from vecfl.data import FederatedDataset
from vecfl.engine.rule import LocalRule
from vecfl.errors import InputError
from vecfl.layout import Layout
from vecfl.mesh import Mesh
from vecfl.privacy.events import Ledger, from_plain, to_plain
from vecfl.table import Table, Tables
from vecfl.work import said

T = TypeVar("T")
Facts = Mapping[str, Any]  # what a run is known by, plain values


@dataclass(frozen=True)
class State:
    """Everything a run is between two rounds: how many are finished, and the server's tensors.

    table     what clients keep, changed in place by the next round: an older state cannot go on
    observed  whether the algorithm has seen the metrics of the last round, if it wants to
    traffic   bytes that clients have sent and received since the start; see `sent`
    ledger    what rounds have released under differential privacy
    """

    round: int
    server: dict[str, Tensor]
    table: Table | None = None
    observed: bool = True
    traffic: tuple[int, int] = (0, 0)
    ledger: Ledger = ()

    def require_observed(self, algorithm: Algorithm) -> None:
        """InputError where the algorithm has yet to see the metrics of the round before."""
        if not self.observed:
            raise InputError(
                f"{algorithm.name} adapts to the metrics of a round: after each round and its "
                "evaluation call state = sim.observe(state, metrics)"
            )


def sent(state: State, up: int, down: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Traffic after a round whose clients sent `up` bytes and received `down`, and its metrics."""
    total = state.traffic[0] + up, state.traffic[1] + down
    told = {"up_bytes": up, "down_bytes": down, "total_up_bytes": total[0]}
    told |= {"total_down_bytes": total[1]}
    return total, {f"comm/{name}": value for name, value in told.items()}


def settle_(w: Tensor, algorithm: Algorithm, round: Round) -> None:
    """Round the integers of w [P], which the server has moved.

    InputError where it is not finite: all clients of all further rounds would be dropped.
    """
    round.layout.round_integers_(w)
    if not w.isfinite().all():
        how = algorithm.facts.get("server", "its numbers")
        raise InputError(
            f"round {round.number + 1}: the server's step has left a model that is not finite; is "
            f"its learning rate ({how}), or that of a replay, too large?"
        )


def open_table(
    tables: Tables, mesh: Mesh, round: int, content: Mapping[str, object] | None = None
) -> Table | None:
    """The table as it was after `round` rounds; ranks go back one after the other.

    InputError for several ranks that have no folder to share it.
    """
    table = None
    if tables.shapes and tables.folder is None and mesh.size > 1:
        raise InputError("clients keep rows, which several ranks share on disk: give table=FOLDER")
    if tables.shapes and mesh.machines > 1:
        raise InputError(
            f"clients keep rows, which ranks share through the memory of one machine; these are on "
            f"{mesh.machines}"
        )
    mesh.from_first(lambda: tables.check(round, content))  # what it refuses is refused to all
    for rank in range(mesh.size):
        if rank == mesh.rank:
            table = tables.at(round, content)
        if tables.shapes:
            mesh.sum(torch.zeros(1))
    return table


def together(mesh: Mesh, save: Callable[[], T]) -> T:
    """What `save` gives, once all ranks have it; an OSError of one of them is one of all."""
    failed, result = None, None
    try:
        result = save()
    except OSError as error:
        failed = error
    (ranks,) = mesh.sum(mesh.place(int(failed is not None)))
    if failed is not None:
        raise failed
    if ranks.any():
        what = f"rank {int(ranks.argmax())} could not write the rows of its clients"
        raise OSError(errno.EIO, what, "table")
    return cast(T, result)


def known_by(rule: LocalRule) -> str:
    """A rule as text: its parts and numbers, of functions their names."""
    if isinstance(rule.lr, (int, float)):
        return str(rule)
    return f"{replace(rule, lr=0.0)}, lr by round: {said(rule.lr)}"


def facts(
    algorithm: Algorithm, data: FederatedDataset, layout: Layout, seeds: Facts, how: Facts
) -> dict[str, Any]:
    """What the bits of a round depend on, as far as values tell: functions cannot."""
    return {
        "algorithm": algorithm.name,
        **algorithm.facts,
        **seeds,
        "clients": data.num_clients,
        "examples": int(data.offsets[-1]),
        "rule": known_by(algorithm.rule),
        "parameters": [f"{e.name} {list(e.shape)}" for e in layout.params],
        "frozen": layout.frozen,
        **how,
    }


def pack(mesh: Mesh, state: State, model: Server, facts: Facts) -> dict[str, Any]:
    """What `unpack` needs, and the model by the names of its parts, for whoever reads the file."""
    server, model = ({k: t.cpu() for k, t in part.items()} for part in (state.server, model))
    content = {"round": state.round, "server": server, "model": model, "facts": dict(facts)}
    content["traffic"], content["ledger"] = list(state.traffic), to_plain(state.ledger)
    if (table := state.table) is not None:
        content["table"] = together(mesh, lambda: table.content(state.round))
    return content


def unpack(content: Mapping[str, Any], fresh: Server, facts: Facts, changed: bool) -> Server:
    """The server's tensors on the device of `fresh`, those of a run that begins.

    Raises InputError where they are not of the same names, types and shapes; and where a fact
    differs, unless `changed` says that the result may be another one.
    """
    if not isinstance(content, Mapping) or not {"server", "facts", "round"} <= content.keys():
        raise InputError(
            "not what Simulation.save gave; in a checkpoint of a recipe that is its part 'run'"
        )
    server = content["server"]
    for name in server.keys() | fresh.keys():
        there, here = (_kind(tensors.get(name)) for tensors in (server, fresh))
        if there != here:
            raise InputError(
                f"the checkpoint is of another model, precision or server optimizer: "
                f"{name!r} is {there} there, {here} here"
            )
    older = {"frozen": "nothing", "processes": 1, "precision": "float32", "graphs": False}
    there = older | content["facts"]
    different = [
        f"{name} {there.get(name)} there, {value} here"
        for name, value in facts.items()
        if there.get(name) != value
    ]
    if different and not changed:
        raise InputError(f"the checkpoint is of another run: {'; '.join(different)}")
    if there.get("dp_sgd") != facts.get("dp_sgd"):
        raise InputError(
            f"the checkpoint is of a run with {there.get('dp_sgd', 'nothing')} for dp_sgd, here "
            f"{facts.get('dp_sgd', 'nothing')}: passes are counted at one noise; begin anew"
        )
    return {name: value.to(fresh[name].device) for name, value in server.items()}


def sums_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a state has added up since the start; older checkpoints have less of it."""
    up, down = content.get("traffic", (0, 0))
    return {"traffic": (up, down), "ledger": from_plain(content.get("ledger", ()))}


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
