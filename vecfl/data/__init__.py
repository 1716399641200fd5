"""Federated data: the dataset that training reads, and ways to split pooled data over clients."""

from vecfl.data.dataset import FederatedDataset
from vecfl.data.digits import DIGITS_SCALE, digits
from vecfl.data.partition import dirichlet, iid, shards

__all__ = ["DIGITS_SCALE", "FederatedDataset", "digits", "dirichlet", "iid", "shards"]
