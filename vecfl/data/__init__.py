"""Federated data: the dataset that training reads, and ways to split pooled data over clients."""

from vecfl.data.dataset import FederatedDataset
from vecfl.data.digits import DIGITS_SCALE, digits
from vecfl.data.idx import read_idx
from vecfl.data.mnist_writers import mnist_writers
from vecfl.data.partition import dirichlet, iid, shards
from vecfl.data.stream import Clients, Encode, collect

__all__ = [
    "Clients",
    "DIGITS_SCALE",
    "Encode",
    "FederatedDataset",
    "collect",
    "digits",
    "dirichlet",
    "iid",
    "mnist_writers",
    "read_idx",
    "shards",
]
