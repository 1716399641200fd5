"""The state of a run as tensors on the CPU and plain values, and back: what a checkpoint holds."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vecfl.algorithms.base import Server
from vecfl.errors import InputError
from vecfl.layout import Layout
from vecfl.mesh import Mesh
from vecfl.table import Table, Tables

Facts = Mapping[str, Any]  # what a run is known by, plain values


def open_table(
    tables: Tables, mesh: Mesh, round: int, content: Mapping[str, object] | None = None
) -> Table | None:
    """The table as it was after `round` rounds; ranks go back one after the other.

    InputError for several ranks that have no folder to share it.
    """
    table = None
    if tables.shapes and tables.folder is None and mesh.size > 1:
        raise InputError("clients keep rows, which several ranks share on disk: give table=FOLDER")
    for rank in range(mesh.size):
        if rank == mesh.rank:
            table = tables.at(round, content)
        if tables.shapes:
            mesh.sum(torch.zeros(1))
    return table


def pack(round: int, server: Server, layout: Layout, facts: Facts) -> dict[str, Any]:
    """What `unpack` needs; "model" names the parts of "w", as views, which cost nothing."""
    server = {name: value.cpu() for name, value in server.items()}
    model = layout.unflatten(server["w"])
    return {"round": round, "server": server, "model": model, "facts": dict(facts)}


def unpack(content: Mapping[str, Any], fresh: Server, facts: Facts, changed: bool) -> Server:
    """The server's tensors on the device of `fresh`, those of a run that begins.

    Raises InputError where they are not of the same names, types and shapes; and where a fact
    differs, unless `changed` says that the result may be another one.
    """
    server = content["server"]
    for name in server.keys() | fresh.keys():
        there, here = (_kind(tensors.get(name)) for tensors in (server, fresh))
        if there != here:
            raise InputError(
                f"the checkpoint is of another model, precision or server optimizer: "
                f"{name!r} is {there} there, {here} here"
            )
    different = [
        f"{name} {content['facts'].get(name)} there, {value} here"
        for name, value in facts.items()
        if content["facts"].get(name) != value
    ]
    if different and not changed:
        raise InputError(f"the checkpoint is of another run: {'; '.join(different)}")
    return {name: value.to(fresh[name].device) for name, value in server.items()}


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
