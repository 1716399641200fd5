"""Accuracy against bytes: codecs of what clients send, on MNIST by its writers.

    python recipes/communication.py
    python recipes/communication.py --codecs none top-k --seeds 1 --rounds 300
    python recipes/communication.py --out runs/bytes --resume auto  # again: goes on where it stood

FedAvg on the images of 539 writers; 297 others test. Each codec runs with the same seeds, first
models and cohorts; a picture shows the accuracy over the megabytes that all clients have sent so
far. Papers: Hipolito Garcia et al. 2022, arXiv:2203.13789 (flute); Alistarh et al. 2017,
arXiv:1610.02132 (qsgd); Karimireddy et al. 2019, arXiv:1901.09847 (sign and top-k, whose clients
keep what was not sent).
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import vecfl
from vecfl import Batches
from vecfl.cli import check, main
from vecfl.compare import CompareArgs, check_compared, draw, run_all, seeds_of, series, spread
from vecfl.data import FederatedDataset, mnist_writers
from vecfl.data.mnist_writers import default_folder
from vecfl.evaluations import held_out, validated
from vecfl.flags import simulation
from vecfl.mesh import join
from vecfl.privacy_flags import fair_weights
from vecfl.record import record_run
from vecfl.resume import resume

CODECS: dict[str, tuple[vecfl.Transform, ...]] = {
    "none": (),
    "flute": (vecfl.flute_quantizer(8, threshold=0.9),),
    "qsgd": (vecfl.qsgd(7),),
    "top-k": (vecfl.error_feedback(vecfl.top_k(0.01)),),
    "sign": (vecfl.error_feedback(vecfl.scaled_sign()),),
}


@dataclass
class Args(CompareArgs):
    """FedAvg on MNIST writers, whose messages pass through codecs."""

    codecs: tuple[str, ...] = tuple(CODECS)
    """which of them run, in this order"""
    lr: float = 0.1
    """learning rate of the clients"""
    epochs: int = 1
    """passes over a writer's images in a round"""


def run(args: Args) -> None:
    check(args, ("epochs",), lambda n: n >= 1, "at least 1")
    check(args, ("lr",), lambda lr: lr > 0, "a positive number")
    check(args, ("transforms",), lambda some: not some, "none: a codec of --codecs stands last")
    check_compared(args, "codecs", CODECS)
    train, test = mnist_writers(args.data or default_folder())
    now = time.strftime("%Y%m%d-%H%M%S")
    out = Path(join().from_first(lambda: args.out or f"runs/communication-{now}")).expanduser()
    run_all(args, args.codecs, out, lambda one, name: run_one(one, name, train, test))
    if join().rank == 0:
        metrics = ("eval/accuracy", "comm/total_up_bytes")
        found = {name: series(out, name, args, *metrics) for name in args.codecs}
        for name, (accuracy, sent) in found.items():
            print(f"{name:<8}{sent[:, -1].mean() / 1e6:9.1f} MB {spread(accuracy[:, -1])}")
        curves = {name: (sent.mean(0) / 1e6, accuracy) for name, (accuracy, sent) in found.items()}
        title = f"FedAvg on MNIST writers, {args.rounds} rounds: {seeds_of(args)}"
        x = "megabytes that clients have sent"
        print(draw(out / "communication.png", curves, title, x, scale="log"))


def run_one(args: Args, name: str, data: FederatedDataset, test: FederatedDataset) -> None:
    """One codec with one seed, in a directory of its own."""
    data, validation = held_out(args, data, args.seed, clients=True)
    args, before = resume(args, f"communication, {name}")
    torch.manual_seed(args.seed)
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    task = vecfl.Task(
        module, vecfl.cross_entropy, {"accuracy": vecfl.accuracy}, example=data.examples(2)
    )
    batches, weights = Batches(args.batch, epochs=args.epochs), fair_weights(args)
    fedavg = vecfl.fedavg(lr=args.lr, batches=batches, weights=weights)
    sim = simulation(args, task, data, vecfl.chain(fedavg, *CODECS[name]))

    def evaluate(state: vecfl.State) -> dict[str, float | int | str]:
        return sim.evaluate(state, test.columns)

    record_run(
        sim,
        validated(sim, args, validation, evaluate),
        args,
        recipe=f"communication, {name}",
        before=before,
    )


if __name__ == "__main__":
    main(run, Args)
