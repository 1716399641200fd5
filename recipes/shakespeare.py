"""The next character of Shakespeare's plays: the 715 speaking roles of TFF are the clients.

    python recipes/shakespeare.py --data FOLDER --rounds 100

A role's speeches are cut into windows of 80 characters. The test set is TFF's: later speeches of
the same roles. Loss and accuracy are means over the characters that are predicted, the end of a
speech being one of them; padding does not count. McMahan et al. 2017, arXiv:1602.05629 (the task,
fedavg); Reddi et al. 2021, arXiv:2003.00295 (this version of it).
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import vecfl
from vecfl.algorithm_flags import AlgorithmArgs, check_algorithm, make_algorithm, settle
from vecfl.cli import main
from vecfl.data import FederatedDataset, read_tff_pair, text
from vecfl.evaluations import held_out, validated
from vecfl.flags import check_run, simulation
from vecfl.models import CharGRU, CharLSTM, WindowLM
from vecfl.named import named_model
from vecfl.record import record_run
from vecfl.resume import resume

LENGTH = 80  # characters of a window
# Of the clients' optimizer.
LR = {"sgd": 1.0, "momentum": 0.1, "adam": 0.003, "adamw": 0.003, "rmsprop": 0.003}
LR |= {"adagrad": 0.03}
MODELS = {"window": WindowLM, "lstm": CharLSTM, "gru": CharGRU}
DOWNLOAD = (
    "shakespeare_train.h5 and shakespeare_test.h5 of TensorFlow Federated, "
    "tff.simulation.datasets.shakespeare (HDF5, not the newer SQLite)"
)
log = logging.getLogger("vecfl")


@dataclass
class Args(AlgorithmArgs):
    """The next character of Shakespeare's plays: speaking roles are the clients."""

    rounds: int = 250
    """communication rounds"""
    batch: int = 4
    """windows of 80 characters in a batch; for fedsgd, of a micro-batch"""
    eval_every: int = 25
    """rounds from one evaluation to the next; the last round is always evaluated"""
    data: str | None = None
    """folder of TFF's *_train.h5 and *_test.h5; $VECFL_DATA/shakespeare_tff if not given"""
    model: str = "window"
    """window, of the last 10 characters; lstm, that of Reddi et al.; gru; or file.py:name, a
    function of the classes, which are the characters"""


def run(args: Args) -> None:
    args = settle(args, LR)
    check_algorithm(args)
    check_run(args)
    vocabulary = text.tff_characters()
    train, test = read_tff_pair(data_folder(args), text.characters(vocabulary, LENGTH))
    character, share = most_frequent(train.columns["y"], test.columns["y"])
    log.info(
        "always %r is right for %.1f %% of the test characters",
        *(vocabulary.tokens[character], 100 * share),
    )
    train, validation = held_out(args, train, args.seed)
    args, before = resume(args, "shakespeare")
    sim = make_simulation(args, train, len(vocabulary))

    def evaluate(state: vecfl.State) -> dict[str, float | int | str]:
        return sim.evaluate(state, test.columns) | sim.evaluate_clients(state, test)

    record_run(
        sim,
        validated(sim, args, validation, evaluate),
        args,
        recipe="shakespeare",
        before=before,
    )


def data_folder(args: Args) -> Path:
    """--data, or shakespeare_tff in the folder that VECFL_DATA names, or here."""
    default = Path(os.environ.get("VECFL_DATA", "."), "shakespeare_tff")
    folder = default if args.data is None else Path(args.data).expanduser()
    if not folder.is_dir():
        named = args.data is not None or "VECFL_DATA" in os.environ
        unset = "" if named else " here, and VECFL_DATA is not set"
        raise vecfl.InputError(f"--data: no folder {folder}{unset}; it should hold {DOWNLOAD}")
    return folder


def most_frequent(train: Tensor, test: Tensor) -> tuple[int, float]:
    """The most frequent character of the training labels, and its share of the test labels."""
    character = int(train[train >= 0].bincount().argmax())
    return character, float((test[test >= 0] == character).double().mean())


def make_simulation(args: Args, data: FederatedDataset, vocabulary: int) -> vecfl.Simulation:
    torch.manual_seed(args.seed)
    metrics = {"accuracy": vecfl.accuracy}
    module = named_model(args.model, MODELS, vocabulary)
    task = vecfl.Task(module, vecfl.cross_entropy, metrics, example=data.examples(2))
    algorithm = make_algorithm(args, vecfl.count_tokens(data.columns["y"]))
    return simulation(args, task, data, algorithm)


if __name__ == "__main__":
    main(run, Args)
