"""Federated data: the dataset that training reads, and ways to split pooled data over clients."""

from vecfl.data.dataset import FederatedDataset
from vecfl.data.digits import DIGITS_SCALE, digits
from vecfl.data.idx import read_idx
from vecfl.data.mnist_writers import mnist_writers
from vecfl.data.partition import dirichlet, iid, shards
from vecfl.data.store import open_dataset, verify
from vecfl.data.store_writer import save, write_store

__all__ = [
    "DIGITS_SCALE",
    "FederatedDataset",
    "digits",
    "dirichlet",
    "iid",
    "mnist_writers",
    "open_dataset",
    "read_idx",
    "save",
    "shards",
    "verify",
    "write_store",
]
