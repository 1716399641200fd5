"""The same data, written in every format, gives the same model: bit for bit."""

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import vecfl
from tests.data.files import hdf5_file, parquet_file, tff_file
from vecfl.data import FederatedDataset, collect, open_dataset, read, read_examples, save
from vecfl.data import __main__ as command

Rows = Mapping[str, dict[str, np.ndarray]]


def rows() -> dict[str, dict[str, np.ndarray]]:
    """Clients of 1 to 9 examples, x float32 [n, 3], y int64 [n]."""
    draw = np.random.default_rng(3)
    return {
        user: {
            "x": draw.normal(size=(n, 3)).astype(np.float32),
            "y": draw.integers(0, 4, n),
        }
        for user, n in {"ann": 5, "bob": 1, "cleo": 9, "dan": 4, "eve": 7}.items()
    }


def listed(data: Rows) -> dict[str, Any]:
    return {
        "users": list(data),
        "num_samples": [len(row["y"]) for row in data.values()],
        "user_data": {u: {k: a.tolist() for k, a in row.items()} for u, row in data.items()},
    }


def labelled(data: Rows, plain: bool) -> dict[str, Any]:
    """FLUTE keeps the labels apart."""
    kept = {u: (row["x"].tolist() if plain else row["x"]) for u, row in data.items()}
    labels = {u: (row["y"].tolist() if plain else row["y"]) for u, row in data.items()}
    return listed(data) | {
        "user_data": {u: {"x": x} for u, x in kept.items()},
        "user_data_label": labels,
    }


def pooled(data: Rows) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """x [n, 3], y [n] and the client of each example: the first of each client, the second, ..."""
    x, y = (np.concatenate([row[name] for row in data.values()]) for name in "xy")
    owner = np.repeat(list(data), [len(row["y"]) for row in data.values()])
    place = np.concatenate([np.arange(len(row["y"])) for row in data.values()])
    mixed = np.argsort(place, kind="stable")
    return x[mixed], y[mixed], owner[mixed].tolist()


def leaf(path: Path, data: Rows) -> FederatedDataset:
    path.write_text(json.dumps(listed(data)))
    return read(path)[0]


def tff(path: Path, data: Rows) -> FederatedDataset:
    renamed = {user: {"x": row["x"], "label": row["y"]} for user, row in data.items()}
    return read(tff_file(path, renamed))[0]


def flute_json(path: Path, data: Rows) -> FederatedDataset:
    path.write_text(json.dumps(labelled(data, plain=True)))
    return read(path)[0]


def flute_hdf5(path: Path, data: Rows) -> FederatedDataset:
    return read(hdf5_file(path, labelled(data, plain=False)))[0]


def parquet(path: Path, data: Rows) -> FederatedDataset:
    x, y, owner = pooled(data)
    return read(parquet_file(path, x=list(x), label=y, who=owner), client="who")[0]


def table(path: Path, data: Rows) -> FederatedDataset:
    path = path.with_suffix(".csv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["who", "a", "b", "c", "class"])
        writer.writerows([u, *x.tolist(), y] for x, y, u in zip(*pooled(data), strict=True))
    return read(path, client="who", label="class")[0]


def archive(path: Path, data: Rows) -> FederatedDataset:
    x, y, owner = pooled(data)
    np.savez(path.with_suffix(".npz"), x=x, y=y, client=owner)
    return read(path.with_suffix(".npz"))[0]


def map_style(path: Path, data: Rows) -> FederatedDataset:
    x, y, owner = pooled(data)
    return read_examples(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), owner)


def store(path: Path, data: Rows) -> FederatedDataset:
    save(FederatedDataset.from_clients(data), path)
    return read(path)[0]


def converted(path: Path, data: Rows) -> FederatedDataset:
    """A store by the command line, out of LEAF's JSON."""
    path.with_suffix(".json").write_text(json.dumps(listed(data)))
    command.convert(path.with_suffix(".json"), path)
    return open_dataset(path)


BY_FILE = [leaf, flute_json, flute_hdf5, store, converted]  # clients in the order of the file
BY_ID = [tff, parquet, table, archive, map_style]  # clients in the order of their ids
Write = Callable[[Path, Rows], FederatedDataset]


def trained(data: FederatedDataset) -> torch.Tensor:
    """The model after three rounds of three clients; all of them take part."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 4))
    task = vecfl.Task(module, vecfl.cross_entropy, example=data.examples(2))
    algorithm = vecfl.fedavg(lr=0.3, batches=vecfl.Batches(size=2, epochs=2))
    sim = vecfl.Simulation(task, data, algorithm, vecfl.uniform(3), seed=6, slots=2)
    assert len({k for r in range(3) for k in sim.cohort(r).tolist()}) == data.num_clients
    state = sim.start()
    first = state.server["w"].clone()
    for _ in range(3):
        state, _ = sim.round(state)
    assert (state.server["w"] - first).abs().max() > 0.01  # it learned
    return state.server["w"]


@pytest.mark.parametrize("write", [*BY_FILE, *BY_ID], ids=lambda write: write.__name__)
def test_every_format_gives_the_same_model(tmp_path: Path, write: Write) -> None:
    read_back = write(tmp_path / "data", rows())
    assert list(read_back.client_ids) == ["ann", "bob", "cleo", "dan", "eve"]
    assert torch.equal(trained(read_back), trained(FederatedDataset.from_clients(rows())))


def test_one_label_makes_another_model() -> None:
    other = rows()
    other["cleo"]["y"][3] = (other["cleo"]["y"][3] + 1) % 4
    plain, changed = (FederatedDataset.from_clients(data) for data in (rows(), other))
    assert not torch.equal(trained(plain), trained(changed))


@pytest.mark.parametrize("write", [*BY_FILE, *BY_ID], ids=lambda write: write.__name__)
def test_draws_follow_the_order_of_clients(tmp_path: Path, write: Write) -> None:
    # Draws are keyed by a client's position. Files that list their users keep that order, tables
    # and TFF's HDF5 are sorted by id: they agree once the clients stand in one order.
    backwards = dict(reversed(rows().items()))
    data = write(tmp_path / "data", backwards)
    assert list(data.client_ids) == (list(backwards) if write in BY_FILE else list(rows()))
    right = trained(FederatedDataset.from_clients(rows()))
    assert torch.equal(trained(data), right) == (write in BY_ID)
    ordered = collect(((id_, data.client(data.position(id_))) for id_ in rows()), "sorted")
    assert torch.equal(trained(ordered), right)
