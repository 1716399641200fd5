"""The stacked backend: layers that hold the parameters of all S clients, on one long batch.

The examples of all slots form an ordinary batch [S * B, ...]. What has no parameters runs on it as
it is; only layers with parameters know whose example is whose. Today those are `nn.Linear`.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from vecfl.engine.layers import stack_layers
from vecfl.engine.loop import run_backward
from vecfl.engine.rule import Update, mean_weight
from vecfl.engine.sequence import Sequence
from vecfl.engine.slots import Slots
from vecfl.engine.together import Step, at_rate, gathered, train_together_, weighed
from vecfl.engine.vmap import VmapBackend
from vecfl.errors import InputError
from vecfl.losses import Batch
from vecfl.random import Kind, stream
from vecfl.tape import Block
from vecfl.task import Task
from vecfl.trial import first_line

AGREE = 1e-9  # of gradients in float64, relative to the largest


class Stack:
    """A copy of a task whose layers take all clients at once; its gradients.

    Raises InputError naming the module that cannot be stacked.
    """

    def __init__(self, task: Task) -> None:
        self.prepare, self.task = task.prepare, copy.deepcopy(task)
        self.task.module.train()
        self.task.module, self.layers = stack_layers(self.task.module, task.layout)

    def step(
        self,
        w: list[Tensor],
        batch: Batch,
        mask: Tensor | None,
        streams: Tensor | None,
        mean: bool,
        rate: float | Tensor | None,
    ) -> Step:
        """Gradients at w ([S, *shape] each), or at a `rate` a step of w; loss sums and weights.

        With `rate` there are gradients all the same where a layer is called twice.
        """
        lr, factor = at_rate(rate)
        leaves = [view.detach().requires_grad_() for view in w]
        shape = next(iter(batch.values())).shape[:2]
        for layer in self.layers:
            layer.begin(leaves, shape.numel(), lr)
        self.task.draws.examples = shape.numel()
        if streams is not None:
            self.task.draws.begin(streams)
        with torch.enable_grad():
            flat = {name: c.flatten(0, 1) for name, c in self.prepare(batch, streams).items()}
            value, weight = self.task.loss(self.task.output(flat), flat)
        if any(layer.calls > 1 for layer in self.layers):
            lr = None  # a step between the two calls would change the second
            for layer in self.layers:
                layer.lr = None
        outer, total, count = weighed(value, weight, mask, shape, mean)
        if factor is not None and lr is not None:
            outer = outer * factor
        grads = run_backward(
            (value,),
            (outer,),
            False,
            False,
            tuple(leaves),
            allow_unreachable=True,
            accumulate_grad=False,
        )
        moved = None
        if lr is None:
            pairs = zip(grads, leaves, strict=True)
            moved = [torch.zeros_like(leaf) if g is None else g for g, leaf in pairs]
        return moved, total, count


def stacked(task: Task) -> Stack | Sequence:
    """What takes the steps of `task`: by hand where its module is a sequence of simple layers."""
    try:
        return Sequence(task)
    except InputError:
        return Stack(task)


def check(task: Task, example: Batch) -> None:
    """Three clients with models and examples of their own take the stacked and the plain pass.

    example holds three batches. Raises InputError where the stacked pass fails or its gradients are
    others.
    """
    device = next(task.module.parameters()).device
    task = task.to(device, torch.float64)
    stack, layout = stacked(task), task.layout
    away = torch.randn(3, layout.size, generator=torch.Generator().manual_seed(0)).to(device)
    flat = layout.flatten(task.module) + 0.1 * away.double()  # a model of zeros would hide much
    finite = {k: c.to(device).where(c.to(device).isfinite(), 0) for k, c in example.items()}
    batch = {k: c.unflatten(0, (3, -1)) for k, c in finite.items()}
    streams = stream(Kind.DROPOUT, client=torch.arange(3)).to(device)
    try:
        found, _, _ = stack.step(layout.param_views(flat), batch, None, streams, True, None)
    except Exception as error:
        raise InputError(f"the module cannot be stacked: {first_line(error)}") from error
    for s in range(3):
        right = plain_gradients(task, flat[s], {k: c[s] for k, c in batch.items()}, streams[s])
        for g, r in zip(found or [], right, strict=True):
            largest = float(r.abs().nan_to_num().max())
            if not torch.allclose(g[s], r, rtol=AGREE, atol=AGREE * largest, equal_nan=True):
                raise InputError("the module cannot be stacked: its gradients come out different")


def plain_gradients(task: Task, row: Tensor, batch: Batch, streams: Tensor) -> list[Tensor]:
    """The gradients of one client's model `row` [P] on a batch [B, ...]."""
    tensors = {name: t.detach().requires_grad_() for name, t in task.layout.unflatten(row).items()}
    task.draws.begin(streams)
    ready = task.prepare(batch, streams)
    with torch.enable_grad():
        inputs = tuple(ready[name] for name in task.inputs)
        value, weight = task.loss(functional_call(task.module, tensors, inputs), ready)
        share = 1 / len(value) if weight is None else mean_weight(weight.detach().sum())
        grads = torch.autograd.grad(value.sum() * share, list(tensors.values()), allow_unused=True)
    pairs = zip(grads, tensors.values(), strict=True)
    return [torch.zeros_like(t) if g is None else g for g, t in pairs]


class StackedBackend:
    """Trains all slots in one call; idle slots compute what nobody reads.

    Raises InputError at construction, naming the submodule, where a module cannot be stacked.
    """

    name = "stacked"

    def __init__(self, task: Task, example: Batch) -> None:
        if task.bf16:
            raise InputError("the stacked backend has no bf16: use vmap or loop, or tf32 on a GPU")
        VmapBackend(task, example)  # refuses control flow that depends on data
        check(task, example)
        self.stack, self.batch = stacked(task), dict[str, Tensor]()

    def run_(
        self, slots: Slots, block: Block, columns: Mapping[str, Tensor], update: Update
    ) -> int:
        lr = update.plain if block.apply is None else None

        def step_(batch: Batch, mask: Tensor | None, streams: Tensor | None, mean: bool) -> Step:
            return self.stack.step(slots.all.w, batch, mask, streams, mean, lr)

        return train_together_(slots, block, gathered(columns, self.batch), update, step_)
