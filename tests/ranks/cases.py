"""Runs that any number of ranks must make alike: `torchrun -m tests.ranks.cases FILE` on several.

Each case gives the models and metrics of its rounds, what was evaluated and warned of, and the
client steps of every rank. Rank 0 saves them all.
"""

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import vecfl
from vecfl.algorithms import Algorithm
from vecfl.job import Fold, Job
from vecfl.mesh import Mesh, RankError, join
from vecfl.resume import resume

from ..oracles.bridge import dataset
from ..oracles.tasks import PROBLEMS
from ..oracles.toy import habit
from ..persist import tiny

SIZES = (5, 0, 1, 23, 3, 4, 8)
MANY = tuple(7 + (i * i) % 31 for i in range(40))  # 7 to 36 examples, 13 clients for three ranks
B = vecfl.Batches(4, epochs=2)
Sampler = vecfl.sampling.Sampler


@dataclass(frozen=True)
class Case:
    """exact: sums on a grid; bits: of one client's row the same in any company of clients."""

    algorithm: Algorithm
    problem: str = "mlp"
    sampler: Sampler = field(default_factory=vecfl.everyone)
    sizes: tuple[int, ...] = SIZES
    rounds: int = 2
    how: dict[str, Any] = field(default_factory=lambda: {"backend": "loop"})
    bad: tuple[int, ...] = ()  # clients with a NaN
    keeps: bool = False  # rows of clients, in a folder
    around: Callable[[Algorithm, vecfl.Task], Algorithm] = lambda algorithm, task: algorithm


def drawn(*cohorts: list[int]) -> Sampler:
    return lambda eligible, seed, round: torch.tensor(cohorts[round], dtype=torch.int64)


