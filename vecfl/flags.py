"""Flags that all recipes share: a dataclass to inherit from, and what its values mean."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import vecfl.sampling as sampling
import vecfl.transforms as transforms
from vecfl.algorithms import Algorithm
from vecfl.arrangement import has_device
from vecfl.cli import check
from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.evaluations import EvaluationArgs
from vecfl.losses import Batch
from vecfl.mesh import join
from vecfl.model_file import check_safetensors, warm_start
from vecfl.named import named_aggregator, named_metrics, named_sampler, named_transform
from vecfl.parts import surrounded
from vecfl.privacy_flags import PrivacyArgs, check_privacy, poisson_cohorts, privately
from vecfl.profile import ROUNDS
from vecfl.report import check_matplotlib
from vecfl.sampling import Sampler
from vecfl.simulation import Simulation
from vecfl.stop import Stop
from vecfl.task import Task
from vecfl.track import check_out, check_wandb
from vecfl.watch import Watch

AS_HERE = "seed sample_seed client_dropout device backend workers processes threads slots precision"
AS_HERE += " graphs exact_sums statistics"  # arguments of Simulation by the same names


@dataclass
class RunArgs(EvaluationArgs, PrivacyArgs):
    """A run: where it goes, how long it is, its seeds, and what it runs on."""

    out: str | None = None
    """run directory, new or empty; runs/<recipe>-<time> if not given"""
    track: Literal["auto", "wandb", "none"] = "auto"
    """Weights & Biases, online if logged in, else offline; auto goes on where it is missing"""
    rounds: int = 100
    """communication rounds"""
    cohort: int = 20
    """clients that train in a round"""
    batch: int = 10
    """examples in a batch"""
    seed: int = 0
    """seed of the run: first model, shuffles, dropout"""
    sample_seed: int | None = None
    """seed of the cohorts; --seed if not given"""
    device: str = "cpu"
    """where to train: cpu, cuda, cuda:1, ..."""
    dtype: Literal["float32", "float64"] = "float32"
    """floating-point type of the model"""
    backend: Literal[
        "auto", "loop", "vmap", "stacked", "stacked-each", "stacked-grouped", "stacked-unfold"
    ] = "auto"
    """train clients one after the other, or many at a time (two ways); auto: the fastest here"""
    workers: int | Literal["auto"] = "auto"
    """threads or processes that train clients, on a CPU"""
    processes: int | None = None
    """1, or as many as workers: one for each, and --workers auto is as many; measured if not given
    with --workers auto, else 1"""
    threads: int | None = None
    """operator threads of each worker; measured with --workers auto, else torch's shared out"""
    slots: int | Literal["auto"] = "auto"
    """clients that train at the same time on each worker"""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """of products of float32 numbers in training: tf32 on a GPU; bf16 not with stacked"""
    graphs: bool = False
    """capture a GPU's steps once and replay them (no GPU has run this yet)"""
    exact_sums: bool = False
    """add up clients on a grid: the same bits for any slots, workers and ranks"""
    table: str | None = None
    """folder of the rows that clients keep (scaffold, feddyn, error feedback), one for each run; if
    not given in memory, or in the directory of the run: over 1 GiB, and with several ranks"""
    sampler: str | None = None
    """who takes part: poisson(0.1), cyclic(20), file.py:name; --cohort at random if not given"""
    client_dropout: float = 0.0
    """probability that a client of a cohort is lost before it sends anything"""
    transforms: tuple[str, ...] = ()
    """of what clients send, in their order: clip_by_norm(1.0), top_k(0.01),
    error_feedback(scaled_sign()), file.py:name(2)"""
    aggregator: str | None = None
    """what the server makes of clients' messages, their weighted mean if not given:
    coordinate_median(), trimmed_mean(0.1), file.py:name"""
    around: tuple[str, ...] = ()
    """around the algorithm, in this order, without their first argument: ema(0.99),
    server_on_plateau('eval/loss', 'min', factor=0.5, patience=10), clients_on_plateau (likewise),
    replay(lr=0.01, batches=Batches(10, steps=4)), file.py:name(2)"""
    metrics: tuple[str, ...] = ()
    """of each evaluation beside the recipe's: NAME=file.py:function, top3=top_k_accuracy(3)"""
    freeze: str | None = None
    """parameters that do not train and are not sent: a regular expression found in their names"""
    init: str | None = None
    """first model: a state dict, .safetensors or of torch.save"""
    resume: str = "none"
    """the run to go on with: its directory, or a checkpoint in it; auto: that of --out, started
    if there is none; none: a new run"""
    resume_changed: bool = False
    """go on although settings that change the result are others"""
    checkpoint_every: int = 10
    """rounds from one checkpoint to the next; the last round has one, and the round of a signal"""
    keep: int = 2
    """checkpoints that are kept, the last ones; with --watch the best one, too"""
    watch: str | None = None
    """metric of the best round, and which values are better: eval/loss:min, eval/accuracy:max"""
    fall_back: bool = False
    """after a value that is worse than the best, go on from the best model (with --watch)"""
    stop_at: str | None = None
    """end after a round whose metrics reach a target: eval/accuracy>=0.97, eval/loss<=0.1"""
    patience: int | None = None
    """end after so many values of --watch without a better one"""
    safetensors: bool = False
    """write the final model as model.safetensors, too"""


