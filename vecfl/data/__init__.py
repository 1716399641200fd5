"""Federated data: the dataset that training reads, and ways to split pooled data over clients."""

from vecfl.data import text
from vecfl.data.cifar import read_cifar10, read_cifar100
from vecfl.data.dataset import FederatedDataset
from vecfl.data.describe import describe, draw_partition
from vecfl.data.digits import DIGITS_SCALE, digits
from vecfl.data.examples import example_clients, read_examples
from vecfl.data.flute import flute_clients, read_flute
from vecfl.data.formats import read
from vecfl.data.idx import read_idx
from vecfl.data.leaf import leaf_clients, read_leaf, read_leaf_pair
from vecfl.data.mnist_writers import mnist_writers
from vecfl.data.npz import npz_clients, read_npz
from vecfl.data.parquet import parquet_clients, read_parquet, read_parquet_pair
from vecfl.data.partition import dirichlet, iid, natural, shards
from vecfl.data.shift import affine, draw_affine, draw_angles, rotate
from vecfl.data.skew import classes_per_client, lognormal, power_law, sized_dirichlet
from vecfl.data.split import Split, hold_out
from vecfl.data.store import open_dataset, verify
from vecfl.data.store_writer import save, write_store
from vecfl.data.stream import Clients, Encode, collect
from vecfl.data.tables import csv_clients, read_csv, read_csv_pair
from vecfl.data.tff import read_tff, read_tff_pair, tff_clients

__all__ = [
    "DIGITS_SCALE",
    "Clients",
    "Encode",
    "FederatedDataset",
    "Split",
    "affine",
    "classes_per_client",
    "collect",
    "csv_clients",
    "describe",
    "digits",
    "dirichlet",
    "draw_affine",
    "draw_angles",
    "draw_partition",
    "example_clients",
    "flute_clients",
    "hold_out",
    "iid",
    "leaf_clients",
    "lognormal",
    "mnist_writers",
    "natural",
    "npz_clients",
    "open_dataset",
    "parquet_clients",
    "power_law",
    "read",
    "read_cifar10",
    "read_cifar100",
    "read_csv",
    "read_csv_pair",
    "read_examples",
    "read_flute",
    "read_idx",
    "read_leaf",
    "read_leaf_pair",
    "read_npz",
    "read_parquet",
    "read_parquet_pair",
    "read_tff",
    "read_tff_pair",
    "rotate",
    "save",
    "shards",
    "sized_dirichlet",
    "text",
    "tff_clients",
    "verify",
    "write_store",
]
