"""Task: an ordinary module, a loss per example and metrics, made ready for many clients at once."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vecfl.errors import InputError
from vecfl.layout import Layout
from vecfl.losses import Batch, Score
from vecfl.modules import Draws, KeyedDropout, blame, key_dropouts, refuse_batchnorm
from vecfl.random import Kind, stream


class Task:
    """What clients learn.

    module   an ordinary nn.Module for an ordinary batch; the task keeps a copy, with its dropout
             layers replaced by keyed ones. Parameters with requires_grad=False are frozen.
    loss     (output, batch) -> (sum [B], weight [B]): see `vecfl.losses`
    metrics  name -> (output, batch) -> (sum [B], weight [B]), from the same forward pass
    example  a small batch, two examples or more, on which the module is tried
    inputs   the columns that the module is called with, in this order
    scale    uint8 inputs x become x * scale, in the step and on the device

    Raises InputError naming the submodule, the reason and the remedy where clients cannot train the
    module side by side: it has BatchNorm, draws from torch's generator, mixes the examples of a
    batch, keeps buffers computed from data, or fails; or where the loss gives no pair of [B].
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Score,
        metrics: Mapping[str, Score] | None = None,
        *,
        example: Batch,
        inputs: tuple[str, ...] = ("x",),
        scale: float = 1 / 255,
    ) -> None:
        refuse_batchnorm(module)
        if not any(p.requires_grad for p in module.parameters()):
            raise InputError("the module has no trainable parameter: all have requires_grad=False")
        self.draws = Draws()
        self.module = key_dropouts(copy.deepcopy(module), self.draws).train()
        self.loss, self.metrics = loss, dict(metrics or {})
        self.inputs, self.scale = tuple(inputs), scale
        self.layout = Layout.of(self.module, changing_buffers(self, example))

    @property
    def keyed(self) -> bool:
        """Whether a training step draws from Philox."""
        return any(isinstance(m, KeyedDropout) for m in self.module.modules())

    def to(self, device: str | torch.device, dtype: torch.dtype) -> "Task":
        """An independent copy on `device` with floating-point parameters of `dtype`."""
        new = copy.deepcopy(self)
        new.module.to(device, dtype)
        new.layout = Layout.of(new.module, [e.name for e in self.layout.buffers])
        return new

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Columns [B, ...] as the module takes them: uint8 inputs scaled, floats in its dtype."""
        dtype = next(self.module.parameters()).dtype
        ready = {}
        for name, column in batch.items():
            if column.dtype == torch.uint8 and name in self.inputs:
                column = column.to(dtype) * self.scale
            elif column.is_floating_point():
                column = column.to(dtype)
            ready[name] = column
        return ready

    def output(self, batch: Batch) -> Any:
        """The module's output for a prepared batch."""
        return self.module(*[batch[name] for name in self.inputs])

    def check_labels(self, output: Any, columns: Batch) -> None:
        """InputError if the loss knows that labels of `columns` do not fit the module's output."""
        check = getattr(self.loss, "check", None)
        if check is not None:
            check(output, columns)

    def check(self, columns: Batch) -> None:
        """InputError if `columns` [n, ...] do not fit: a missing input, a label out of range."""
        require_inputs(self, columns)
        task = copy.deepcopy(self)
        task.module.eval()
        device = next(task.module.parameters()).device
        one = {name: column[:1].to(device) for name, column in columns.items()}
        with torch.no_grad():
            self.check_labels(task.output(task.prepare(one)), columns)


def require_inputs(task: Task, columns: Batch) -> None:
    """InputError naming the first input of `task` that `columns` lack, or that is no tensor."""
    for name in task.inputs:
        if name not in columns:
            raise InputError(f"the data have no column {name!r}; they have {sorted(columns)}")
    for name, column in columns.items():
        if not isinstance(column, Tensor):
            kind = type(column).__name__
            raise InputError(f"column {name!r} is a {kind}, not a tensor; use torch.as_tensor")


def trial(task: Task, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """One training forward pass of a float64 copy: the loss sums [B], the buffers afterwards."""
    copied = task_copy(task)
    copied.draws.begin(stream(Kind.DROPOUT))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), blame(copied.module) as found:
        try:
            output = copied.output(copied.prepare(batch))
        except Exception as error:
            shapes = {name: list(batch[name].shape) for name in task.inputs}
            raise InputError(
                f"{found[0]} failed on the example batch {shapes}: {first_line(error)}"
            ) from error
        if len(found) > 1:
            raise InputError(
                f"{found[1]} draws from torch's random generator, which differs between "
                "backends; use nn.Dropout layers (they become keyed) or set its dropout to 0"
            )
    check_pair(copied, "loss", copied.loss, output, batch)
    for name, metric in task.metrics.items():
        check_pair(copied, f"metric {name!r}", metric, output, batch)
    value, _ = copied.loss(output, copied.prepare(batch))
    return value.detach(), dict(copied.module.named_buffers())


def task_copy(task: Task) -> Task:
    """A float64 copy of `task` on the CPU, before its layout is known."""
    new = copy.copy(task)
    new.module, new.draws = copy.deepcopy((task.module, task.draws))
    new.module.to("cpu", torch.float64)
    return new


def first_line(error: Exception) -> str:
    """The first line of an exception's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_pair(task: Task, what: str, score: Score, output: Any, batch: Batch) -> None:
    """InputError unless `score` gives two tensors [B]."""
    n = len(batch[task.inputs[0]])
    try:
        pair = score(output, task.prepare(batch))
    except Exception as error:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"the {what} failed on output {shape}: {first_line(error)}") from error
    tensors = (
        [*pair[:1], *(t for t in pair[1:] if t is not None)] if isinstance(pair, tuple) else []
    )
    shapes = [list(t.shape) for t in tensors if isinstance(t, Tensor)]
    if not isinstance(pair, tuple) or len(pair) != 2 or shapes != [[n]] * len(tensors):
        got = shapes if isinstance(pair, tuple) else getattr(pair, "shape", type(pair).__name__)
        raise InputError(
            f"the {what} must give (sum [B], weight [B] or None), one number per example (B = {n} "
            f"here), not {got}; reduction='none' keeps the examples apart"
        )


def changing_buffers(task: Task, example: Batch) -> list[str]:
    """The buffers that a training step changes, by trial; refuses what padding would spoil."""
    require_inputs(task, example)
    pair = {name: column[:2] for name, column in example.items()}
    if len(pair[task.inputs[0]]) < 2:
        raise InputError("the example batch needs two examples or more")
    before = dict(task_copy(task).module.named_buffers())
    together, after = trial(task, pair)
    first, one = trial(task, {name: column[:1] for name, column in pair.items()})
    _, other = trial(task, {name: column[1:] for name, column in pair.items()})
    if not torch.allclose(together[:1], first, rtol=1e-6, atol=1e-9, equal_nan=True):
        raise InputError(
            "the module mixes the examples of a batch: the loss of one example changes with the "
            "others beside it, so padded examples would change results; normalise per example"
        )
    changed = [name for name, b in after.items() if not torch.equal(b, before[name])]
    for name in changed:
        if not all(torch.equal(after[name], alone[name]) for alone in (one, other)):
            raise InputError(
                f"buffer '{name}' is computed from the examples of a batch, which padded examples "
                "would enter; use a layer without running statistics (GroupNorm, LayerNorm)"
            )
    return changed
