"""The round and the run: the only file that knows everybody."""

import copy
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vecfl.aggregate import Aggregate, add_, empty
from vecfl.algorithms import Algorithm, Finished
from vecfl.data import FederatedDataset
from vecfl.engine import CACHE, Slots, make_backend, make_update, slot_count
from vecfl.errors import InputError, is_integer
from vecfl.evaluate import evaluate, evaluate_clients, spread
from vecfl.losses import Batch
from vecfl.random import check_seed
from vecfl.sampling import Sampler, checked
from vecfl.schedule import make_plan
from vecfl.tape import Tape
from vecfl.task import Task
from vecfl.track import Tracker

log = logging.getLogger("vecfl")
Metrics = dict[str, float | int | str]


@dataclass(frozen=True)
class State:
    """Everything a run is between two rounds: how many are finished, and the server's tensors."""

    round: int
    server: dict[str, Tensor]


@dataclass
class Fold:
    """What a round gathers while clients finish: the aggregate, and small tensors per commit.

    clients, ok   [K] positions in the dataset, and whether loss and update were finite
    sums, weight  [K, 2] loss and loss weight, [K] weight in the aggregate
    """

    aggregate: Aggregate
    clients: list[Tensor] = field(default_factory=list)
    ok: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    weight: list[Tensor] = field(default_factory=list)
    steps: int = 0
    executed: int = 0


