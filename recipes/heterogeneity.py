"""Algorithms on clients that differ: MNIST writers of whom each has few of the digits.

    python recipes/heterogeneity.py
    python recipes/heterogeneity.py --algorithms fedavg dga --labels 1 --seeds 5
    python recipes/heterogeneity.py --out runs/few --resume auto    # again: goes on where it stood

Every writer keeps the images of `--labels` digits, drawn for it; writers whom nobody has seen test,
with all digits. Each algorithm runs with the same seeds, first models and cohorts; a picture shows
their accuracies, the mean over the seeds in a band from the worst to the best. Papers: McMahan et
al. 2017, arXiv:1602.05629 (fedavg); Li et al. 2020, arXiv:1812.06127 (fedprox); Reddi et al. 2021,
arXiv:2003.00295 (fedadam); Dimitriadis et al. 2021, arXiv:2106.07578 (dga).
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import vecfl
from vecfl import Batches
from vecfl.algorithms import Algorithm
from vecfl.cli import check, main
from vecfl.data import FederatedDataset, mnist_writers
from vecfl.data.mnist_writers import default_folder
from vecfl.evaluations import held_out, validated
from vecfl.files import atomic_file
from vecfl.flags import RunArgs, check_run, simulation
from vecfl.mesh import join
from vecfl.record import record_run
from vecfl.resume import resume
from vecfl.signals import Stopped

# The best of a grid for two labels on seed 100, which no picture shows: mean accuracy of rounds 40,
# 50 and 60 for lr 0.03, 0.1, 0.3 with mu 0.01, 0.1, 1 or softmax_beta 0.3, 1, 3 or server_lr 0.003,
# 0.01, 0.03. Beyond its edge lr 1 does not learn (fedavg), and server_lr 0.1 is worse.
ALGORITHMS: dict[str, Callable[[Batches], Algorithm]] = {
    "fedavg": lambda batches: vecfl.fedavg(lr=0.3, batches=batches),
    "fedprox": lambda batches: vecfl.fedprox(lr=0.3, mu=0.01, batches=batches),
    "fedadam": lambda batches: vecfl.fedadam(lr=0.3, server_lr=0.03, batches=batches),
    "dga": lambda batches: vecfl.dga(lr=0.3, softmax_beta=0.3, batches=batches),
}
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
log = logging.getLogger("vecfl")


@dataclass
class Args(RunArgs):
    """FedAvg, FedProx, FedAdam and DGA on MNIST writers with few labels each."""

    data: str | None = None
    """folder of MNIST's and QMNIST's files; mnist_writers in $VECFL_DATA if not given"""
    algorithms: tuple[str, ...] = tuple(ALGORITHMS)
    """which of them run, in this order"""
    seeds: int = 3
    """runs of each: seeds --seed, --seed + 1, ..."""
    labels: int = 2
    """digits that a writer keeps"""
    epochs: int = 5
    """passes over a writer's images in a round"""
    rounds: int = 100
    """communication rounds of each run"""
    eval_every: int = 10
    """rounds from one evaluation to the next; the last round is always evaluated"""


def run(args: Args) -> None:
    check_args(args)
    train, test = mnist_writers(args.data or default_folder())
    now = time.strftime("%Y%m%d-%H%M%S")
    out = Path(join().from_first(lambda: args.out or f"runs/heterogeneity-{now}")).expanduser()
    for seed in range(args.seed, args.seed + args.seeds):
        data = few_labels(train, args.labels, seed)
        for name in args.algorithms:
            log.info("%s, seed %d", name, seed)
            one = replace(args, out=str(out / f"{name}-seed{seed}"), seed=seed, sample_seed=seed)
            try:
                run_one(one, name, data, test)
            except Stopped as stopped:
                on = f"to go on: the same command with --resume auto --out {out}"
                raise Stopped(
                    f"{name}, seed {seed}, is not finished; {on}", stopped.code - 128
                ) from None
    if join().rank == 0:
        print(f"{table(out, args)}\n{draw(out, args)}")


