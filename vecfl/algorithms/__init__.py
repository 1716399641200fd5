"""Federated algorithms: one paper, one file, each a builder of an `Algorithm` value."""

from vecfl.algorithms.base import Algorithm, Begin, Finished, Upload
from vecfl.algorithms.fedavg import fedavg
from vecfl.algorithms.fedprox import fedprox
from vecfl.algorithms.fedsgd import fedsgd
from vecfl.algorithms.weights import by_examples, by_tokens, capped, uniform_weights

__all__ = [
    "Algorithm",
    "Begin",
    "Finished",
    "Upload",
    "by_examples",
    "by_tokens",
    "capped",
    "fedavg",
    "fedprox",
    "fedsgd",
    "uniform_weights",
]
