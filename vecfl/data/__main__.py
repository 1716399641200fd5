"""Stores from the command line.

python -m vecfl.data convert SOURCE DIR     a new store from other data
python -m vecfl.data describe DIR           clients, examples, sizes, labels
python -m vecfl.data verify DIR             every byte against its checksum

What needs a Python function (encode=, a partition) or an option without a flag here becomes a store
in Python: write_store(DIR, csv_clients(...)).
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vecfl.data import text
from vecfl.data.columns import in_words
from vecfl.data.dataset import FederatedDataset
from vecfl.data.formats import read
from vecfl.data.store import PAIR, is_store, open_dataset, verify
from vecfl.data.store_writer import write_store
from vecfl.errors import InputError

MOST_CLASSES = 20  # that the summary lists
TEXTS = {
    "leaf": lambda: text.next_character(text.leaf_characters()),
    "tff": lambda: text.characters(text.tff_characters(), length=80),
}


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line says; an InputError becomes one line and exit code 2."""
    parser = argparse.ArgumentParser("python -m vecfl.data", description="Stores of datasets.")
    commands = parser.add_subparsers(dest="command", required=True)
    convert_ = commands.add_parser("convert", help="a new store from other data")
    convert_.add_argument("source", type=Path, help="data that vecfl.data.read understands")
    convert_.add_argument("--client", help="column of the client, in CSV, NPZ and parquet")
    convert_.add_argument("--label", help="column of the label, in CSV and parquet")
    convert_.add_argument("--missing", type=float, help="number in place of NaN, in CSV and NPZ")
    convert_.add_argument("--text", choices=TEXTS, help="Shakespeare's characters as ids")
    convert_.epilog = "Data that need more: write_store(DIR, csv_clients(...)) in Python."
    for name, what in (("describe", "what is in a store"), ("verify", "is a store undamaged?")):
        commands.add_parser(name, help=what)
    for command in commands.choices.values():
        command.add_argument("dir", type=Path, help="folder of the store")
    args = parser.parse_args(arguments)
    try:
        if args.command == "convert":
            options = {name: getattr(args, name) for name in ("client", "label", "missing")}
            options["encode"] = TEXTS[args.text]() if args.text else None
            given = {name: value for name, value in options.items() if value is not None}
            for folder in convert(args.source, args.dir, **given):
                print(f"{folder}\n{summary(open_dataset(folder))}")
        elif args.command == "verify":
            for folder in stores(args.dir):
                verify(folder)
                print(f"{folder}: undamaged")
        else:
            for folder in stores(args.dir):
                heading = "" if folder == args.dir else f"{folder}\n"
                print(heading + summary(open_dataset(folder)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def stores(folder: Path) -> list[Path]:
    """The store itself, or the stores train and test in the folder."""
    both = [folder / half for half in PAIR]
    return both if not is_store(folder) and any(map(is_store, both)) else [folder]


def convert(source: Path, folder: Path, **options: Any) -> list[Path]:
    """Write what `read` gives to a new store, with a progress bar on a terminal; the stores.

    Where there are training and test data, they are the stores `train` and `test` in the folder.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise InputError("convert needs tqdm, which is not installed: pip install tqdm") from error
    train, test = read(source, **options)
    parts = {folder: train} if test is None else {folder / "train": train, folder / "test": test}
    for path, data in parts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        clients = _clients(data)
        write_store(path, tqdm(clients, total=data.num_clients, unit=" clients", disable=None))
    return list(parts)


def summary(data: FederatedDataset) -> str:
    """Clients, examples, columns, quantiles of sizes, and how often each label `y` occurs."""
    columns = ", ".join(
        f"{name} {str(c.dtype).removeprefix('torch.')} {list(c.shape[1:])}"
        for name, c in data.columns.items()
    )
    lines = {
        "clients": f"{data.num_clients:,}",
        "examples": f"{data.num_examples:,}, columns {columns}",
        "examples a client": in_words(data.sizes.numpy()),
    }
    if histogram := _labels(data.columns):
        lines["label y"] = histogram
    return "\n".join(f"{name:<19}{what}" for name, what in lines.items())


def _labels(columns: Mapping[str, Tensor]) -> str:
    """The most frequent labels, each with its examples; empty where `y` [n] is no integer."""
    y = columns.get("y")
    if y is None or y.dim() != 1 or y.is_floating_point() or y.is_complex():
        return ""
    labels, counts = np.unique(y.numpy(), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_CLASSES]
    listed = order if len(labels) > MOST_CLASSES else np.arange(len(labels))
    histogram = ", ".join(f"{labels[c]}: {counts[c]:,}" for c in listed)
    others = len(labels) - len(listed)
    return histogram + (f", {others:,} others" if others else "")


def _clients(data: FederatedDataset) -> Iterator[tuple[object, dict[str, Tensor]]]:
    ids = iter(data.client_ids)
    return ((id_, data.client(k)) for k, id_ in enumerate(ids))


if __name__ == "__main__":
    main()
