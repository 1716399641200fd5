"""The round and the run: the only file that knows everybody."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vecfl.aggregate import exact_grid
from vecfl.algorithms import Algorithm, Round
from vecfl.arrange import arrange
from vecfl.arrangement import Arrangement, Wanted, require_device
from vecfl.cohorts import Cohorts
from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.evaluate import Columns, check_name, columns_of, evaluate, evaluate_clients, spread
from vecfl.feed import make_feed, place
from vecfl.geometry import Geometry
from vecfl.job import Job
from vecfl.losses import Batch
from vecfl.mesh import join
from vecfl.participation import Trace
from vecfl.probe import Probe
from vecfl.promises import promised
from vecfl.random import check_seed
from vecfl.sampling import Sampler
from vecfl.state import State, facts, open_table, pack, sent, settle_, sums_of, unpack
from vecfl.table import Tables
from vecfl.tally import compare, tally, warn
from vecfl.task import Task
from vecfl.trainer import Trainer

Metrics = dict[str, float | int | str]


class Simulation:
    """A federated run: `state = sim.start()`, then `state, metrics = sim.round(state)`.

    task, data, algorithm, sampler   what is learned, from whom, how, and who takes part
    seed      of shuffles, dropout, augmentation, work; sample_seed: of cohorts (default: seed)
    client_dropout  of a cohort, before they send: a probability, or a trace (`vecfl.available`)
    device, dtype   where and in which precision clients train
    backend   "vmap", "stacked" (clients side by side, by torch.func or by layers of all of them) or
              "loop" (one after the other, the reference)
    workers   threads that train clients, on a CPU, or `processes`, as many: forks, for which data
              and functions stay as in round 1; threads: operator threads (None: torch's shared out)
    slots     clients in training at a time on each worker (None: by cache or GPU memory)
    resident  whether all data are copied to the device, or the examples of each cohort, while the
              one before it trains (None: the former on a CPU, and where they fit: `vecfl.feed`)
    table     folder for what the algorithm's clients keep between rounds (None: in memory)
    exact_sums  the same bits for any slots, workers, ranks (`vecfl.aggregate.exact_grid`)
    statistics  of updates, as `update/...` metrics: how many clients of a cohort are compared with
              the mean (0: none, and no norms either); `geometry.last` has what was measured
    precision, graphs  of a GPU's steps, bf16 of a CPU's: `vecfl.precision`, `vecfl.engine.graphs`

    "auto" for backend, workers or slots measures the fastest here (see `vecfl.probe`); what was
    taken is `arrangement`, and stands in the metrics of each round. Where a GPU's memory runs out,
    its slots are halved, once. Several ranks (`vecfl.mesh`) make the same simulation and call the
    same methods: they share the work and all get the result.

    Raises InputError if the parts do not fit one another, the backend or those of other ranks.
    """

    def __init__(
        self,
        task: Task,
        data: FederatedDataset,
        algorithm: Algorithm,
        sampler: Sampler,
        *,
        seed: int = 0,
        sample_seed: int | None = None,
        client_dropout: float | Trace = 0.0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "vmap",
        workers: int | str = 1,
        processes: int | None = None,
        threads: int | None = None,
        slots: int | str | None = None,
        resident: bool | None = None,
        exact_sums: bool = False,
        table: str | Path | None = None,
        statistics: int = 0,
        precision: str = "float32",
        graphs: bool = False,
    ) -> None:
        self.mesh, self.exact_sums = join(), exact_sums
        self.seed = check_seed("seed", seed)
        self.sample_seed = check_seed("sample_seed", seed if sample_seed is None else sample_seed)
        if dtype not in (torch.float32, torch.float64):
            raise InputError(f"dtype must be torch.float32 or torch.float64, not {dtype}")
        self.device, self.dtype = self.mesh.device(require_device(device)), dtype
        task.check(data.columns)
        self.source = place(data, self.device, resident)
        self.task, self.data = task.to(self.device, dtype), self.source.data
        self.task.draws.seed, self.algorithm = self.seed, algorithm
        seeds, lost = (self.sample_seed, self.seed), (client_dropout, algorithm.delay)
        self.cohorts = Cohorts(sampler, self.data, algorithm.rule.batches, seeds, *lost, self.mesh)
        wanted = Wanted(backend, workers, threads, slots, processes, precision, graphs)
        wanted.check(self.cohorts.most())
        self.releases = promised(algorithm, sampler, self.task, self.data, lost[0], exact_sums)
        fed = self.cohorts.large(), self.seed, self.source.fetch
        probe = Probe(self.task, self.data, algorithm, *fed)
        arrangement = self.mesh.from_first(lambda: arrange(wanted, probe))
        self.trainer = Trainer(self.task, self.data, algorithm, arrangement, self.seed)
        self.trainer.tell()
        self.feed, kept = make_feed(self.source), algorithm.table(self.task.layout)
        self.tables = Tables(kept, self.data.num_clients, dtype, table, self.mesh.rank)
        self.geometry = Geometry(self.mesh, statistics, self.seed, self.task.layout.size)
        self.tell: Callable[[str, State, Columns], None] = lambda *_: None  # what clients came to
        self.signal, self.stopped = (lambda: 0), 0  # that came to this rank; to any, last round
        compare(self.mesh, self.task, self.data, self._facts())

    def start(self) -> State:
        """The state before round 1, with the model as the task's module has it.

        Raises InputError if a folder for the table holds rows that cannot go back to zero.
        """
        w = self.task.layout.flatten(self.task.module)
        server = self.algorithm.init(w, self.task.layout)
        return State(0, server, open_table(self.tables, self.mesh, 0))

    @property
    def sampler(self) -> Sampler:
        """Who takes part; another sampler is another simulation."""
        return self.cohorts.sampler

    def cohort(self, round: int) -> Tensor:
        """Positions [C] of the clients that are drawn for a round (from 0), lost ones too."""
        return self.cohorts.draw(round)

    @torch.no_grad()
    def round(self, state: State) -> tuple[State, Metrics]:
        """One round: the next state, and `train/...`, `update/...` and `system/...` metrics."""
        with self.trainer.alone():
            return self._round(state)

    def _round(self, state: State) -> tuple[State, Metrics]:
        began, layout = time.perf_counter(), self.task.layout
        at = Round(state.round, self.seed, layout, self.data.num_clients)
        state.require_observed(self.algorithm)
        if state.table is not None:
            self.mesh.sum(torch.zeros(1))  # nobody still reads the rows of the round before
        with self.feed(self.cohorts.ask, state.round) as examples:
            waited, cohort = time.perf_counter() - began, self.cohorts.take(state.round)
            plan = replace(cohort.plan.of(cohort.mine), first=examples.first)
            grid = exact_grid(int(cohort.plan.n.sum())) if self.exact_sums else None
            some = self.geometry.sample(cohort.plan, state.round)
            job = Job(state.server, state.round, plan, examples.columns, grid, state.table, some)
            fold = self.trainer.train_or_halve(job)
        found = tally(self.mesh, fold, cohort, job, self.signal(), self.algorithm)
        self.stopped = found.signal
        warn(self.mesh, state.round, cohort, found, self.data.client_ids, self.algorithm)
        metrics = self.algorithm.metrics(state.server, found.aggregate, at)
        sums = found.norm, found.aggregate, cohort.plan, some, state.round
        updates = self.geometry.metrics(fold.updates, *sums)
        server = self.algorithm.server(state.server, found.aggregate, at)
        settle_(server["w"], self.algorithm, at)
        how = {"data": self.source.name, "ranks": self.mesh.size, **self.trainer.told}
        if state.table is not None:
            state.table.end()
        down = self.algorithm.downlink * cohort.drawn * layout.size * self.dtype.itemsize
        traffic, told = sent(state, found.bytes, down)
        told = {"round": state.round + 1, **found.metrics(cohort, began, waited), **told}
        told |= {**metrics, **updates} | {f"system/{name}": value for name, value in how.items()}
        seen, ledger = self.algorithm.observe is None, self.releases.after(state.ledger)
        return State(at.number + 1, server, state.table, seen, traffic, ledger), told

    def observe(self, state: State, metrics: Metrics) -> State:
        """Let the algorithm see the metrics of the round that led to `state`, evaluations included.

        Needed, once after each round, where the algorithm adapts to them; else of no effect.
        """
        if state.observed or self.algorithm.observe is None:
            return state
        return replace(state, server=self.algorithm.observe(state.server, metrics), observed=True)

    @property
    def arrangement(self) -> Arrangement:
        """How cohorts are laid out on the machine."""
        return self.trainer.arrangement

    def evaluate(self, state: State, columns: Batch, name: str = "eval") -> Metrics:
        """`name/...`: loss and metrics of the model on pooled examples, columns [n, ...]."""
        check_name(name)
        self.task.check(columns)
        with self.trainer.evaluating():
            values = evaluate(self.task, self.algorithm.model(state.server), columns, self.mesh)
        return {f"{name}/{metric}": value for metric, value in values.items()}

    def evaluate_clients(
        self, state: State, data: FederatedDataset | None = None, name: str = "client"
    ) -> Metrics:
        """`name/...`: the spread over clients, those of `data` or those that train."""
        check_name(name)
        found = self.client_results(state, data)
        self.tell(name, state, found)
        return dict(spread(found, name))

    def client_results(self, state: State, data: FederatedDataset | None = None) -> Columns:
        """The loss and every metric of each client, those of `data` or those that train: [N].

        Beside them "client", their ids; "examples"; "weight", the loss weight; with `statistics`
        "update_norm" of the last round, NaN where a client sent nothing.
        """
        some = data or self.data
        with self.trainer.evaluating():
            found = evaluate_clients(self.task, self.algorithm.model(state.server), some, self.mesh)
        norm = self.geometry.norms(state.round, some.num_clients) if data is None else None
        return columns_of(found, some, norm)

    def state_dict(self, state: State) -> dict[str, Tensor]:
        """The model as a state dict of the module that the task was made from."""
        return self.task.layout.state_dict(self.task.module, self.algorithm.model(state.server))

    def save(self, state: State) -> dict[str, Any]:
        """All that `load` needs to give `state` back: tensors on the CPU, and plain values.

        Raises OSError on all ranks where one cannot bring its clients' rows to the disk.
        """
        state.require_observed(self.algorithm)
        model = self.task.layout.trained(self.task.module, self.algorithm.model(state.server))
        return pack(self.mesh, state, model, self._facts())

    def load(self, content: Mapping[str, Any], *, changed: bool = False) -> State:
        """The state that `save` gave, for rounds that have the bits of a run that never stopped.

        Raises InputError where tensors do not fit, or a fact is another and not `changed`.
        """
        server = self.check(content, changed=changed)
        table = open_table(self.tables, self.mesh, content["round"], content.get("table"))
        return State(content["round"], server, table, **sums_of(content))

    def check(self, content: Mapping[str, Any], *, changed: bool = False) -> dict[str, Tensor]:
        """The server's tensors in `content`, or the InputError of `load`; nothing is changed."""
        w = self.task.layout.flatten(self.task.module)
        fresh = self.algorithm.init(w, self.task.layout)
        server = unpack(content, fresh, self._facts(), changed)
        self.tables.check(content["round"], content.get("table"))
        self.releases.require_alike(sums_of(content)["ledger"])
        return server

    def _facts(self) -> dict[str, Any]:
        seeds = {"seed": self.seed, "sample_seed": self.sample_seed}
        how = {"exact_sums": self.exact_sums, **asdict(self.arrangement)}
        return facts(self.algorithm, self.data, self.task.layout, seeds, how)
