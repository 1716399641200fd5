"""vecfl: federated learning where clients are rows of one matrix and train at the same time."""

from vecfl.algorithms import (
    Algorithm,
    by_examples,
    by_tokens,
    capped,
    fedavg,
    fedprox,
    fedsgd,
    uniform_weights,
)
from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.evaluate import evaluate, evaluate_clients
from vecfl.losses import accuracy, cross_entropy, squared_error
from vecfl.modules import batchnorm_to_groupnorm
from vecfl.optim import adam, adamw, momentum, server_sgd, sgd
from vecfl.sampling import everyone, uniform
from vecfl.schedule import Batches
from vecfl.simulation import Simulation, State, run
from vecfl.task import Task

__version__ = "0.1.0"
__all__ = [
    "Algorithm",
    "Batches",
    "FederatedDataset",
    "InputError",
    "Simulation",
    "State",
    "Task",
    "accuracy",
    "adam",
    "adamw",
    "batchnorm_to_groupnorm",
    "by_examples",
    "by_tokens",
    "capped",
    "cross_entropy",
    "evaluate",
    "evaluate_clients",
    "everyone",
    "fedavg",
    "fedprox",
    "fedsgd",
    "momentum",
    "run",
    "server_sgd",
    "sgd",
    "squared_error",
    "uniform",
    "uniform_weights",
]
