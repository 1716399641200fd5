"""Clients that take one plain step: their gradients are added up in one batch, without rows.

All of them start from the model of the round, so the weighted sum of their messages is the gradient
of one weighted sum of losses: an ordinary forward and backward pass of an ordinary module. Where
messages are clipped, norms of single gradients come first (`vecfl.engine.ghost`).
"""

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecfl.aggregate import add_extra_
from vecfl.algorithms import Algorithm, Finished, Round
from vecfl.engine.backend import gather
from vecfl.engine.ghost import Ghost
from vecfl.engine.stacked import AGREE, plain_gradients
from vecfl.engine.together import weighed
from vecfl.errors import InputError
from vecfl.job import Ended, Fold, Job
from vecfl.losses import Batch
from vecfl.processes import Stop
from vecfl.random import Kind, stream
from vecfl.rows import LEFT
from vecfl.tape import Block, Tape
from vecfl.task import Task

log = logging.getLogger("vecfl")
NO_ROWS: Any = None  # weights that look at rows fail


class OneBatch:
    """Folds clients that take one plain step, `slots` of them at a time.

    Raises InputError where clients of this algorithm, or of this module, need rows.
    """

    def __init__(
        self, task: Task, algorithm: Algorithm, slots: int, seed: int, clients: int
    ) -> None:
        gradient = algorithm.one_gradient
        if gradient is None or algorithm.delay or algorithm.aggregator:
            raise InputError(f"{algorithm.name}: messages are not gradients alone")
        self.gradient, self.batches = gradient, algorithm.rule.batches
        self.slots, self.seed, self.clients = slots, seed, clients
        self.task, self.keyed = copy.deepcopy(task), task.keyed
        module = self.task.module.train()
        self.params = [module.get_parameter(e.name) for e in task.layout.params]
        self.device = self.params[0].device
        self.ghost = Ghost(self.task) if self.gradient.clips else None
        require_no_rows(self)

    def train(self, job: Job, lr: float, fold: Fold, stop: Stop | None) -> np.ndarray:
        """Fold the clients that take one step; the others, as positions in the plan, need rows."""
        one = np.flatnonzero(job.plan.steps == 1)
        if job.grid is not None or job.sampled is not None or job.keep is not None or not len(one):
            return np.arange(len(job.plan.steps))
        for p, view in zip(self.params, self.task.layout.param_views(job.server["w"]), strict=True):
            p.data = view
        left, some = [np.flatnonzero(job.plan.steps != 1)], job.of(one)
        tape = Tape(
            some.plan, self.batches, self.slots, seed=self.seed, round=job.round, draws=self.keyed
        )
        for block in tape.blocks():
            if stop is not None and stop.is_set():
                break
            if not self._fold(some, block, lr, fold):
                left.append(one[block.starts[1]])
        return np.sort(np.concatenate(left))

    def _fold(self, job: Job, block: Block, lr: float, fold: Fold) -> bool:
        """Fold the clients of a block; whether they, and their sum, were finite, else nobody."""
        seats, members = map(torch.from_numpy, block.starts)
        index, valid = (t[0, seats].to(self.device) for t in (block.index, block.valid))
        streams = None if block.streams is None else block.streams[0, seats].to(self.device)
        mask = torch.arange(index.shape[1], device=self.device) < valid[:, None]
        output = self.task.output if self.ghost is None else self.ghost.output
        value, weight, shape = losses(self.task, gather(job.columns, index), streams, output)
        outer, total, count = weighed(value, weight, mask.to(value.dtype), shape, True)
        count = valid if count is None else count
        done = self._finished(job, members, total.double(), count.double(), valid)
        amount = self.gradient.weights(done).double()
        scale = torch.full_like(amount, lr if self.gradient.scale is None else self.gradient.scale)
        extra: dict[str, Tensor] = {}
        if self.ghost is not None:
            norm = self.ghost.norms(value, outer, len(members)) * scale
            factor, extra = clipped(self.gradient.clips, norm, amount, value.dtype)
            scale = scale * factor
        outer = outer.view(shape) * (amount * scale)[:, None].to(outer)
        grads = torch.autograd.grad(value, self.params, outer.flatten(), materialize_grads=True)
        sums = torch.cat([g.flatten() for g in grads]).double()
        if not bool(sums.isfinite().all() & (total + amount).isfinite().all()):
            return False
        fold.aggregate.total += sums
        fold.aggregate.weight += amount.sum()
        add_extra_(fold.aggregate, extra)
        fold.executed += len(members)
        ok, size = torch.ones_like(amount, dtype=torch.bool), len(sums) * value.element_size()
        lost = torch.stack((done.loss, done.weight), 1)
        sent = torch.full_like(done.client, size)
        fold.tell(Ended(job.clients[members], ok, lost, amount, sent))
        return True

    def _finished(
        self, job: Job, members: Tensor, loss: Tensor, weight: Tensor, seen: Tensor
    ) -> Finished:
        """What weights may know of the clients at `members` [k]: all but their rows."""
        plan = job.plan
        client, occurrence, examples = (
            torch.from_numpy(column)[members].to(self.device)
            for column in (plan.client, plan.occurrence, plan.n)
        )
        at = Round(job.round, self.seed, self.task.layout, self.clients)
        return Finished(at, NO_ROWS, [], None, client, occurrence, examples, loss, weight, seen)


