"""vecfl: federated learning where clients are rows of one matrix and train at the same time."""

from vecfl.algorithms import (
    Algorithm,
    by_examples,
    by_tokens,
    capped,
    clients_on_plateau,
    dga,
    ema,
    fedadagrad,
    fedadam,
    fedavg,
    fedavgm,
    fedopt,
    fedprox,
    fedprox_adaptive,
    fedsgd,
    fedyogi,
    server_on_plateau,
    uniform_weights,
)
from vecfl.augment import crop, flip, normalise
from vecfl.data import FederatedDataset
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
from vecfl.transforms import (
    Transform,
    chain,
    clip_by_layer,
    clip_by_norm,
    error_feedback,
    flute_quantizer,
    qsgd,
    random_k,
    scaled_sign,
    stochastic_quantizer,
    top_k,
)
from vecfl.within_round import within_round
from vecfl.work import random_epochs

__version__ = "0.1.0"
__all__ = [
    "Algorithm",
    "Batches",
    "FederatedDataset",
    "InputError",
    "Simulation",
    "State",
    "Task",
    "Transform",
    "error_feedback",
    "flute_quantizer",
    "qsgd",
    "random_k",
    "scaled_sign",
    "stochastic_quantizer",
    "top_k",
    "accuracy",
    "adagrad",
    "adam",
    "adamw",
    "available",
    "batchnorm_to_groupnorm",
    "by_examples",
    "by_tokens",
    "capped",
    "chain",
    "clip_by_layer",
    "clip_by_norm",
    "count_tokens",
    "crop",
    "cross_entropy",
    "cyclic",
    "dga",
    "clients_on_plateau",
    "clipped",
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
    "ramp_hold_decay",
    "replay",
    "precision",
    "recall",
    "run",
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
    "step_decay",
    "top_k_accuracy",
    "uniform",
    "uniform_between",
    "uniform_weights",
    "weighted",
    "with_replacement",
    "within_round",
]