def accounted(mean: float, *cohorts: list[int]) -> Sampler:
    """As `drawn`, under the law of Poisson cohorts of this mean."""
    law = vecfl.privacy.Sampling
    return vecfl.sampling.lawful(drawn(*cohorts), lambda n: law("poisson", mean / n))


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "fedavg": lambda **kw: vecfl.fedavg(lr=0.1, batches=B, **kw),
    "fedsgd": lambda **kw: vecfl.fedsgd(lr=0.3, size=4, **kw),
    "fedprox": lambda **kw: vecfl.fedprox(lr=0.1, mu=0.3, batches=B, **kw),
    "fedavgm": lambda **kw: vecfl.fedavgm(lr=0.1, batches=B, **kw),
    "fedadagrad": lambda **kw: vecfl.fedadagrad(lr=0.1, server_lr=0.1, batches=B, **kw),
    "fedadam": lambda **kw: vecfl.fedadam(lr=0.1, server_lr=0.1, batches=B, **kw),
    "fedyogi": lambda **kw: vecfl.fedyogi(lr=0.1, server_lr=0.1, batches=B, **kw),
}
FEDAVG = ALGORITHMS["fedavg"]
(REPLAYED,) = PROBLEMS["mlp"].clients((9,))
REPLAY: dict[str, Any] = {"lr": 0.05, "batches": B, "optimizer": vecfl.adam()}
X = [n % 4 for n in range(sum(SIZES))]  # a number for each example
OWN_WORK = vecfl.Batches(4, epochs=vecfl.random_epochs(0, 3, 0.8), max_tokens=9, tokens=X)
OWN_EPOCHS = vecfl.Batches(4, epochs=vecfl.random_epochs(0, 3))
PROMISE: dict[str, Any] = {"noise_multiplier": 1.0, "cohort": 2.0, "delta": 1e-3}
STEPS = vecfl.within_round(vecfl.rmsprop(weight_decay=0.1), lambda step: 1 / (1 + step))
CASES = {name: Case(make()) for name, make in ALGORITHMS.items()} | {
    "cohort of 2": Case(FEDAVG(), sampler=vecfl.uniform(2)),
    "repeats, nobody": Case(FEDAVG(), sampler=drawn([3, 3, 1, 3], [], [6, 0, 0]), rounds=3),
    "lost clients": Case(FEDAVG(), how={"backend": "loop", "client_dropout": 0.4}),
    "uniform weights": Case(FEDAVG(weights=vecfl.uniform_weights)),
    "capped weights": Case(FEDAVG(weights=vecfl.capped(6))),
    "weights by tokens": Case(FEDAVG(weights=vecfl.by_tokens), "tokens"),
    "buffers": Case(FEDAVG(), "buffers"),
    "not finite": Case(FEDAVG(), sampler=drawn([6, 3, 0, 6], [2, 3]), bad=(3, 6)),
    "vmap": Case(FEDAVG(), how={"backend": "vmap", "slots": 3}),
    "stacked": Case(FEDAVG(), "linear", how={"backend": "stacked", "slots": 3}),
    "stacked cnn": Case(FEDAVG(), "cnn", how={"backend": "stacked", "slots": 3}),
    "workers": Case(FEDAVG(), "cnn", how={"backend": "loop", "workers": 2, "threads": 1}),
    "streamed": Case(FEDAVG(), how={"backend": "loop", "resident": False}),
    "float32": Case(FEDAVG(), how={"backend": "loop", "dtype": torch.float32}),
    "rows": Case(
        habit(lr=0.1, batches=B), sampler=vecfl.uniform(4), rounds=5, bad=(3,), keeps=True
    ),
    "own work": Case(
        vecfl.fedavg(lr=0.01, batches=OWN_WORK, optimizer=STEPS),
        sampler=drawn([3, 3, 1, 3], [], [6, 0, 0]),
        rounds=3,
    ),
    "adaptive mu": Case(
        vecfl.fedprox_adaptive(lr=lambda t: 0.1 + t % 2, start=0.1, patience=1, batches=B),
        rounds=4,
    ),
    "updates": Case(
        FEDAVG(),
        sampler=drawn([3, 3, 1, 6, 5, 0], [], [6, 2, 4, 0, 3]),
        rounds=3,
        bad=(6,),
        how={"backend": "loop", "statistics": 3},
    ),
    # 36 examples: weights times largest numbers, 10954, are beyond 2^(6 + 7) = 8192, but those of
    # no rank alone: of the six clients the three largest come to 6458.
    "beyond the grid": Case(vecfl.fedavg(lr=300.0, batches=B), "linear", sizes=(6,) * 6, rounds=1),
    "dga": Case(vecfl.dga(lr=0.1, batches=B, softmax_beta=3.0), bad=(3,)),
    "dga by rms": Case(vecfl.dga(lr=0.1, batches=B, softmax_beta=2.0, weighting="rms")),
    "dga, idle ranks": Case(
        vecfl.dga(lr=0.1, batches=B, softmax_beta=3.0, weighting="update_rms"),
        sampler=drawn([3], [], [6, 3]),
        rounds=3,
        how={"backend": "loop", "workers": 2, "threads": 1},
    ),
    "clip": Case(vecfl.chain(FEDAVG(), vecfl.clip_by_norm(0.1)), bad=(6,)),
    "clip by layer, rows": Case(
        vecfl.chain(habit(lr=0.1, batches=B), vecfl.clip_by_layer(0.2), vecfl.clip_by_norm(0.15)),
        sampler=vecfl.uniform(4),
        keeps=True,
    ),
    "late": Case(
        vecfl.delayed(
            vecfl.chain(vecfl.dga(lr=0.1, batches=B, softmax_beta=3.0), vecfl.clip_by_norm(0.1)),
            vecfl.drawn_delay([0.3, 0.4, 0.3]),
            buffer=3,
            discount=vecfl.polynomial(0.5),
        ),
        sampler=drawn([3, 3, 1, 6, 5, 0], [2], [], [6, 2, 4, 0, 3], [5]),
        rounds=5,
        bad=(6,),
        how={"backend": "loop", "statistics": 3, "workers": 2, "threads": 1},
    ),
    "median": Case(
        vecfl.aggregated_by(
            vecfl.dga(lr=0.1, batches=B, softmax_beta=3.0), vecfl.coordinate_median()
        ),
        sampler=drawn([3, 3, 1, 6, 5, 0], [], [6, 2, 4, 0, 3]),
        rounds=3,
        bad=(6,),
        how={"backend": "loop", "statistics": 3},
    ),
    "softmax of rows": Case(
        vecfl.aggregated_by(
            vecfl.dga(lr=0.1, batches=B, softmax_beta=500.0),
            lambda messages, weights: (weights / weights.sum()) @ messages,
        ),
        sampler=drawn([3, 0], [], [6, 3, 2]),
        rounds=3,
        how={"backend": "loop", "workers": 2, "threads": 1},
    ),
    "codec": Case(
        vecfl.chain(FEDAVG(), vecfl.stochastic_quantizer(3)),
        sampler=drawn([6, 3, 0, 6], [2], []),
        rounds=3,
        bad=(6,),
    ),
    "error feedback": Case(
        vecfl.chain(FEDAVG(), vecfl.error_feedback(vecfl.top_k(0.2))),
        sampler=vecfl.uniform(4),
        rounds=4,
        keeps=True,
    ),
    "ema": Case(FEDAVG(server=vecfl.server_lamb(0.1)), around=lambda a, t: vecfl.ema(a, 0.5)),
    "clipped": Case(FEDAVG(server=vecfl.clipped(vecfl.server_adamw(0.1), 0.01))),
    "replay": Case(
        FEDAVG(),
        sampler=drawn([3, 0], [], [4, 5]),
        rounds=3,
        around=lambda a, task: vecfl.replay(a, task, REPLAYED, **REPLAY),
    ),
    "plateaus": Case(
        FEDAVG(),
        rounds=5,
        around=lambda a, t: vecfl.server_on_plateau(
            vecfl.clients_on_plateau(a, "eval/loss", "max", 0.5, 0), "train/loss", "max", 0.5, 1
        ),
    ),
    "scaffold": Case(
        vecfl.chain(vecfl.scaffold(lr=0.1, batches=B), vecfl.clip_by_norm(0.3)),
        sampler=vecfl.uniform(4),
        rounds=4,
        bad=(3,),
        keeps=True,
        how={"backend": "loop", "statistics": 2},
    ),
    "scaffold, idle ranks": Case(
        vecfl.scaffold(lr=0.1, option=1, batches=OWN_EPOCHS),
        sampler=drawn([3, 0], [], [4], [6, 5, 2]),
        rounds=4,
        keeps=True,
        how={"backend": "loop", "workers": 2, "threads": 1},
    ),
    "dp_sgd": Case(
        vecfl.dp_sgd(
            vecfl.fedprox(lr=0.1, mu=0.1, batches=OWN_EPOCHS, optimizer=vecfl.momentum()),
            **{"clip": 0.5, "noise_multiplier": 0.7, "delta": 1e-5},
        ),
        sampler=vecfl.uniform(4),
        rounds=4,
        bad=(3,),
        keeps=True,
    ),
    "feddyn": Case(
        vecfl.feddyn(lr=0.1, alpha=0.2, batches=B),
        sampler=vecfl.uniform(4),
        rounds=4,
        bad=(3,),
        keeps=True,
    ),
    "fednova": Case(vecfl.fednova(lr=0.1, batches=OWN_EPOCHS), bad=(3,)),
    "private": Case(
        vecfl.private(
            FEDAVG(weights=vecfl.uniform_weights),
            vecfl.adaptive_clip(0.1, count_noise=2.0),
            **PROMISE,
        ),
        sampler=accounted(2.0, [3, 0], [], [4], [6, 5, 2]),
        rounds=4,
        bad=(6,),
    ),
    "private scaffold": Case(
        vecfl.private(vecfl.scaffold(lr=0.1, batches=B), vecfl.clip_by_norm(0.3), **PROMISE),
        sampler=accounted(2.0, [3, 0], [], [4], [6, 5, 2]),
        rounds=4,
        bad=(3,),
        keeps=True,
        how={"backend": "loop", "workers": 2, "threads": 1},
    ),
    "private, Laplace": Case(
        vecfl.private(
            vecfl.dga(lr=0.1, batches=B, max_weight=1.0), vecfl.clip_by_l1(0.3), **PROMISE
        ),
        sampler=accounted(2.0, [3, 0, 5], []),
    ),
    "many": Case(FEDAVG(), "linear", sampler=vecfl.uniform(30), sizes=MANY),
}


