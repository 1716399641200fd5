"""Server replay: after aggregation the model takes steps on examples that the server has."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from vecfl.aggregate import Aggregate
from vecfl.algorithms.base import Algorithm, Round, Server
from vecfl.algorithms.carrying import carrying
from vecfl.engine import LocalRule, Slots, make_update
from vecfl.engine.loop import LoopBackend
from vecfl.errors import InputError
from vecfl.layout import Layout
from vecfl.losses import Batch
from vecfl.optim import ClientOptimizer, sgd
from vecfl.random import LIMITS
from vecfl.schedule import Batches, Plan, make_plan
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
    FLUTE, Hipolito Garcia et al., arXiv:2203.13789.
    """
    task.check(columns)
    rule = LocalRule(optimizer or sgd(), batches, lr, clip)
    examples = len(columns[task.inputs[0]])
    if batches.max_tokens is not None:
        raise InputError("replay: max_tokens is for clients; give max_examples")
    if not plan_of(rule, examples, 0, 0).steps.any():
        raise InputError(f"replay: {examples} examples make no batch of {batches}")

    @cache
    def prepared(device: torch.device, dtype: torch.dtype) -> tuple[LoopBackend, Batch]:
        return LoopBackend(task.to(device, dtype)), {k: c.to(device) for k, c in columns.items()}

    def init(w: Tensor, layout: Layout) -> Server:
        if layout.params != task.to("cpu", w.dtype).layout.params:
            raise InputError("replay: its task has another module than that of the clients")
        return kept(Slots(layout, rule, 1, w.device, w.dtype))

    inner = carrying(algorithm, "replay/", init)

    def step(server: Server, sums: Aggregate, round: Round) -> Server:
        new = inner.server(server, sums, round)
        if sums.mean() is None:
            return new
        round.layout.round_integers_(new["w"])
        backend, there = prepared(new["w"].device, new["w"].dtype)
        return new | trained(rule, backend, there, new["w"], server, round)

    return replace(inner, name=f"{algorithm.name}, replay", server=step)


def plan_of(rule: LocalRule, examples: int, seed: int, round: int) -> Plan:
    """The work of the server in a round, as that of a client."""
    whole, alone = torch.tensor([0, examples]), torch.tensor([0])
    plan = make_plan(rule.batches, whole, alone, seed=seed, round=round)
    return replace(plan, client=plan.client + CLIENT)


def trained(
    rule: LocalRule,
    backend: LoopBackend,
    columns: Batch,
    w: Tensor,
    server: Server,
    round: Round,
) -> Server:
    """The model w [P] after a round of replay, and the optimizer's tensors, which go on."""
    backend.task.draws.seed = round.seed
    slots = Slots(round.layout, rule, 1, w.device, w.dtype)
    slots.start_(torch.tensor([0]), w, None)
    for name, tensor in kept(slots).items():
        tensor.copy_(server[name])
    plan = plan_of(rule, len(next(iter(columns.values()))), round.seed, round.number)
    how = {"seed": round.seed, "round": round.number}
    tape = Tape(plan, rule.batches, 1, draws=backend.keyed, **how)
    update = make_update(rule, [], round.number)
    with operator_threads(1):
        for block in tape.blocks():
            backend.run_(slots, block, columns, update)
    return {"w": slots.flat[0]} | kept(slots)


def kept(slots: Slots) -> Server:
    """The tensors of a row's optimizer, by the names that they have in the server's state."""
    found = {f"replay/{i}": tensor for i, tensor in enumerate(slots.state)}
    return found if slots.steps is None else found | {"replay/steps": slots.steps}
