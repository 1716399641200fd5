"""Accuracy against epsilon: how much noise a private model of MNIST's writers can bear.

    python recipes/dp_mnist_writers.py
    python recipes/dp_mnist_writers.py --noise-multipliers 1 4 --seeds 1 --rounds 200
    python recipes/dp_mnist_writers.py --out runs/dp --resume auto   # again: goes on where it stood
    python recipes/dp_mnist_writers.py --stands-for 1000000 1000 --noise-multipliers 0.5 1

Logistic regression by FedAvg on the images of 539 writers, of whom each takes part in a round by
itself; 297 others test. What a writer sends is clipped, and the sum gets Gaussian noise: a writer
is what is protected (McMahan et al. 2018, arXiv:1710.06963). Each noise multiplier, and training
without clip and noise, runs with the same seeds, first models and cohorts; a picture shows the
accuracy over the epsilon spent so far. With --stands-for the noise and epsilon are those of C
clients a round out of N: a simulation of a larger population, and the picture says so.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import vecfl
from vecfl import Batches
from vecfl.cli import check, main
from vecfl.compare import CompareArgs, check_seeds, draw, run_all, seeds_of, series, spread
from vecfl.data import FederatedDataset, mnist_writers
from vecfl.data.mnist_writers import default_folder
from vecfl.evaluations import held_out, validated
from vecfl.flags import simulation
from vecfl.mesh import join
from vecfl.models import logistic
from vecfl.record import record_run
from vecfl.resume import resume

NONE = "no-privacy"
# Of norms 0.3, 0.5 and 0.7 the best at z = 4 and 8 on seed 100, which no picture shows.
CLIP = "clip_by_norm(0.3)"


@dataclass
class Args(CompareArgs):
    """Private FedAvg on MNIST writers, with several amounts of noise."""

    noise_multipliers: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    """which of them run, in this order; training without clip and noise runs first"""
    private_clip: str | None = CLIP
    """the bound of what a writer sends: clip_by_norm(0.3), clip_by_layer(0.3), ..."""
    eval_every: int = 5
    """rounds from one evaluation to the next; the last round is always evaluated"""
    cohort: int = 100
    """writers that train in a round, in the mean"""
    lr: float = 0.1
    """learning rate of the clients"""
    epochs: int = 1
    """passes over a writer's images in a round"""


def run(args: Args) -> None:
    check_args(args)
    train, test = mnist_writers(args.data or default_folder())
    if args.sampler is None:  # of training without privacy, too
        args = replace(args, sampler=f"poisson({args.cohort / train.num_clients})")
    now = time.strftime("%Y%m%d-%H%M%S")
    out = Path(join().from_first(lambda: args.out or f"runs/dp_mnist_writers-{now}")).expanduser()
    noise = {f"z={z:g}": z for z in args.noise_multipliers}

    def one(of_seed: Args, name: str) -> None:
        run_one(with_noise(of_seed, noise.get(name)), name, train, test)

    run_all(args, [NONE, *noise], out, one)
    if join().rank == 0:
        print(report(args, out, list(noise), train.num_clients))


def check_args(args: Args) -> None:
    """Raise InputError, with the name of the flag, before anything is made."""
    check(args, ("epochs",), lambda n: n >= 1, "at least 1")
    check(args, ("lr",), lambda lr: lr > 0, "a positive number")
    chosen, some = args.noise_multipliers, "some numbers above 0, each once"
    right = bool(chosen) and min(chosen) > 0 and len(set(chosen)) == len(chosen)
    check(args, ("noise_multipliers",), lambda _: right, some)
    own = "none: the noise is that of --noise-multipliers"
    check(args, ("noise_multiplier", "epsilon"), lambda _: False, own)
    if args.private_clip is None:
        raise vecfl.InputError(f"--private-clip: expected a bound such as {CLIP}")
    check_seeds(replace(args, noise_multiplier=chosen[0]))


def with_noise(args: Args, z: float | None) -> Args:
    """The settings of one run; None: without privacy."""
    args = replace(args, noise_multipliers=(), noise_multiplier=z)
    if z is not None:
        return args
    return replace(args, private_clip=None, delta=None, accountant=None, stands_for=None)


def run_one(args: Args, name: str, data: FederatedDataset, test: FederatedDataset) -> None:
    """One amount of noise with one seed, in a directory of its own."""
    data, validation = held_out(args, data, args.seed, clients=True)
    args, before = resume(args, f"dp_mnist_writers, {name}")
    torch.manual_seed(args.seed)
    metrics = {"accuracy": vecfl.accuracy}
    task = vecfl.Task(logistic(10), vecfl.cross_entropy, metrics, example=data.examples(2))
    batches = Batches(args.batch, epochs=args.epochs)
    algorithm = vecfl.fedavg(lr=args.lr, batches=batches, weights=vecfl.uniform_weights)
    sim = simulation(args, task, data, algorithm)

    def evaluate(state: vecfl.State) -> dict[str, float | int | str]:
        return sim.evaluate(state, test.columns)

    record_run(
        sim,
        validated(sim, args, validation, evaluate),
        args,
        recipe=f"dp_mnist_writers, {name}",
        before=before,
    )


def report(args: Args, out: Path, names: Sequence[str], writers: int) -> Path:
    """Print what each amount of noise came to, and draw it."""
    (without,) = series(out, NONE, args, "eval/accuracy")
    print(f"{'without privacy':<34}{spread(without[:, -1])}")
    curves = {}
    for name in names:
        metrics = ("privacy/epsilon", "privacy/delta", "eval/accuracy")
        spent, deltas, accuracy = series(out, name, args, *metrics)
        final, delta = spent[0, -1], deltas[0, -1]
        print(f"{name:<8}epsilon {final:<18.3g}{spread(accuracy[:, -1])}")
        curves[f"noise multiplier {name[2:]}, epsilon {final:.2g}"] = spent[0], accuracy
    what = f"{args.private_clip}, {args.cohort} a round, {args.rounds} rounds"
    title = f"Private FedAvg on {writers} MNIST writers: {what}\n"
    title += f"Each line is a run from its first evaluation to its end: {seeds_of(args)}"
    if args.stands_for is not None:
        clients, cohort = args.stands_for
        title += f"\nSIMULATION: noise and epsilon of {cohort:,} clients a round out of {clients:,}"
    x = f"epsilon that a writer has spent so far (less is more private; delta {delta:.2g})"
    level = "without privacy", without[:, -1]
    return draw(out / "dp_mnist_writers.png", curves, title, x, scale="log", level=level)


if __name__ == "__main__":
    main(run, Args)