# Plain and exact sums; private ones cannot be exact.
KINDS = [(name, False) for name in CASES]
KINDS += [(name, True) for name, case in CASES.items() if not case.algorithm.privacy]


class Heard(logging.Handler):
    """The warnings of vecfl."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run(case: Case, exact: bool, folder: Path) -> dict[str, Any]:
    """What a case gives on this rank; rows of clients lie in a new folder."""
    problem, heard = PROBLEMS[case.problem], Heard()
    clients = problem.clients(case.sizes)
    for k in case.bad:
        clients[k]["x"][0] = torch.nan
    data = dataset(clients)
    task = vecfl.Task(problem.build(), problem.loss, example=data.examples(2))
    how = {"dtype": torch.float64, "seed": 3, **case.how}
    if case.keeps:
        how["table"] = folder / f"{case.algorithm.name}-{exact}"
    algorithm = case.around(case.algorithm, task)
    sim = vecfl.Simulation(task, data, algorithm, case.sampler, exact_sums=exact, **how)
    steps = count_steps(sim)
    logging.getLogger("vecfl").addHandler(heard)
    state, models, metrics = sim.start(), list[Tensor](), list[dict[str, Any]]()
    for _ in range(case.rounds):
        state, found = sim.round(state)
        found |= sim.releases.told(state)
        if algorithm.observe is not None:
            found |= sim.evaluate(state, data.columns)
            state = sim.observe(state, found)
        found |= sim.releases.told(state)
        models.append(algorithm.model(state.server))
        metrics.append({k: v for k, v in found.items() if not k.startswith("system/")})
    logging.getLogger("vecfl").removeHandler(heard)
    (everyone,) = sim.mesh.sum(sim.mesh.place(sum(steps)))
    everybody = torch.arange(len(case.sizes))
    return {
        "models": torch.stack(models),
        "rows": state.table.gather(everybody) if state.table is not None else {},
        "metrics": metrics,
        "evaluated": evaluated(sim, state, problem),
        "warned": heard.lines,
        "steps": everyone.tolist(),
        "planned": sum(int(sim.cohorts.take(r).plan.steps.sum()) for r in sim.cohorts.asked),
    }


def count_steps(sim: vecfl.Simulation) -> list[int]:
    """The client steps of each round on this rank, as they are trained."""
    train, steps = sim.trainer.train, list[int]()

    def counted(job: Job) -> Fold:
        fold = train(job)
        steps.append(int(job.plan.steps.sum()))
        if sim.arrangement.backend == "loop":
            assert fold.executed == steps[-1]
        return fold

    sim.trainer.train = counted  # type: ignore[method-assign]
    return steps


def evaluated(sim: vecfl.Simulation, state: vecfl.State, problem: Any) -> dict[str, Any]:
    """Examples of several batches; a client may reach into two of them."""
    data = dataset(problem.clients((700, 900, 0, 30, 1500, 1200)))
    norms = sim.client_results(state).get("update_norm", torch.empty(0)).tolist()
    told = {f"norm {k}": norm for k, norm in enumerate(norms)}
    return sim.evaluate(state, data.columns) | sim.evaluate_clients(state, data) | told


def all_cases(folder: Path) -> dict[str, Any]:
    """Plain and exact sums of every case."""
    return {(name, e): run(CASES[name], e, folder) for name, e in KINDS}


def logs() -> Tensor:
    """The models [3, P] of rounds by DGA with weights that are 0 or infinite in float64."""
    dga = vecfl.dga(lr=0.1, batches=B, softmax_beta=5000.0)
    sim = simulation(dga, drawn([0, 2, 3, 4, 5, 6], [3, 4], [2]), 1)
    state, models = sim.start(), list[Tensor]()
    for _ in range(3):
        state, _ = sim.round(state)
        models.append(state.server["w"])
    return torch.stack(models)


def simulation(algorithm: Algorithm, sampler: Sampler, seed: int) -> vecfl.Simulation:
    problem, rank = PROBLEMS["linear"], join().rank
    data = dataset(problem.clients(SIZES[::-1] if seed == 8 and rank == 1 else SIZES))
    task = vecfl.Task(problem.build(), problem.loss, example=data.examples(2))
    if seed == 9:
        task.module.weight.data += rank
    return vecfl.Simulation(task, data, algorithm, sampler, seed=seed, backend="loop")


def refused() -> list[str]:
    """What this rank says where they are not alike: in seed, model, population, algorithm, later
    in a cohort; where one has no table for all; and what rank 0 alone finds wrong."""
    rank, lines = join().rank, []
    other = vecfl.fedavg(lr=0.1, batches=B) if rank == 1 else vecfl.fedprox(lr=1, mu=1, batches=B)

    def cohorts(eligible: Tensor, seed: int, round: int) -> Tensor:
        return torch.arange(3) + (rank if round == 1 else 0)

    def two_rounds() -> None:
        sim = simulation(FEDAVG(), cohorts, 1)
        sim.round(sim.round(sim.start())[0])

    def told() -> None:
        raise vecfl.InputError(f"by rank {rank}")

    for fails in (
        lambda: simulation(FEDAVG(), vecfl.everyone(), seed=10 + rank),
        lambda: simulation(FEDAVG(), vecfl.everyone(), seed=9),
        lambda: simulation(FEDAVG(), vecfl.everyone(), seed=8),
        lambda: simulation(other, vecfl.everyone(), seed=1),
        two_rounds,
        lambda: simulation(habit(lr=0.1, batches=B), vecfl.everyone(), seed=1).start(),
        lambda: join().from_first(told),
        lambda: resume(tiny.arguments(f"of-rank-{rank}", resume=f"of-rank-{rank}"), "tiny"),
    ):
        try:
            fails()
        except (vecfl.InputError, RankError) as error:
            lines.append(f"{type(error).__name__}: {error}")
    return lines


def of_ranks(mesh: Mesh, value: Any) -> list[Any]:
    """The value of every rank."""
    found = [None] * mesh.size
    dist.all_gather_object(found, value)
    return found


def waits(mesh: Mesh, mark: Path) -> bool:
    """Whether this rank is at its end no sooner than rank 0, which leaves a mark before."""
    if mesh.rank == 0:
        time.sleep(0.3)
        mark.touch()
    mesh.let_first_end()
    return mark.exists()


if __name__ == "__main__":
    mesh = join()
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    found = all_cases(folder)
    found["logs"] = logs()
    found["refused"] = of_ranks(mesh, refused())
    assert mesh.from_first(lambda: [mesh.rank, "x"]) == [0, "x"]
    of_all = mesh.sum(torch.ones(2, 3), torch.tensor(mesh.rank), torch.empty(0))
    assert [t.shape for t in of_all] == [(2, 3), (), (0,)]
    assert of_all[0].eq(mesh.size).all() and of_all[1] == mesh.size * (mesh.size - 1) / 2
    assert torch.get_num_threads() == 1  # what OMP_NUM_THREADS said
    found["waits"] = of_ranks(mesh, waits(mesh, folder / "mark"))
    if mesh.rank == 0:
        torch.save(found, folder / "found")