class Simulation:
    """A federated run: `state = sim.start()`, then `state, metrics = sim.round(state)`.

    task, data, algorithm, sampler   what is learned, from whom, how, and who takes part
    backend   "vmap" (clients side by side) or "loop" (one after the other, the reference)
    slots     clients in training at a time; None: by the CPU's cache or the GPU's memory
    seed      of shuffles and dropout; sample_seed: of cohorts (default: seed)
    device, dtype   where and in which precision clients train

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
        backend: str = "vmap",
        slots: int | None = None,
        seed: int = 0,
        sample_seed: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.seed = check_seed("seed", seed)
        self.sample_seed = check_seed("sample_seed", seed if sample_seed is None else sample_seed)
        if dtype not in (torch.float32, torch.float64):
            raise InputError(f"dtype must be torch.float32 or torch.float64, not {dtype}")
        self.device, self.dtype = torch.device(device), dtype
        task.check(data.columns)
        self.task, self.data = task.to(self.device, dtype), data.to(self.device)
        self.task.draws.seed = self.seed
        self.algorithm, self.sampler = algorithm, sampler
        cohort = len(self.cohort(0))
        if slots is not None and not (is_integer(slots) and slots >= 1):
            raise InputError(f"slots must be an integer of at least 1, not {slots!r}")
        example = data.examples(2)
        self.backend = make_backend(backend, self.task, example)
        if slots is None:
            on_gpu = self.device.type == "cuda" and backend == "vmap"
            cache = None if on_gpu else CACHE[backend]
            slots = slot_count(self.task, algorithm.rule, cohort, example, cache=cache)
        layout = self.task.layout
        self.slots = Slots(layout, algorithm.rule, slots, self.device, dtype)

    def start(self) -> State:
        """The state before round 1, with the model as the task's module has it."""
        w = self.task.layout.flatten(self.task.module)
        return State(0, self.algorithm.init(w, self.task.layout.trainable))

    def cohort(self, round: int) -> Tensor:
        """Positions [C] of the clients of a round (from 0); InputError if they are none."""
        n = self.data.num_clients
        return checked(self.sampler(n, self.sample_seed, round), n, round)

    @torch.no_grad()
    def round(self, state: State) -> tuple[State, Metrics]:
        """One round: the next state, and `train/...` and `system/...` metrics."""
        began = time.perf_counter()
        cohort = self.cohort(state.round)
        fold = self._train(state, cohort)
        ok, weight = torch.cat(fold.ok).cpu(), torch.cat(fold.weight).cpu()
        if not ok.all():
            lost = [str(self.data.client_ids[k]) for k in torch.cat(fold.clients)[~ok].tolist()]
            log.warning("round %d: client %s dropped: not finite", state.round + 1, ", ".join(lost))
        if not weight.any():
            log.warning("round %d: no usable client; the model stays as it is", state.round + 1)
        loss, count = torch.cat(fold.sums).cpu()[ok].sum(0)
        server = self.algorithm.server(state.server, fold.aggregate, self.task.layout.trainable)
        self.task.layout.round_integers_(server["w"])
        seconds = time.perf_counter() - began
        return State(state.round + 1, server), {
            "round": state.round + 1,
            "train/loss": float(loss / count),
            "train/clients": int((weight > 0).sum()),
            "train/dropped_clients": int((~ok).sum()),
            "system/clients_per_s": len(cohort) / seconds,
            "system/round_s": seconds,
            "system/slots": self.slots.number,
            "system/slot_efficiency": fold.steps / max(fold.executed, 1),
            "system/client_steps": fold.steps,
            "system/backend": self.backend.name,
        }

    def _train(self, state: State, cohort: Tensor) -> Fold:
        """Train the cohort of a round and fold its messages."""
        rule, layout, slots = self.algorithm.rule, self.task.layout, self.slots
        w = state.server["w"]
        plan = make_plan(rule.batches, self.data.offsets, cohort)
        tape = Tape(
            plan,
            rule.batches,
            slots.number,
            seed=self.seed,
            round=state.round,
            draws=self.task.keyed,
        )
        update = make_update(rule, layout.param_views(w), state.round)
        fold = Fold(empty(layout.size, self.device), steps=int(plan.steps.sum()))
        examples = torch.from_numpy(plan.n)
        for idle in torch.from_numpy(tape.idle).split(slots.number):
            seats = torch.arange(len(idle))
            self._seat(state, seats, cohort[idle])
            self._commit(state, seats, cohort[idle], examples[idle], fold)
        for block in tape.blocks():
            seats, at = map(torch.from_numpy, block.starts)
            if len(seats):
                self._seat(state, seats, cohort[at])
            fold.executed += self.backend.run_(slots, block, self.data.columns, update)
            seats, at = map(torch.from_numpy, block.finishes)
            if len(seats):
                self._commit(state, seats, cohort[at], examples[at], fold)
        return fold

    def _seat(self, state: State, seats: Tensor, clients: Tensor) -> None:
        """Let `clients` [k] begin in the slots `seats` [k]."""
        begin = self.algorithm.begin(state.server, clients.to(self.device))
        self.slots.start_(seats.to(self.device), begin.model, begin.bias)

    def _commit(
        self, state: State, seats: Tensor, clients: Tensor, examples: Tensor, fold: Fold
    ) -> None:
        """Fold the messages of the clients that have finished in `seats` [K]."""
        seats, slots = seats.to(self.device), self.slots
        sums = slots.sums[seats]
        done = Finished(
            model=slots.flat[seats],
            state=[t[seats] for t in slots.state],
            bias=None if slots.bias is None else slots.bias[seats],
            client=clients.to(self.device),
            examples=examples.to(self.device),
            loss=sums[:, 0],
            weight=sums[:, 1],
            seen=slots.seen[seats],
        )
        upload = self.algorithm.upload(state.server, done)
        update, weight = upload.update, upload.weight.double()
        ok = (update.sum(1) + done.loss).isfinite()  # a finite sum has finite terms
        if not (ok.is_cpu and ok.all()):  # asking a GPU would wait for it
            ok = update.abs().amax(1).isfinite() & done.loss.isfinite()
            update = update.where(ok[:, None], 0)  # a weight of 0 is not enough: 0 * nan is nan
            weight = weight.where(ok, 0)
        add_(fold.aggregate, update, weight)
        fold.clients.append(clients)
        fold.ok.append(ok)
        fold.sums.append(sums)
        fold.weight.append(weight)

    def evaluate(self, state: State, columns: Batch) -> Metrics:
        """`eval/...`: loss and metrics of the model on pooled examples, columns [n, ...]."""
        self.task.check(columns)
        values = evaluate(self.task, state.server["w"], columns)
        return {f"eval/{name}": value for name, value in values.items()}

    def evaluate_clients(self, state: State, data: FederatedDataset | None = None) -> Metrics:
        """`client/...`: the spread over clients, those of `data` or those that train."""
        per_client = evaluate_clients(self.task, state.server["w"], data or self.data)
        return dict(spread(per_client))

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
