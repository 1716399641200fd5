"""Learning rates that change within a round, by the steps of each client."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vecfl.errors import InputError
from vecfl.optim import ClientOptimizer, Rate, Rows
from vecfl.schedules import Schedule
from vecfl.work import said

Factor = Callable[[Tensor], Tensor]


def within_round(optimizer: ClientOptimizer, factor: Factor) -> ClientOptimizer:
    """`optimizer` with the learning rate lr * factor(step) within a round.

    factor  step [R] -> [R], float64; step counts the optimizer steps that the client has made in
            this round, from 0: `torch.optim.lr_scheduler.LambdaLR`, begun anew by each client

    Raises InputError where factor(step) is not as many finite numbers of at least 0.
    """
    check(factor)

    def step_(rows: Rows, grads: list[Tensor], lr: Rate) -> None:
        assert rows.steps is not None
        share = factor(rows.steps.double()).to(rows.w[0].dtype)  # before the optimizer counts
        shares = [share.view(-1, *(1,) * (w.dim() - 1)) for w in rows.w]
        if optimizer.plain:
            optimizer.step_(rows, list(torch._foreach_mul(grads, shares)), lr)
        else:  # every step is linear in lr
            before = [w.clone() for w in rows.w]
            optimizer.step_(rows, grads, lr)
            for w, old, part in zip(rows.w, before, shares, strict=True):
                torch.lerp(old, w, part, out=w)
        if not optimizer.counts:
            rows.steps += 1

    name = f"within_round {said(factor)} {optimizer.name}"
    return replace(optimizer, name=name, step_=step_, counts=True, beta=None)


def by_step(schedule: Schedule) -> Factor:
    """A schedule of rounds (see `vecfl.schedules`) as a factor of the steps of `within_round`.

    Its values stand in a table that grows with the steps; on a GPU each step waits for their
    number.
    """
    table = torch.empty(0, dtype=torch.float64)

    def factor(step: Tensor) -> Tensor:
        nonlocal table
        most, known = int(step.max()) + 1, table  # which another worker may replace meanwhile
        if most > len(known):
            values = [float(schedule(s)) for s in range(2 * most)]
            table = known = torch.tensor(values, dtype=torch.float64)
        return known.to(step.device)[step.long()]

    factor.__qualname__ = said(schedule)
    return factor


def check(factor: Factor) -> None:
    """InputError unless the factor of three rows is three finite numbers of at least 0."""
    steps = torch.arange(3, dtype=torch.float64)
    found = factor(steps)
    if not isinstance(found, Tensor) or found.shape != steps.shape:
        what = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else repr(found)
        raise InputError(
            "within_round(factor): the steps [0, 1, 2] of three clients must give a tensor [3], "
            f"not {what}; compute with the steps, as 0.9**step does"
        )
    if not (found.isfinite() & (found >= 0)).all():
        raise InputError(
            "within_round(factor): must be at least 0 and finite, not "
            f"{found.tolist()} for the steps [0, 1, 2]"
        )