def check_run(args: RunArgs) -> None:
    """Raise InputError, with the name of the flag, before anything is made."""
    numbers = (
        "rounds",
        "cohort",
        "batch",
        "threads",
        "patience",
        "eval_every",
        "test_every",
    )
    check(args, (*numbers, "checkpoint_every", "keep"), lambda n: n >= 1, "at least 1")
    check(args, ("seed", "sample_seed"), lambda n: 0 <= n < 2**63, "0 to 2^63 - 1")
    check(args, ("statistics", "validation"), lambda x: x >= 0, "a number of at least 0")
    check(args, ("validation",), lambda x: x < 1, "a share below 1")
    check(args, ("client_dropout",), lambda p: 0 <= p < 1, "a probability in [0, 1)")
    some = ("workers", "slots")
    check(args, some, lambda n: n == "auto" or n >= 1, "auto or a number of at least 1")
    right = f"auto or at most --cohort ({args.cohort})"
    check(args, some, lambda n: n == "auto" or n <= args.cohort, right)
    check(args, ("processes",), lambda n: n >= 1, "1 for threads, or the number of workers")
    check(
        args, ("profile",), lambda on: not on or args.rounds >= ROUNDS, f"--rounds {ROUNDS} or more"
    )
    check(args, ("device",), has_device, "a device of this machine, such as cpu")
    check_privacy(args)
    check_matplotlib()
    check_saving(args)
    check_wandb(args.track)


def check_saving(args: RunArgs) -> None:
    """Raise InputError, with the name of the flag, where the run cannot go where it should."""
    if args.resume == "none":
        join().from_first(partial(check_out, args.out))
    if args.resume == "auto" and args.out is None:
        raise InputError("--resume auto: needs --out, the directory of the run")
    if args.watch is not None:
        Watch(args.watch)
    check(args, ("fall_back",), lambda on: not on or args.watch is not None, "--watch beside it")
    check(args, ("patience",), lambda n: args.watch is not None, "--watch beside it")
    Stop.of(args)
    if args.safetensors:
        check_safetensors("--safetensors")


def sampler_of(args: RunArgs, clients: int) -> Sampler:
    """Who takes part: as --sampler says, --cohort at random, or by Poisson under privacy."""
    if args.sampler is not None:
        return named_sampler(args.sampler)
    if args.private_clip is not None:
        return poisson_cohorts(args.cohort, clients)
    return sampling.uniform(args.cohort)


def simulation(
    args: RunArgs,
    task: Task,
    data: FederatedDataset,
    algorithm: Algorithm,
    table: str | Path | None = None,
    own: Batch | None = None,
) -> Simulation:
    """The simulation of these parts, and of those that flags name; `table` in place of --table.

    own  columns [n, ...] of examples that the server has, for replay

    Raises InputError as `Simulation` does, and for a cohort that is larger than the population.
    """
    n = data.num_clients
    check(args, ("cohort",), lambda size: size <= n, f"at most {n} (training clients)")
    algorithm = transforms.chain(algorithm, *map(named_transform, args.transforms))
    sampler = sampler_of(args, n)
    if args.private_clip is not None:
        how = args.rounds, args.client_dropout
        algorithm = privately(args, algorithm, sampler, n, *how)
    if args.aggregator is not None:
        algorithm = named_aggregator(args.aggregator, algorithm, getattr(args, "weights", None))
    task = task.scored(named_metrics(args.metrics))
    if args.freeze is not None:
        task = task.frozen(args.freeze)
    if args.init is not None:
        task = task.to("cpu", getattr(torch, args.dtype))
        warm_start(task.module, args.init)
    return Simulation(
        task,
        data,
        surrounded(algorithm, args.around, task, own),
        sampler,
        dtype=getattr(torch, args.dtype),
        table=args.table if table is None else table,
        **{name: getattr(args, name) for name in AS_HERE.split()},
    )
