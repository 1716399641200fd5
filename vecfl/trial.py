"""Trying a module before clients train it: what padding, copying or vmap would spoil is refused.

A trial is no proof: it sees what the example batch shows.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vecfl.errors import InputError
from vecfl.losses import Batch, Score
from vecfl.modules import Draws, blame
from vecfl.random import Kind, stream


class Parts(Protocol):
    """What a trial needs of a task."""

    module: nn.Module
    draws: Draws
    loss: Score
    metrics: Mapping[str, Score]
    inputs: tuple[str, ...]

    def prepare(self, batch: Batch, streams: Tensor | None = None) -> dict[str, Tensor]: ...

    def output(self, batch: Batch) -> Any: ...


def refuse_two_scaled(inputs: Sequence[str], columns: Batch) -> None:
    """InputError if two inputs are uint8: one scale cannot be meant for both."""
    scaled = [name for name in inputs if name in columns and columns[name].dtype == torch.uint8]
    if len(scaled) > 1:
        raise InputError(
            f"inputs {scaled[0]!r} and {scaled[1]!r} are both uint8, and uint8 is multiplied by "
            "`scale`; give what is no image as another integer type or as floats"
        )


def check_embeddings(task: Parts, columns: Batch) -> None:
    """InputError if a column that feeds an `nn.Embedding` has an index out of its range.

    Under vmap such an index would read and write another client's row.
    """
    one = {name: c[:1].clone() for name, c in columns.items()}

    def look(module: nn.Embedding, args: tuple[Tensor, ...]) -> None:
        for name in task.inputs:
            column, n = columns[name], module.num_embeddings
            if column.dtype != args[0].dtype or not torch.equal(args[0].cpu(), one[name].cpu()):
                continue
            low, high = int(column.min()), int(column.max())
            if low < 0 or high >= n:
                raise InputError(
                    f"column {name!r} holds index {low if low < 0 else high}, out of range for an "
                    f"nn.Embedding of {n}: indices are 0 to {n - 1}"
                )

    embeddings = [m for m in task.module.modules() if isinstance(m, nn.Embedding)]
    hooks = [m.register_forward_pre_hook(look) for m in embeddings]
    try:
        device = next(task.module.parameters()).device
        task.output(task.prepare({name: c.to(device) for name, c in one.items()}))
    finally:
        for hook in hooks:
            hook.remove()


def require_inputs(task: Parts, columns: Batch) -> None:
    """InputError naming the first input of `task` that `columns` lack, or that is no tensor."""
    for name in task.inputs:
        if name not in columns:
            raise InputError(f"the data have no column {name!r}; they have {sorted(columns)}")
    for name, column in columns.items():
        if not isinstance(column, Tensor):
            kind = type(column).__name__
            raise InputError(f"column {name!r} is a {kind}, not a tensor; use torch.as_tensor")


@dataclass(frozen=True)
class Trial:
    """One training step of a float64 copy: per example [B], per parameter, the buffers after."""

    value: Tensor
    weight: Tensor
    grads: list[Tensor]
    buffers: dict[str, Tensor]


def trial(task: Parts, batch: Batch, valid: int, outside: Sequence[Tensor] = ()) -> Trial:
    """Try one step whose loss counts the first `valid` examples; see `Task` for what is refused.

    `outside` are parameters that the loss must not reach: those of the module before the copy.
    """
    copied = task_copy(task)
    params = [p for p in copied.module.parameters() if p.requires_grad]
    before = {name: b.clone() for name, b in copied.module.named_buffers()}
    with torch.enable_grad():
        ready = try_prepare(copied, batch)
        output = try_forward(copied, ready)
        check_pair(copied, "loss", copied.loss, output, ready)
        value, weight = copied.loss(output, ready)
        for name, metric in task.metrics.items():
            check_pair(copied, f"metric {name!r}", metric, output, ready)
        after, calls = dict(copied.module.named_buffers()), copied.draws.calls
        total = value[:valid].sum()
        if not total.requires_grad:
            raise InputError("the loss depends on no trainable parameter of the module")
        grads = torch.autograd.grad(total, params, retain_graph=True, materialize_grads=True)
        if copied.draws.calls != calls:
            raise InputError(
                "the backward pass calls dropout again (checkpointing), which would draw another "
                "mask; leave out the checkpoint, or dropout inside of it"
            )
        known = [p for p in outside if p.requires_grad]
        if any(g is not None for g in torch.autograd.grad(total, known, allow_unused=True)):
            raise InputError(
                "the loss reads parameters of the module itself, but vecfl trains copies of them; "
                "return what it needs from forward, and use only (output, batch)"
            )
    for path, buffer in before.items():
        parent, _, name = path.rpartition(".")
        setattr(copied.module.get_submodule(parent), name, buffer)
    ready = try_prepare(copied, batch)
    again, _ = copied.loss(try_forward(copied, ready), ready)
    if not torch.allclose(again, value, rtol=1e-9, atol=1e-12, equal_nan=True):
        raise InputError(
            "the module gives another result for the same input when it is called again: it keeps "
            "state outside of its buffers, or draws from a generator of its own"
        )
    weight = torch.ones_like(value) if weight is None else weight
    return Trial(value.detach(), weight.detach(), list(grads), after)


def try_prepare(task: Parts, batch: Batch) -> Batch:
    """The batch as a training step has it; InputError if augmentation fails, or draws by itself."""
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        try:  # on copies: a transform may write into its images
            ready, again = (
                task.prepare({name: c.clone() for name, c in batch.items()}, stream(Kind.DROPOUT))
                for _ in range(2)
            )
        except InputError:
            raise
        except Exception as error:
            shape = list(batch[task.inputs[0]].shape)
            raise InputError(
                f"augment failed on the example batch {shape}: {first_line(error)}"
            ) from error
        x, same = ready[task.inputs[0]], again[task.inputs[0]]
        still = torch.equal(before, torch.get_rng_state())
        if not still or not torch.allclose(x, same, equal_nan=True):
            raise InputError(
                "augment draws from a random generator, which differs between backends; use the "
                "words that it is given"
            )
    return ready


def try_forward(task: Parts, batch: Batch) -> Any:
    """The output of a training forward pass; InputError naming what fails or draws."""
    task.draws.begin(stream(Kind.DROPOUT))
    with torch.random.fork_rng(devices=[]), blame(task.module) as found:
        try:
            output = task.output(batch)
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
    return output


def task_copy(task: Parts) -> Parts:
    """A float64 copy of `task` on the CPU, before its layout is known."""
    new = copy.copy(task)
    new.module, new.draws = copy.deepcopy((task.module, task.draws))
    new.module.to("cpu", torch.float64)
    return new


def first_line(error: Exception) -> str:
    """The first line of an exception's text."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 160 else line[:157] + "..."


