"""Runs side by side: some choices by name, each with several seeds, in a table and a picture."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from vecfl.cli import check
from vecfl.errors import InputError
from vecfl.files import atomic_file
from vecfl.flags import RunArgs, check_run
from vecfl.load import load_run
from vecfl.signals import Stopped

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
log = logging.getLogger("vecfl")


@dataclass
class CompareArgs(RunArgs):
    """Several runs with the same settings."""

    data: str | None = None
    """folder of MNIST's and QMNIST's files; mnist_writers in $VECFL_DATA if not given"""
    seeds: int = 3
    """runs of each: seeds --seed, --seed + 1, ..."""
    rounds: int = 100
    """communication rounds of each run"""
    eval_every: int = 10
    """rounds from one evaluation to the next; the last round is always evaluated"""


Args = TypeVar("Args", bound=CompareArgs)


def check_compared(args: CompareArgs, flag: str, known: Collection[str]) -> None:
    """Raise InputError, with the name of the flag, before anything is made.

    flag  the argument that holds the chosen names, of those that are `known`
    """
    some = f"some of {', '.join(known)}, each once"
    names = getattr(args, flag)
    check(args, (flag,), lambda _: set() < set(names) <= set(known), some)
    check(args, (flag,), lambda _: len(set(names)) == len(names), some)
    check_seeds(args)


def check_seeds(args: CompareArgs) -> None:
    """Raise InputError, with the name of the flag, for what several runs cannot share."""
    check(args, ("seeds",), lambda n: n >= 1, "at least 1")
    check(args, ("resume",), lambda way: way in ("none", "auto"), "none, or auto with --out")
    if args.resume == "none":
        right = "a folder without runs, or --resume auto beside it to go on with them"
        there = Path(args.out or ".").expanduser().glob("*-seed*/config.yaml")
        check(args, ("out",), lambda _: not any(there), right)
    check(args, ("sample_seed",), lambda _: False, "none: cohorts are drawn by the seed of a run")
    same = "none: all runs have the same rounds"
    check(args, ("stop_at", "stop_at_epsilon", "patience"), lambda _: False, same)
    if args.table is not None:
        raise InputError("leave --table away: many rows lie in the directory of their run")
    check_run(args)


def run_all(
    args: Args, names: Sequence[str], out: Path, run_one: Callable[[Args, str], None]
) -> None:
    """`run_one` for each seed and name, with the settings of this run: a directory of its own."""
    for seed in range(args.seed, args.seed + args.seeds):
        for name in names:
            log.info("%s, seed %d", name, seed)
            one = replace(args, out=str(out / f"{name}-seed{seed}"), seed=seed, sample_seed=seed)
            try:
                run_one(one, name)
            except Stopped as stopped:
                on = f"to go on: the same command with --resume auto --out {out}"
                raise Stopped(
                    f"{name}, seed {seed}, is not finished; {on}", stopped.code - 128
                ) from None


def series(out: Path, name: str, args: CompareArgs, *metrics: str) -> list[np.ndarray]:
    """Each metric [seeds, n] in the n rounds after training that have all of them."""
    seeds = range(args.seed, args.seed + args.seeds)
    runs = [load_run(out / f"{name}-seed{seed}").metrics for seed in seeds]
    columns = [np.stack([run[metric] for run in runs]) for metric in metrics]
    there = np.isfinite(columns).all((0, 1)) & (runs[0]["round"] > 0)
    return [column[:, there] for column in columns]


def seeds_of(args: CompareArgs) -> str:
    """What a band of a picture is, for its title."""
    return f"mean and range of {args.seeds} seeds" if args.seeds > 1 else "1 seed"


def spread(values: np.ndarray) -> str:
    """The mean over seeds, worst to best."""
    ends = f"   {values.min():.1%} to {values.max():.1%}" if len(values) > 1 else ""
    return f"{values.mean():7.1%}{ends}"


def draw(
    path: Path,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    title: str,
    x: str,
    scale: str = "linear",
    level: tuple[str, np.ndarray] | None = None,
) -> Path:
    """Write a picture of accuracies [seeds, n] over x [n]: the mean in a band of all seeds.

    level  a name, and the accuracies [seeds] of what has no x: a line from side to side
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for (name, (at, accuracy)), colour in zip(curves.items(), COLOURS, strict=False):
        label = f"{name}: {accuracy[:, -1].mean():.1%}"
        axes.plot(at, accuracy.mean(0), color=colour, label=label, marker=".")
        axes.fill_between(at, accuracy.min(0), accuracy.max(0), color=colour, alpha=0.2, lw=0)
    if level is not None:
        name, ends = level
        label = f"{name}: {ends.mean():.1%}"
        axes.axhline(ends.mean(), color="0.2", linestyle="--", label=label, zorder=1)
    axes.set_xscale(scale)
    axes.set_xlabel(x)
    axes.set_ylabel("accuracy on unseen writers")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if (
        scale == "log" and np.ptp(np.log10(axes.get_xlim())) < 1.5
    ):  # few powers of ten: 2 and 5, too
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(title="at the end")
    with atomic_file(path) as file:
        figure.savefig(file, dpi=120, format="png")
    return path
