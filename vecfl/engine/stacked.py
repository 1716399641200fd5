"""The stacked backend: layers that hold the parameters of all S clients, on one long batch.

The examples of all slots form an ordinary batch [S * B, ...]. What has no parameters runs on it as
it is; only layers with parameters know whose example is whose (`engine/layers`).
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vecfl.engine.layers import ByVmap, StackedConvolution, StackedLayer, stack_layers
from vecfl.engine.loop import run_backward
from vecfl.engine.memory import Memory
from vecfl.engine.rule import Update, mean_weight
from vecfl.engine.sequence import Sequence
from vecfl.engine.slots import Slots
from vecfl.engine.together import Step, at_rate, busy, gathered, train_together_, weighed
from vecfl.engine.vmap import VmapBackend
from vecfl.errors import InputError
from vecfl.losses import Batch
from vecfl.random import Kind, stream
from vecfl.tape import Block
from vecfl.task import Task
from vecfl.trial import first_line

AGREE = 1e-9  # of a parameter's gradients in float64, relative to the largest of them
ZERO = 1e-13  # relative to the largest of all: what cancels leaves its rounding


class Stack:
    """A copy of a task whose layers take all clients at once; its gradients.

    by_vmap  paths of modules to run by vmap, beside those that the module tree tells
    formulation  of convolutions (`layers.FORMULATIONS`), "": that of the device

    Raises InputError where the module has no stacked form.
    """

    def __init__(self, task: Task, by_vmap: Collection[str] = (), formulation: str = "") -> None:
        self.prepare, self.task = task.prepare, copy.deepcopy(task)
        if task.layout.buffers:
            name = task.layout.buffers[0].name
            raise InputError(f"buffer '{name}' changes in training: not stacked yet")
        names = [e.name for e in task.layout.params]
        module, draws = self.task.module.train(), self.task.draws
        self.task.module, self.layers = stack_layers(module, names, draws, by_vmap)
        for layer in self.layers:
            if isinstance(layer, StackedConvolution):
                layer.by = formulation

    def paths(self, fused: bool) -> list[str]:
        """Paths of the layers that are fused, or of the modules that run by vmap."""
        named = self.task.module.named_modules()
        layers = {p: m for p, m in named if isinstance(m, StackedLayer)}
        return [path for path, m in layers.items() if isinstance(m, ByVmap) != fused]

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
        # Unlike those of detach(), they have versions of their own: a layer may move its own while
        # autograd still needs another's.
        leaves = [view.data.requires_grad_() for view in w]
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
        return finished(leaves, grads, lr), total, count


def finished(
    leaves: list[Tensor], grads: tuple[Tensor | None, ...], lr: float | None
) -> list[Tensor] | None:
    """All gradients, or with `lr` the step of what layers have not moved: of modules by vmap."""
    pairs = list(zip(grads, leaves, strict=True))
    if lr is None:
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in pairs]
    for g, leaf in pairs:
        if g is not None:
            leaf.detach().sub_(g, alpha=lr)
    return None


def stacked(task: Task, by_vmap: Collection[str] = (), formulation: str = "") -> Stack | Sequence:
    """What takes the steps of `task`: by hand where its module is a sequence of simple layers."""
    try:
        return Sequence(task)
    except InputError:
        return Stack(task, by_vmap, formulation)


def check(task: Task, example: Batch) -> Stack | Sequence:
    """What takes the steps of a float64 copy, once three clients took its pass and the plain one.

    A module that fails in the stacked pass is run by vmap. example holds three batches. Raises
    InputError where that is the whole module, where gradients come out different, or where vmap
    finds control flow that depends on data.
    """
    device = next(task.module.parameters()).device
    VmapBackend(task.to("cpu", torch.float64), example)  # where every operator has some rule
    task = task.to(device, torch.float64)
    layout, by_vmap = task.layout, set[str]()
    away = torch.randn(3, layout.size, generator=torch.Generator().manual_seed(0)).to(device)
    flat = layout.flatten(task.module) + 0.1 * away.double()  # a model of zeros would hide much
    finite = {k: c.to(device).where(c.to(device).isfinite(), 0) for k, c in example.items()}
    batch = {k: c.unflatten(0, (3, -1)) for k, c in finite.items()}
    streams = stream(Kind.DROPOUT, client=torch.arange(3)).to(device)
    while True:
        stack = stacked(task, by_vmap)
        try:
            with running(stack.task.module) as inside:
                found, _, _ = stack.step(layout.param_views(flat), batch, None, streams, True, None)
            break
        except Exception as error:
            if not any(inside[-1:]):  # in no submodule
                why = f"the module cannot be stacked: {first_line(error)}"
                raise InputError(why) from error
            by_vmap.add(inside[-1])
    for s in range(3):
        right = plain_gradients(task, flat[s], {k: c[s] for k, c in batch.items()}, streams[s])
        sizes = [float(r.abs().nan_to_num().max()) for r in right]
        for g, r, size in zip(found or [], right, sizes, strict=True):
            atol = max(AGREE * size, ZERO * max(sizes))
            if not torch.allclose(g[s], r, rtol=AGREE, atol=atol, equal_nan=True):
                raise InputError(
                    "the module cannot be stacked: its gradients come out different; its forward "
                    "may write to its input (x.mul_(2); write x = x * 2), or use parameters "
                    "outside of their layers: use vmap or loop"
                )
    return stack


@contextmanager
def running(module: nn.Module) -> Iterator[list[str]]:
    """Paths of the ordinary modules that run: where an exception ends it, the last one failed."""
    inside, hooks = list[str](), []

    def leave(*_: object) -> None:
        inside.pop()

    stacked: set[nn.Module] = {m for m in module.modules() if isinstance(m, StackedLayer)}
    for path, m in module.named_modules(memo=stacked):
        hooks.append(m.register_forward_pre_hook(lambda *_, path=path: inside.append(path)))
        hooks.append(m.register_forward_hook(leave))
    try:
        yield inside
    finally:
        for hook in hooks:
            hook.remove()


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
    """Trains all slots that have a client in one call.

    formulation  of convolutions (`layers.FORMULATIONS`), "": that of the device

    Raises InputError at construction, naming the submodule, where a module cannot be stacked.
    """

    name = "stacked"

    def __init__(self, task: Task, example: Batch, formulation: str = "") -> None:
        if task.bf16:
            raise InputError("the stacked backend has no bf16: use vmap or loop, or tf32 on a GPU")
        tried = check(task, example)
        self.stack = stacked(task, tried.paths(fused=False), formulation)
        for layer, known in zip(self.stack.layers, tried.layers, strict=True):
            if isinstance(layer, ByVmap) and isinstance(known, ByVmap):
                layer.batched = known.batched
        self.batch = Memory()
        fused, by_vmap = self.stack.paths(fused=True), self.stack.paths(fused=False)
        self.layers: Mapping[str, list[str]] = {"fused": fused, "by_vmap": by_vmap}

    def run_(
        self, slots: Slots, block: Block, columns: Mapping[str, Tensor], update: Update
    ) -> int:
        slots, block = busy(slots, block, update)
        lr = update.plain if block.apply is None else None

        def step_(batch: Batch, mask: Tensor | None, streams: Tensor | None, mean: bool) -> Step:
            return self.stack.step(slots.all.w, batch, mask, streams, mean, lr)

        return train_together_(slots, block, gathered(columns, self.batch), update, step_)
