"""Stores from the command line.

python -m vecfl.data convert SOURCE DIR     a new store from data of any format
python -m vecfl.data describe DIR           clients, examples, sizes, labels
python -m vecfl.data verify DIR             every byte against its checksum
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from vecfl.data.dataset import FederatedDataset
from vecfl.data.formats import read
from vecfl.data.store import open_dataset, verify
from vecfl.data.store_writer import write_store
from vecfl.errors import InputError

MOST_CLASSES = 20  # that the summary lists


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line says; an InputError becomes one line and exit code 2."""
    parser = argparse.ArgumentParser("python -m vecfl.data", description="Stores of datasets.")
    commands = parser.add_subparsers(dest="command", required=True)
    convert_ = commands.add_parser("convert", help="a new store from other data")
    convert_.add_argument("source", type=Path, help="data that vecfl.data.read understands")
    for name in ("client", "label"):
        convert_.add_argument(f"--{name}", help=f"column of the {name}, in CSV, NPZ and parquet")
    for name, what in (("describe", "what is in a store"), ("verify", "is a store undamaged?")):
        commands.add_parser(name, help=what)
    for command in commands.choices.values():
        command.add_argument("dir", type=Path, help="folder of the store")
    args = parser.parse_args(arguments)
    try:
        if args.command == "convert":
            options = {"client": args.client, "label": args.label}
            given = {name: value for name, value in options.items() if value is not None}
            for folder in convert(args.source, args.dir, **given):
                print(f"{folder}\n{summary(open_dataset(folder))}")
        elif args.command == "verify":
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


def convert(source: Path, folder: Path, **options: str) -> list[Path]:
    """Write what `read` gives to a new store, with a progress bar on a terminal; the stores.

    Where there are training and test data, they are the stores `train` and `test` in the folder.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise InputError("convert needs tqdm, which is not installed: pip install tqdm") from error
    if source.suffix == ".npz":
        options = {"client": "client"} | options
    train, test = read(source, **options)
    parts = {folder: train} if test is None else {folder / "train": train, folder / "test": test}
    for path, data in parts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        clients = _clients(data)
        write_store(path, tqdm(clients, total=data.num_clients, unit=" clients", disable=None))
    return list(parts)


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
