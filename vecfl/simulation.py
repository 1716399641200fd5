"""The round and the run: the only file that knows everybody."""

import copy
import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vecfl.algorithms import Algorithm
from vecfl.arrange import Wanted, arrange
from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.evaluate import check_name, evaluate, evaluate_clients, spread
from vecfl.feed import make_feed, place
from vecfl.losses import Batch
from vecfl.participation import Trace, checked, checked_dropout, lost
from vecfl.probe import Probe
from vecfl.random import check_seed
from vecfl.sampling import Sampler
from vecfl.table import Table, Tables
from vecfl.task import Task
from vecfl.track import Tracker
from vecfl.trainer import Arrangement, Trainer, operator_threads

log = logging.getLogger("vecfl")
Metrics = dict[str, float | int | str]


@dataclass(frozen=True)
class State:
    """Everything a run is between two rounds: how many are finished, and the server's tensors.

    table  what clients keep, changed in place by the next round: an older state cannot go on
    """

    round: int
    server: dict[str, Tensor]
    table: Table | None = None


class Simulation:
    """A federated run: `state = sim.start()`, then `state, metrics = sim.round(state)`.

    task, data, algorithm, sampler   what is learned, from whom, how, and who takes part
    seed      of shuffles, dropout and augmentation; sample_seed: of cohorts (default: seed)
    client_dropout  clients of a cohort that are lost before they send anything: the probability of
              each, or a trace (see `vecfl.available`) that is True where a client drops out
    device, dtype   where and in which precision clients train
    backend   "vmap" (clients side by side), "stacked" (so too, faster, where only `nn.Linear`
              layers train) or "loop" (one after the other, the reference)
    workers   threads that train clients, on a CPU; threads: operator threads of each (None:
              torch's number shared out among the workers)
    slots     clients in training at a time on each worker (None: by cache or GPU memory)
    resident  whether all data are copied to the device, or the examples of each cohort, while the
              one before it trains (None: the former on a CPU, and where they fit: `vecfl.feed`)
    table     folder for what the algorithm's clients keep between rounds (None: in memory)

    "auto" for backend, workers or slots measures the fastest here (see `vecfl.probe`); what was
    taken is `arrangement`, and stands in the metrics of each round. Where a GPU's memory runs out,
    its slots are halved, once.

    Raises InputError if the parts do not fit: labels out of range, a cohort larger than the
    population, a module that the backend cannot train.
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
        threads: int | None = None,
        slots: int | str | None = None,
        resident: bool | None = None,
        table: str | Path | None = None,
    ) -> None:
        self.seed = check_seed("seed", seed)
        self.sample_seed = check_seed("sample_seed", seed if sample_seed is None else sample_seed)
        if dtype not in (torch.float32, torch.float64):
            raise InputError(f"dtype must be torch.float32 or torch.float64, not {dtype}")
        self.device, self.dtype = torch.device(device), dtype
        task.check(data.columns)
        self.source = place(data, self.device, resident)
        self.task, self.data = task.to(self.device, dtype), self.source.data
        self.task.draws.seed = self.seed
        self.algorithm, self.sampler = algorithm, sampler
        self.client_dropout = checked_dropout(client_dropout)
        wanted = Wanted(backend, workers, threads, slots)
        fetch = self.source.fetch
        probe = Probe(self.task, self.data, algorithm, self._some_cohort(), self.seed, fetch)
        arrangement = arrange(wanted, probe)
        self.trainer = Trainer(self.task, self.data, algorithm, arrangement, self.seed)
        self.feed = make_feed(self.source)
        kept = algorithm.table(self.task.layout.size)
        self.tables = Tables(kept, self.data.num_clients, dtype, table)

    def start(self) -> State:
        """The state before round 1, with the model as the task's module has it.

        Raises InputError if a folder for the table holds rows that cannot go back to zero.
        """
        w = self.task.layout.flatten(self.task.module)
        return State(0, self.algorithm.init(w, self.task.layout.trainable), self.tables.at(0))

    def cohort(self, round: int) -> Tensor:
        """Positions [C] of the clients that are drawn for a round (from 0), lost ones too.

        Raises InputError if they are no positions of clients.
        """
        n = self.data.num_clients
        return checked(
            self.sampler(torch.ones(n, dtype=torch.bool), self.sample_seed, round), n, round
        )

    def _lost(self, cohort: Tensor, round: int) -> Tensor:
        """Which of the clients [C] that were drawn drop out, bool [C]."""
        population = self.data.num_clients
        return lost(self.client_dropout, cohort, population, self.sample_seed, round)

    def _some_cohort(self) -> Tensor:
        """The first cohort that is not empty; all clients where that does not come soon."""
        cohorts = (self.cohort(round) for round in range(10))
        return next((c for c in cohorts if len(c)), torch.arange(self.data.num_clients))

    @torch.no_grad()
    def round(self, state: State) -> tuple[State, Metrics]:
        """One round: the next state, and `train/...` and `system/...` metrics."""
        began = time.perf_counter()
        with self.feed(self.cohort, state.round) as examples:
            waited, stay = time.perf_counter() - began, ~self._lost(examples.clients, state.round)
            cohort, first = examples.clients[stay], examples.first[stay.numpy()]
            plan = replace(self.trainer.plan(cohort), first=first)
            fold = self.trainer.train_or_halve(
                state.server, state.round, cohort, plan, examples.columns, state.table
            )
        ok, weight = torch.cat(fold.ok).cpu(), torch.cat(fold.weight).cpu()
        if not ok.all():
            bad = [str(self.data.client_ids[k]) for k in torch.cat(fold.clients)[~ok].tolist()]
            log.warning("round %d: client %s dropped: not finite", state.round + 1, ", ".join(bad))
        if not weight.any():
            who = "usable client" if len(cohort) else "client takes part"
            log.warning("round %d: no %s; the model stays as it is", state.round + 1, who)
        loss, count = torch.cat(fold.sums).cpu()[ok].sum(0)
        server = self.algorithm.server(state.server, fold.aggregate, self.task.layout.trainable)
        self.task.layout.round_integers_(server["w"])
        how = {"data": self.source.name, **asdict(self.arrangement)}
        seconds, steps = time.perf_counter() - began, int(plan.steps.sum())
        if state.table is not None:
            state.table.end()
        return State(state.round + 1, server, state.table), {
            "round": state.round + 1,
            "train/loss": float(loss / count),
            "train/cohort": len(stay),
            "train/lost_clients": len(stay) - len(cohort),
            "train/clients": int((weight > 0).sum()),
            "train/dropped_clients": int((~ok).sum()),
            "system/clients_per_s": len(cohort) / seconds,
            "system/round_s": seconds,
            "system/wait_s": waited,
            "system/slot_efficiency": steps / max(fold.executed, 1),
            "system/client_steps": steps,
        } | {f"system/{name}": value for name, value in how.items()}

    @property
    def arrangement(self) -> Arrangement:
        """How cohorts are laid out on the machine."""
        return self.trainer.arrangement

    @property
    def cores(self) -> int:
        """Operator threads of all workers together."""
        return self.arrangement.workers * self.arrangement.threads

    def evaluate(self, state: State, columns: Batch, name: str = "eval") -> Metrics:
        """`name/...`: loss and metrics of the model on pooled examples, columns [n, ...]."""
        check_name(name)
        self.task.check(columns)
        with operator_threads(self.cores):
            values = evaluate(self.task, state.server["w"], columns)
        return {f"{name}/{metric}": value for metric, value in values.items()}

    def evaluate_clients(
        self, state: State, data: FederatedDataset | None = None, name: str = "client"
    ) -> Metrics:
        """`name/...`: the spread over clients, those of `data` or those that train."""
        check_name(name)
        with operator_threads(self.cores):
            per_client = evaluate_clients(self.task, state.server["w"], data or self.data)
        return dict(spread(per_client, name))

    def state_dict(self, state: State) -> dict[str, Tensor]:
        """The model as a state dict of the module that the task was made from."""
        module = copy.deepcopy(self.task.module)
        for name, value in self.task.layout.unflatten(state.server["w"]).items():
            parent, _, leaf = name.rpartition(".")
            getattr(module.get_submodule(parent), leaf).data.copy_(value)
        return {name: t.detach().clone() for name, t in module.state_dict().items()}


def run(
    sim: Simulation,
    rounds: int,
    *,
    test: Batch | None = None,
    trackers: Iterable[Tracker] = (),
    evaluate_every: int = 1,
    state: State | None = None,
) -> State:
    """`rounds` rounds in one call.

    Every `evaluate_every` rounds, and after the last, the model is evaluated on `test` (columns
    [n, ...], if given) and on the clients.
    """
    if rounds < 1 or evaluate_every < 1:
        raise InputError(f"rounds={rounds}, evaluate_every={evaluate_every}: both at least 1")
    state = state or sim.start()
    trackers = list(trackers)
    for i in range(1, rounds + 1):
        state, metrics = sim.round(state)
        if i % evaluate_every == 0 or i == rounds:
            metrics |= sim.evaluate_clients(state) | (sim.evaluate(state, test) if test else {})
        for tracker in trackers:
            tracker.log(metrics)
    return state