def check_args(args: Args) -> None:
    """Raise InputError, with the name of the flag, before anything is made."""
    some = f"some of {', '.join(ALGORITHMS)}, each once"
    names = args.algorithms
    check(args, ("algorithms",), lambda _: set() < set(names) <= set(ALGORITHMS), some)
    check(args, ("algorithms",), lambda _: len(set(names)) == len(names), some)
    check(args, ("seeds", "epochs"), lambda n: n >= 1, "at least 1")
    check(args, ("labels",), lambda n: 1 <= n <= 10, "1 to 10")
    check(args, ("resume",), lambda way: way in ("none", "auto"), "none, or auto with --out")
    check(args, ("sample_seed",), lambda _: False, "none: cohorts are drawn by the seed of a run")
    if args.resume == "none":
        right = "a folder without runs, or --resume auto beside it to go on with them"
        there = Path(args.out or ".").expanduser().glob("*-seed*/config.yaml")
        check(args, ("out",), lambda _: not any(there), right)
    check(args, ("stop_at", "patience"), lambda _: False, "none: all runs have the same rounds")
    check_run(args)


def few_labels(data: FederatedDataset, labels: int, seed: int) -> FederatedDataset:
    """The examples of each client whose label is among `labels` ones, drawn for the client."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(data.num_clients, 10, generator=generator).argsort(1)[:, :labels]
    client = torch.repeat_interleave(data.sizes)
    mine = (kept[client] == data.columns["y"][:, None]).any(1)
    columns = {name: column[mine] for name, column in data.columns.items()}
    return FederatedDataset.from_arrays(columns, client[mine], num_clients=data.num_clients)


def run_one(args: Args, name: str, data: FederatedDataset, test: FederatedDataset) -> None:
    """One algorithm with one seed, in a directory of its own."""
    data, validation = held_out(args, data, args.seed, clients=True)
    args, before = resume(args, f"heterogeneity, {name}")
    torch.manual_seed(args.seed)
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    task = vecfl.Task(
        module, vecfl.cross_entropy, {"accuracy": vecfl.accuracy}, example=data.examples(2)
    )
    algorithm = ALGORITHMS[name](Batches(args.batch, epochs=args.epochs))
    sim = simulation(args, task, data, algorithm)

    def evaluate(state: vecfl.State) -> dict[str, float | int | str]:
        return sim.evaluate(state, test.columns) | sim.evaluate_clients(state, test)

    record_run(
        sim,
        validated(sim, args, validation, evaluate),
        args,
        recipe=f"heterogeneity, {name}",
        before=before,
    )


def accuracies(out: Path, name: str, args: Args) -> tuple[np.ndarray, np.ndarray]:
    """Evaluated rounds [n] after training, and the accuracy of each seed there [seeds, n]."""
    seeds = range(args.seed, args.seed + args.seeds)
    runs = [vecfl.load_run(out / f"{name}-seed{seed}").metrics for seed in seeds]
    accuracy = np.stack([run["eval/accuracy"] for run in runs])
    rounds = runs[0]["round"]
    there = np.isfinite(accuracy).all(0) & (rounds > 0)
    return rounds[there], accuracy[:, there]


def table(out: Path, args: Args) -> str:
    """The last accuracy of each algorithm: mean over the seeds, worst to best."""
    lines = []
    for name in args.algorithms:
        last = accuracies(out, name, args)[1][:, -1]
        ends = f"   {last.min():.1%} to {last.max():.1%}" if len(last) > 1 else ""
        lines.append(f"{name:<10}{last.mean():7.1%}{ends}")
    return "\n".join(lines)


def draw(out: Path, args: Args) -> Path:
    """Write heterogeneity.png: accuracy on unseen writers over the rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, colour in zip(args.algorithms, COLOURS, strict=False):
        rounds, accuracy = accuracies(out, name, args)
        label = f"{name}: {accuracy[:, -1].mean():.1%}"
        axes.plot(rounds, accuracy.mean(0), color=colour, label=label)
        axes.fill_between(rounds, accuracy.min(0), accuracy.max(0), color=colour, alpha=0.2, lw=0)
    axes.set_xlabel("communication round")
    axes.set_ylabel("accuracy on unseen writers")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.set_title(
        f"MNIST writers with {args.labels} of 10 digits each: "
        + (f"mean and range of {args.seeds} seeds" if args.seeds > 1 else "1 seed")
    )
    axes.grid(alpha=0.3)
    axes.legend(title="at the end")
    with atomic_file(out / "heterogeneity.png") as file:
        figure.savefig(file, dpi=120, format="png")
    return out / "heterogeneity.png"


if __name__ == "__main__":
    main(run, Args)
