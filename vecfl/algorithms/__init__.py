"""Federated algorithms: one paper, one file, each a builder of an `Algorithm` value."""

from vecfl.algorithms.base import Algorithm, Begin, Finished, Gradient, Round, Starting, Upload
from vecfl.algorithms.carrying import carrying
from vecfl.algorithms.delayed import delayed, polynomial
from vecfl.algorithms.dga import dga
from vecfl.algorithms.dp_sgd import dp_sgd
from vecfl.algorithms.ema import ema
from vecfl.algorithms.fedavg import fedavg
from vecfl.algorithms.feddyn import feddyn
from vecfl.algorithms.fednova import fednova
from vecfl.algorithms.fedopt import fedadagrad, fedadam, fedavgm, fedopt, fedyogi
from vecfl.algorithms.fedprox import fedprox, fedprox_adaptive
from vecfl.algorithms.fedsgd import fedsgd
from vecfl.algorithms.plateau import clients_on_plateau, server_on_plateau
from vecfl.algorithms.scaffold import scaffold
from vecfl.algorithms.weights import by_examples, by_tokens, capped, uniform_weights

__all__ = [
    "Algorithm",
    "Begin",
    "Finished",
    "Gradient",
    "Round",
    "Starting",
    "Upload",
    "by_examples",
    "by_tokens",
    "capped",
    "delayed",
    "dga",
    "dp_sgd",
    "carrying",
    "clients_on_plateau",
    "ema",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "feddyn",
    "fednova",
    "fedopt",
    "fedprox",
    "fedprox_adaptive",
    "fedsgd",
    "fedyogi",
    "scaffold",
    "server_on_plateau",
    "polynomial",
    "uniform_weights",
]
