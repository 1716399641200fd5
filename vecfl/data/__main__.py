"""Stores from the command line.

python -m vecfl.data convert SOURCE DIR     a new store from a .npz file or another store
python -m vecfl.data describe DIR           clients, examples, sizes, labels
python -m vecfl.data verify DIR             every byte against its checksum
"""

import argparse
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile
from torch import Tensor

from vecfl.data.dataset import FederatedDataset
from vecfl.data.store import open_dataset, verify
from vecfl.data.store_writer import write_store
from vecfl.errors import InputError

MOST_CLASSES = 20  # that the summary lists


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line says; an InputError becomes one line and exit code 2."""
    parser = argparse.ArgumentParser("python -m vecfl.data", description="Stores of datasets.")
    commands = parser.add_subparsers(dest="command", required=True)
    convert_ = commands.add_parser("convert", help="a new store from other data")
    convert_.add_argument("source", type=Path, help=".npz with columns and 'client', or a store")
    for name, what in (("describe", "what is in a store"), ("verify", "is a store undamaged?")):
        commands.add_parser(name, help=what)
    for command in commands.choices.values():
        command.add_argument("dir", type=Path, help="folder of the store")
    args = parser.parse_args(arguments)
    try:
        if args.command == "convert":
            convert(args.source, args.dir)
        if args.command == "verify":
            verify(args.dir)
            print(f"{args.dir}: undamaged")
        else:
            print(summary(open_dataset(args.dir)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def convert(source: Path, folder: Path) -> None:
    """Write what `read_source` reads to a new store, with a progress bar on a terminal."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise InputError("convert needs tqdm, which is not installed: pip install tqdm") from error
    data = read_source(source)
    clients = tqdm(_clients(data), total=data.num_clients, unit=" clients", disable=None)
    write_store(folder, clients)


def read_source(source: Path) -> FederatedDataset:
    """The dataset of a store, or of a .npz file: columns [n, ...], `client` [n] and no pickles."""
    if source.is_dir() or source.suffix != ".npz":
        return open_dataset(source)
    try:
        with source.open("rb") as raw, NpzFile(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{source}: cannot be read as a .npz file: {error}") from error
    if "client" not in arrays:
        names = ", ".join(arrays) or "none"
        raise InputError(f"{source}: no array 'client', the client of each example; it has {names}")
    client = arrays.pop("client")
    try:
        return FederatedDataset.from_arrays(arrays, client)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def summary(data: FederatedDataset) -> str:
    """Clients, examples, columns, quantiles of sizes, and how often each label `y` occurs."""
    points = np.percentile(data.sizes.numpy(), (0, 10, 50, 90, 100), method="inverted_cdf")
    names = ("min", "10 %", "median", "90 %", "max")
    columns = ", ".join(
        f"{name} {str(c.dtype).removeprefix('torch.')} {list(c.shape[1:])}"
        for name, c in data.columns.items()
    )
    lines = {
        "clients": f"{data.num_clients:,}",
        "examples": f"{data.num_examples:,}, columns {columns}",
        "examples a client": ", ".join(f"{a} {q:,}" for a, q in zip(names, points, strict=True)),
    }
    if histogram := _labels(data.columns):
        lines["label y"] = histogram
    return "\n".join(f"{name:<19}{text}" for name, text in lines.items())


def _labels(columns: Mapping[str, Tensor]) -> str:
    """The most frequent labels, each with its examples; empty where `y` [n] is no integer."""
    y = columns.get("y")
    if y is None or y.dim() != 1 or y.is_floating_point() or y.is_complex():
        return ""
    labels, counts = np.unique(y.numpy(), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_CLASSES]
    listed = order if len(labels) > MOST_CLASSES else np.arange(len(labels))
    text = ", ".join(f"{labels[c]}: {counts[c]:,}" for c in listed)
    others = len(labels) - len(listed)
    return text + (f", {others:,} others" if others else "")


def _clients(data: FederatedDataset) -> Iterator[tuple[object, dict[str, Tensor]]]:
    ids = iter(data.client_ids)
    return ((id_, data.client(k)) for k, id_ in enumerate(ids))


if __name__ == "__main__":
    main()
