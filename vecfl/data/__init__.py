"""Federated data: the dataset that training reads, and ways to split pooled data over clients."""

from vecfl.data.dataset import FederatedDataset
from vecfl.data.digits import DIGITS_SCALE, digits
from vecfl.data.idx import read_idx
from vecfl.data.leaf import leaf_clients, read_leaf, read_leaf_pair
from vecfl.data.mnist_writers import mnist_writers
from vecfl.data.partition import dirichlet, iid, shards
from vecfl.data.stream import Clients, Encode, collect
from vecfl.data.tables import csv_clients, npz_clients, read_csv, read_npz
from vecfl.data.tff import read_tff, read_tff_pair, tff_clients

__all__ = [
    "Clients",
    "DIGITS_SCALE",
    "Encode",
    "FederatedDataset",
    "collect",
    "csv_clients",
    "digits",
    "dirichlet",
    "iid",
    "leaf_clients",
    "mnist_writers",
    "npz_clients",
    "read_csv",
    "read_idx",
    "read_leaf",
    "read_leaf_pair",
    "read_npz",
    "read_tff",
    "read_tff_pair",
    "shards",
    "tff_clients",
]
