"""The local rule: what happens to a client's row once its gradient is known."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vecfl.errors import InputError
from vecfl.optim import ClientOptimizer, Rows
from vecfl.rows import moments
from vecfl.schedule import Batches


@dataclass(frozen=True)
class Statistics:
    """What rows [R] did in their steps, float64.

    gradients   [R, 3]: number, sum and sum of squares of the entries of the gradients of all steps,
                each after clipping, before pull and bias
    batch_loss  [R]: sum over batches of the batch's mean loss
    """

    gradients: Tensor
    batch_loss: Tensor

    @classmethod
    def zeros(cls, rows: int, device: torch.device) -> "Statistics":
        """Of rows without a step."""
        zeros = torch.zeros(rows, 4, device=device, dtype=torch.float64)
        return cls(zeros[:, :3], zeros[:, 3])

    def of(self, where: Tensor | slice) -> "Statistics":
        """Those of some rows."""
        return Statistics(self.gradients[where], self.batch_loss[where])


@dataclass(frozen=True)
class ExampleNoise:
    """A step's gradient is (sum over the batch of clip_C(g_i) + z C N(0, I)) / B.

    clip        C, the largest norm of g_i: of one example's loss sum over its loss weight
    multiplier  z

    B is the size of `Batches`, of a short batch too.
    """

    clip: float
    multiplier: float


@dataclass(frozen=True)
class LocalRule:
    """How a client trains. The correction is data: g <- clip(g) + mu (w_k - anchor) + bias.

    optimizer  moves the row; `batches` is its work in a round
    lr         a number, or a function of the round (from 0)
    clip       largest norm of the raw gradient of a step, or None
    mu         pull towards the anchor, the model of the round
    bias       whether the algorithm gives each client a correction row
    statistics whether `Statistics` of the steps are collected
    examples   how g is made of clipped gradients of single examples; None: it is the batch's own
    """

    optimizer: ClientOptimizer
    batches: Batches
    lr: float | Callable[[int], float]
    clip: float | None = None
    mu: float = 0.0
    bias: bool = False
    statistics: bool = False
    examples: ExampleNoise | None = field(default=None, repr=False)  # facts have it

    def __post_init__(self) -> None:
        for name, kind, right in (
            ("optimizer", ClientOptimizer, "sgd()"),
            ("batches", Batches, "Batches(10)"),
        ):
            if not isinstance(value := getattr(self, name), kind):
                raise InputError(f"{name} must be made by vecfl, such as {right}, not {value!r}")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip must be positive or None, not {self.clip}")
        if not self.mu >= 0:
            raise InputError(f"mu must be at least 0, not {self.mu}")
        if not callable(self.lr) and not 0 <= self.lr < math.inf:
            raise InputError(f"lr must be at least 0 and finite, not {self.lr}")

    @property
    def one_gradient(self) -> bool:
        """Whether a single step from the anchor moves a row by lr times its raw gradient."""
        corrected = self.clip is not None or self.bias or self.statistics
        return self.optimizer.plain and not (corrected or self.examples)

    def lr_of(self, round: int) -> float:
        """The learning rate of a round; InputError if a schedule gives none."""
        lr = float(self.lr(round)) if callable(self.lr) else self.lr
        if not 0 <= lr < math.inf:
            raise InputError(f"lr is {lr} in round {round + 1}: must be at least 0 and finite")
        return lr

    def numbers(self, round: int) -> dict[str, float | None]:
        """What may differ by round, as it is in this one: arguments for `replace`."""
        return {"lr": self.lr_of(round), "clip": self.clip, "mu": self.mu}


def clip_rows(grads: list[Tensor], limit: float) -> list[Tensor]:
    """Gradients [R, *shape] scaled so that no row's norm over all parameters exceeds `limit`."""
    squares = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in grads]).sum(0)
    scale = (limit / squares.sqrt()).clamp(max=1)  # limit / 0 is inf, clamped to 1
    return [g * scale.view(-1, *(1,) * (g.dim() - 1)) for g in grads]


@dataclass(frozen=True)
class Update:
    """`update(rows, grads)` for one round: clip, correct, step.

    plain   lr, where all it does is w <- w - lr g: a backend may do that while it computes g
    replay  takes the steps of a block (`vecfl.engine.graphs`), None: they are taken one by one
    """

    act: Callable[[Rows, list[Tensor]], None]
    plain: float | Tensor | None
    replay: Callable[..., None] | None = None

    def __call__(self, rows: Rows, grads: list[Tensor]) -> None:
        self.act(rows, grads)


def make_update(rule: LocalRule, anchor: list[Tensor], round: int) -> Update:
    """The update of a round; `anchor` holds the parameters [*shape] that mu pulls to."""
    return update_of(rule, anchor, rule.lr_of(round))


def update_of(rule: LocalRule, anchor: list[Tensor], lr: float | Tensor) -> Update:
    """The update at a learning rate, a number or a tensor []."""
    clip, mu, step_ = rule.clip, rule.mu, rule.optimizer.step_

    def act(rows: Rows, grads: list[Tensor]) -> None:
        if clip is not None:
            grads = clip_rows(grads, clip)
        if rows.gradients is not None:
            collect_(rows.gradients, grads)
        if mu:
            pull = torch._foreach_sub(rows.w, anchor)
            grads = list(torch._foreach_add(grads, pull, alpha=mu))
        if rows.bias is not None:
            grads = list(torch._foreach_add(grads, rows.bias))
        step_(rows, grads, lr)

    seen = clip is not None or mu or rule.bias or rule.statistics or rule.examples
    return Update(act, lr if rule.optimizer.plain and not seen else None)


def collect_(gradients: Tensor, grads: list[Tensor]) -> None:
    """Add gradients [R, *shape] to what `Statistics.gradients` [R, 3] says of them."""
    for g in (g.reshape(len(g), -1) for g in grads):
        gradients[:, 0] += g.shape[1]
        for total, more in zip(gradients.T[1:], moments(g), strict=True):
            total += more


def mean_weight(count: Tensor) -> Tensor:
    """1 / count, the factor that turns the gradient of a sum into that of a mean; 0 for 0."""
    return (count > 0) / count.clamp(min=torch.finfo(count.dtype).tiny)


def accumulate_(rows: Rows, grads: list[Tensor], weight: Tensor) -> None:
    """Add gradient sums [R, *shape] of a micro-batch and their weights [R] to the rows' totals."""
    assert rows.total is not None and rows.count is not None
    torch._foreach_add_(rows.total, grads)
    rows.count += weight


def apply_(rows: Rows, update: Update) -> None:
    """Step with the mean of what was accumulated, and start to accumulate anew."""
    assert rows.total is not None and rows.count is not None
    factor = mean_weight(rows.count)
    update(rows, [t * factor.view(-1, *(1,) * (t.dim() - 1)) for t in rows.total])
    torch._foreach_zero_(rows.total)
    rows.count.zero_()
