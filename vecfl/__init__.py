"""vecfl: federated learning where clients are rows of one matrix and train at the same time."""

from vecfl.aggregator import aggregated_by
from vecfl.algorithms import (
    Algorithm,
    by_examples,
    by_tokens,
    capped,
    clients_on_plateau,
    delayed,
    dga,
    ema,
    fedadagrad,
    fedadam,
    fedavg,
    fedavgm,
    feddyn,
    fednova,
    fedopt,
    fedprox,
    fedprox_adaptive,
    fedsgd,
    fedyogi,
    polynomial,
    scaffold,
    server_on_plateau,
    uniform_weights,
)
from vecfl.augment import crop, flip, normalise
from vecfl.data import FederatedDataset
from vecfl.delays import Delay, delay_trace, drawn_delay, stale
from vecfl.errors import InputError
from vecfl.evaluate import evaluate, evaluate_clients
from vecfl.layout import freeze
from vecfl.load import load_run
from vecfl.losses import accuracy, count_tokens, cross_entropy, squared_error
from vecfl.metrics import f1, precision, recall, top_k_accuracy
from vecfl.modules import batchnorm_to_groupnorm
from vecfl.optim import adagrad, adam, adamw, momentum, rmsprop, sgd
from vecfl.participation import available, separated
from vecfl.replay import replay
from vecfl.robust import coordinate_median, trimmed_mean
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
from vecfl.schedules import (
    cosine,
    linear_warmup,
    multi_step,
    ramp_hold_decay,
    scaled,
    step_decay,
)
from vecfl.server_optim import (
    clipped,
    fedopt_adagrad,
    fedopt_adam,
    fedopt_yogi,
    scheduled,
    server_adam,
    server_adamax,
    server_adamw,
    server_lamb,
    server_lars,
    server_momentum,
    server_sgd,
)
from vecfl.simulation import Simulation
from vecfl.state import State
from vecfl.task import Task
from vecfl.transforms import Transform, chain, clip_by_layer, clip_by_norm
from vecfl.within_round import by_step, within_round
from vecfl.work import random_epochs

__version__ = "0.1.0"
__all__ = [
    "Algorithm",
    "Batches",
    "Delay",
    "FederatedDataset",
    "InputError",
    "Simulation",
    "State",
    "Task",
    "Transform",
    "accuracy",
    "adagrad",
    "adam",
    "adamw",
    "aggregated_by",
    "available",
    "batchnorm_to_groupnorm",
    "by_examples",
    "by_step",
    "by_tokens",
    "capped",
    "chain",
    "clip_by_layer",
    "clip_by_norm",
    "count_tokens",
    "crop",
    "cross_entropy",
    "cyclic",
    "delay_trace",
    "delayed",
    "dga",
    "drawn_delay",
    "clients_on_plateau",
    "clipped",
    "coordinate_median",
    "cosine",
    "ema",
    "evaluate",
    "evaluate_clients",
    "everyone",
    "f1",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "feddyn",
    "fednova",
    "fedopt",
    "fedopt_adagrad",
    "fedopt_adam",
    "fedopt_yogi",
    "fedprox",
    "fedprox_adaptive",
    "fedsgd",
    "fedyogi",
    "flip",
    "fraction",
    "freeze",
    "linear_warmup",
    "load_run",
    "momentum",
    "multi_step",
    "normalise",
    "poisson",
    "polynomial",
    "ramp_hold_decay",
    "replay",
    "precision",
    "recall",
    "run",
    "scaffold",
    "scaled",
    "random_epochs",
    "rmsprop",
    "scheduled",
    "separated",
    "server_adam",
    "server_adamax",
    "server_adamw",
    "server_lamb",
    "server_lars",
    "server_momentum",
    "server_on_plateau",
    "server_sgd",
    "sgd",
    "squared_error",
    "stale",
    "step_decay",
    "top_k_accuracy",
    "trimmed_mean",
    "uniform",
    "uniform_between",
    "uniform_weights",
    "weighted",
    "with_replacement",
    "within_round",
]