def losses(
    task: Task, columns: Batch, streams: Tensor | None, output: Callable[[Batch], Any]
) -> tuple[Tensor, Tensor | None, torch.Size]:
    """Loss sums and weights [k * B] of k clients' batches, columns [k, B, ...]; (k, B)."""
    shape = next(iter(columns.values())).shape[:2]
    task.draws.examples = shape.numel()
    if streams is not None:
        task.draws.begin(streams)
    batch = {n: c.flatten(0, 1) for n, c in task.prepare(columns, streams).items()}
    with torch.enable_grad():
        return *task.loss(output(batch), batch), shape


def one_batch(
    task: Task, example: Batch, algorithm: Algorithm, slots: int, seed: int, clients: int
) -> OneBatch | None:
    """What folds clients of one step; None, and a line for the curious, where they need rows.

    example holds three batches: the norms of three clients are compared with plain ones.
    """
    try:
        made = OneBatch(task, algorithm, slots, seed, clients)
        if made.ghost is not None:
            check_norms(task, example)
    except InputError as error:
        log.debug("clients of one step get rows: %s", error)
        return None
    return made


def require_no_rows(made: OneBatch) -> None:
    """InputError if the weights of clients look at their rows."""
    nobody = torch.ones(1, dtype=torch.int64)
    at, sums = Round(0, 0, made.task.layout, made.clients), nobody.double()
    done = Finished(at, NO_ROWS, [], None, nobody, nobody, nobody, sums, sums, nobody)
    try:
        made.gradient.weights(done)
    except Exception as error:
        raise InputError(f"weights look at rows: {error}") from error


def check_norms(task: Task, example: Batch) -> None:
    """InputError unless norms of three clients' gradients, in float64, are those of plain ones."""
    task = task.to(next(task.module.parameters()).device, torch.float64)
    watched, row = copy.deepcopy(task), task.layout.flatten(task.module)
    finite = {k: c.to(row.device).where(c.to(row.device).isfinite(), 0) for k, c in example.items()}
    columns = {k: c.unflatten(0, (3, -1)) for k, c in finite.items()}
    streams = stream(Kind.DROPOUT, client=torch.arange(3)).to(row.device)
    ghost = Ghost(watched)
    value, weight, shape = losses(watched, columns, streams, ghost.output)
    outer, _, _ = weighed(value, weight, None, shape, True)
    norms = ghost.norms(value, outer, 3)
    for s, norm in enumerate(norms):
        one = {k: c[s] for k, c in columns.items()}
        grads = plain_gradients(task, row, one, streams[s])
        right = torch.cat([g.flatten() for g in grads]).norm()
        if not torch.allclose(norm, right, rtol=AGREE, atol=0, equal_nan=True):
            raise InputError(f"the norm of a gradient comes out as {norm:g}, not {right:g}")


def clipped(
    clips: tuple[tuple[str, float], ...], norm: Tensor, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """The factors [k] of messages with norms [k], clipped in turn, and what the metrics add up."""
    some, factor, extra = weight > 0, torch.ones_like(norm), dict[str, Tensor]()
    for prefix, limit in clips:
        bound, length = limit * LEFT[dtype], norm * factor
        over = length > bound
        factor = factor.where(~over, bound / norm)
        found = {"clients": some, "clipped": some & over, "norm": length.where(some, 0)}
        extra |= {prefix + name: values for name, values in found.items()}
    return factor, extra
