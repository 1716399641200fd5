"""Federated data: the dataset that training reads, and ways to split pooled data over clients."""

from vecfl.data.dataset import FederatedDataset
from vecfl.data.describe import describe, draw_partition
from vecfl.data.digits import DIGITS_SCALE, digits
from vecfl.data.idx import read_idx
from vecfl.data.mnist_writers import mnist_writers
from vecfl.data.partition import dirichlet, iid, natural, shards
from vecfl.data.shift import affine, draw_affine, draw_angles, rotate
from vecfl.data.skew import classes_per_client, lognormal, power_law, sized_dirichlet
from vecfl.data.split import Split, hold_out
from vecfl.data.store import open_dataset, verify
from vecfl.data.store_writer import save, write_store

__all__ = [
    "DIGITS_SCALE",
    "FederatedDataset",
    "Split",
    "affine",
    "classes_per_client",
    "describe",
    "digits",
    "dirichlet",
    "draw_affine",
    "draw_angles",
    "draw_partition",
    "hold_out",
    "iid",
    "lognormal",
    "mnist_writers",
    "natural",
    "open_dataset",
    "power_law",
    "read_idx",
    "rotate",
    "save",
    "shards",
    "sized_dirichlet",
    "verify",
    "write_store",
]
