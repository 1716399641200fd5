"""vecfl: federated learning where clients are rows of one matrix and train at the same time."""

from vecfl.algorithms import (
    Algorithm,
    by_examples,
    by_tokens,
    capped,
    fedadagrad,
    fedadam,
    fedavg,
    fedavgm,
    fedopt,
    fedprox,
    fedsgd,
    fedyogi,
    uniform_weights,
)
from vecfl.augment import crop, flip, normalise
from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.evaluate import evaluate, evaluate_clients
from vecfl.load import load_run
from vecfl.losses import accuracy, cross_entropy, squared_error
from vecfl.metrics import f1, precision, recall, top_k_accuracy
from vecfl.modules import batchnorm_to_groupnorm
from vecfl.optim import adam, adamw, momentum, sgd
from vecfl.participation import available, separated
from vecfl.rounds import run
from vecfl.sampling import (
    cyclic,
    everyone,
    fraction,
    poisson,
    uniform,
    uniform_between,
    weighted,
    with_replacement,
)
from vecfl.schedule import Batches
from vecfl.server_optim import (
    fedopt_adagrad,
    fedopt_adam,
    fedopt_yogi,
    server_adam,
    server_momentum,
    server_sgd,
)
from vecfl.simulation import Simulation
from vecfl.state import State
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
    "available",
    "batchnorm_to_groupnorm",
    "by_examples",
    "by_tokens",
    "capped",
    "crop",
    "cross_entropy",
    "cyclic",
    "evaluate",
    "evaluate_clients",
    "everyone",
    "f1",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedopt",
    "fedopt_adagrad",
    "fedopt_adam",
    "fedopt_yogi",
    "fedprox",
    "fedsgd",
    "fedyogi",
    "flip",
    "fraction",
    "load_run",
    "momentum",
    "normalise",
    "poisson",
    "precision",
    "recall",
    "run",
    "separated",
    "server_adam",
    "server_momentum",
    "server_sgd",
    "sgd",
    "squared_error",
    "top_k_accuracy",
    "uniform",
    "uniform_between",
    "uniform_weights",
    "weighted",
    "with_replacement",
]