def check_pair(task: Parts, what: str, score: Score, output: Any, batch: Batch) -> None:
    """InputError unless `score` gives two tensors [B]."""
    n = len(batch[task.inputs[0]])
    try:
        pair = score(output, batch)
    except Exception as error:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"the {what} failed on output {shape}: {first_line(error)}") from error
    parts = pair if isinstance(pair, tuple) else (pair,)
    got = [list(t.shape) if isinstance(t, Tensor) else t and type(t).__name__ for t in parts]
    if got not in ([[n], [n]], [[n], None]):
        raise InputError(
            f"the {what} must give (sum [B], weight [B] or None), one number per example (B = {n} "
            f"here), not {got}; reduction='none' keeps the examples apart"
        )
    if parts[1] is not None and not parts[1].is_floating_point():
        raise InputError(f"the {what} gives {parts[1].dtype} weights; weights are floats")


def changing_buffers(task: Parts, example: Batch, outside: Sequence[Tensor]) -> list[str]:
    """The buffers that a training step changes, by trial; refuses what padding would spoil."""
    require_inputs(task, example)
    n = min(len(example[task.inputs[0]]), 4)
    if n < 2:
        raise InputError("the example batch needs two examples or more")
    rows = torch.arange(n)

    def attempt(index: Tensor) -> Trial:
        batch = {name: c[index.to(c.device)].cpu() for name, c in example.items()}
        return trial(task, batch, n, outside)

    cut, padded, rolled = attempt(rows), attempt(torch.cat((rows, rows[:1]))), attempt(rows.roll(1))
    alone = attempt(rows[:1])
    pairs = [(cut.value[:1], alone.value), (cut.weight[:1], alone.weight)]
    pairs += [(cut.value, padded.value[:n]), (cut.weight, padded.weight[:n])]
    pairs += zip(cut.grads, padded.grads, strict=True)
    if not all(torch.allclose(a, b, rtol=1e-6, atol=1e-9, equal_nan=True) for a, b in pairs):
        raise InputError(
            "the module, the loss or augment mixes the examples of a batch: one more example "
            "changes the loss or gradient of the others, so padding would change results; keep "
            "examples apart"
        )
    start = dict(task_copy(task).module.named_buffers())
    changed = [name for name, b in cut.buffers.items() if not torch.equal(b, start[name])]
    for name in changed:
        others = (padded.buffers[name], rolled.buffers[name])
        if not all(torch.equal(cut.buffers[name], other) for other in others):
            raise InputError(
                f"buffer '{name}' is computed from the examples of a batch, which padded examples "
                "would enter; use a layer without running statistics (GroupNorm, LayerNorm)"
            )
    return changed
