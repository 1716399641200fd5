"""Server replay: after aggregation the model takes steps on examples that the server has."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vecfl.aggregate import Aggregate
from vecfl.algorithms.base import Algorithm, Round, Server
from vecfl.algorithms.carrying import carrying, refuse_delays
from vecfl.engine import LocalRule, Slots, make_update
from vecfl.engine.loop import LoopBackend
from vecfl.errors import InputError
from vecfl.layout import Layout
from vecfl.losses import Batch
from vecfl.optim import ClientOptimizer, sgd
from vecfl.random import LIMITS
from vecfl.schedule import Batches, Plan, make_plan
from vecfl.state import known_by
from vecfl.tape import Tape
from vecfl.task import Task
from vecfl.trainer import operator_threads

CLIENT = (1 << LIMITS["client"]) - 1  # whose draws the server takes: a position that nobody has


def replay(
    algorithm: Algorithm,
    task: Task,
    columns: Batch,
    *,
    lr: float | Callable[[int], float],
    batches: Batches,
    optimizer: ClientOptimizer | None = None,
    clip: float | None = None,
) -> Algorithm:
    """`algorithm`, whose server trains on `columns` [n, ...] after each of its steps.

    task     as of the simulation: its module, loss and augmentation
    batches  the work in a round, epochs or steps; the other arguments are as in `vecfl.fedavg`

    The optimizer goes on where it stood the round before: its tensors are part of the server's
    state. A round without a client that counts changes nothing, and has no replay. Several ranks do
    the same, each with one operator thread, so that all have the same bits. The server replay of
    FLUTE, Hipolito Garcia et al., arXiv:2203.13789. It stands inside of `delayed`.
    """
    refuse_delays(algorithm, "replay")
    training = Training(task, columns, LocalRule(optimizer or sgd(), batches, lr, clip))
    inner = carrying(algorithm, "replay/", training.init, moves=True)

    def step(server: Server, sums: Aggregate, round: Round) -> Server:
        new = inner.server(server, sums, round)
        return new | training.after(new, round) if algorithm.moves(sums) else new

    facts = {**inner.facts, "replay": f"{known_by(training.rule)}, {training.examples} examples"}
    made = replace(inner, name=f"{algorithm.name}, replay", server=step, facts=facts)
    return made.promises(algorithm.privacy)


class Training:
    """What the server does on examples of its own, `columns` [n, ...], by a client's rule.

    Raises InputError where they do not fit the task, or make no batch.
    """

    def __init__(self, task: Task, columns: Batch, rule: LocalRule) -> None:
        task.check(columns)
        self.task, self.columns, self.rule = task, columns, rule
        self.examples = len(columns[task.inputs[0]])
        if rule.batches.max_tokens is not None:
            raise InputError("replay: max_tokens is for clients; give max_examples")
        if not self.plan(0, 0).steps.any():
            what = f"{self.examples} examples make no batch of {rule.batches.size}"
            raise InputError(f"replay: {what}")
        self.backends: dict[tuple[torch.device, torch.dtype], LoopBackend] = {}

    def plan(self, seed: int, round: int) -> Plan:
        """The work of a round, as that of a client."""
        offsets, alone = torch.tensor([0, self.examples]), torch.tensor([0])
        plan = make_plan(self.rule.batches, offsets, alone, seed=seed, round=round)
        return replace(plan, client=plan.client + CLIENT)

    def init(self, w: Tensor, layout: Layout) -> Server:
        """The tensors of the optimizer before round 1."""
        own = self.task.to("cpu", w.dtype).layout
        if layout.params != own.params:
            raise InputError("replay: its task has another module than that of the clients")
        if layout.frozen != own.frozen:
            what = "frozen parameters or constant buffers"
            raise InputError(f"replay: its task has other {what} than that of the clients")
        return kept(Slots(layout, self.rule, 1, w.device, w.dtype))

    def after(self, server: Server, round: Round) -> Server:
        """The model and the optimizer's tensors after the steps of a round."""
        w, layout, rule = server["w"], round.layout, self.rule
        backend, slots = self._backend(w), Slots(layout, rule, 1, w.device, w.dtype)
        backend.task.draws.seed = round.seed
        slots.start_(torch.tensor([0]), w, None)
        for name, tensor in kept(slots).items():
            tensor.copy_(server[name])
        how: dict[str, int] = {"seed": round.seed, "round": round.number}
        update = make_update(rule, [], round.number)
        with operator_threads(1):
            plan = self.plan(round.seed, round.number)
            for block in Tape(plan, rule.batches, 1, draws=backend.keyed, **how).blocks():
                backend.run_(slots, block, self.columns, update)
        return {"w": slots.flat[0]} | kept(slots)

    def _backend(self, w: Tensor) -> LoopBackend:
        """A backend for models like w, made once; the examples come to its device."""
        kind = w.device, w.dtype
        if kind not in self.backends:
            self.backends[kind] = LoopBackend(self.task.to(*kind))
            self.columns = {name: column.to(w.device) for name, column in self.columns.items()}
        return self.backends[kind]


def kept(slots: Slots) -> Server:
    """The tensors of a row's optimizer, by the names that they have in the server's state."""
    found = {f"replay/{i}": tensor for i, tensor in enumerate(slots.state)}
    return found if slots.steps is None else found | {"replay/steps": slots.steps}
