"""A sequence of simple layers, forward and backward by hand: no graph, and no memory made a step.

For small models the graph, and fresh pages for what it saves, cost more than the arithmetic.
"""

import copy
from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn

from vecfl.engine.by_hand import SIMPLE, Dropout, Elementwise, Flatten, Layer, Linear
from vecfl.engine.graded import CrossEntropy, by_graph
from vecfl.engine.layers.stack import HOOKS
from vecfl.engine.memory import Memory
from vecfl.engine.together import Step, at_rate, weighed
from vecfl.errors import InputError
from vecfl.losses import Batch, cross_entropy
from vecfl.modules import KeyedDropout, called, lanes
from vecfl.task import Task


class Sequence:
    """Takes steps of S clients whose module is a sequence of simple layers.

    Raises InputError naming the first module that is none of them.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.memory = copy.deepcopy(task), Memory()
        module, layout = self.task.module.train(), task.layout
        at = {id(module.get_parameter(e.name)): i for i, e in enumerate(layout.params)}
        self.layers: list[Layer] = []
        self.linear: dict[str, Linear] = {}
        for path, m in flat(module):
            self._add(path, m, at)
        self.first = next((i for i, m in enumerate(self.layers) if isinstance(m, Linear)), 0)
        if at:
            raise InputError("the module has parameters of its own: it is in no sequence")
        by_hand = task.loss is cross_entropy
        self.loss = CrossEntropy() if by_hand else partial(by_graph, task.loss)

    def _add(self, path: str, m: nn.Module, at: dict[int, int]) -> None:
        """Append the layer of module m, and take its parameters out of `at`."""
        kind = type(m)
        if isinstance(m, nn.Linear) and kind is nn.Linear:
            bias = None if m.bias is None else at.pop(id(m.bias), -1)
            linear = Linear(at.pop(id(m.weight), -1), bias, first=not self.linear)
            if -1 in linear.at:
                raise InputError(
                    f"{called(path)} shares or freezes a parameter: it is in no sequence"
                )
            self.linear[path] = linear
            self.layers.append(linear)
        elif kind in SIMPLE:
            self.layers.append(Elementwise(*SIMPLE[kind]))
        elif isinstance(m, nn.Flatten) and (kind, m.start_dim, m.end_dim) == (nn.Flatten, 1, -1):
            self.layers.append(Flatten())
        elif isinstance(m, KeyedDropout) and 0 < lanes(m.p)[1] < 1 << lanes(m.p)[0]:
            self.layers.append(Dropout(m))
        elif kind is not nn.Identity:
            raise InputError(f"{called(path)} ({kind.__name__}) is in no sequence of simple layers")

    def paths(self, fused: bool) -> list[str]:
        """Paths of the layers that train, which are all fused; none runs by vmap."""
        return list(self.linear) if fused else []

    def step(
        self,
        w: list[Tensor],
        batch: Batch,
        mask: Tensor | None,
        streams: Tensor | None,
        mean: bool,
        rate: float | Tensor | None,
    ) -> Step:
        """Gradients at w ([S, *shape] each), or at a `rate` a step of w; loss sums and weights."""
        lr, factor = at_rate(rate)
        shape = next(iter(batch.values())).shape[:2]
        grads = [self.memory.like(str(i), t) for i, t in enumerate(w)] if lr is None else []
        for linear in self.linear.values():
            linear.begin(w, grads, lr)
        self.task.draws.examples = shape.numel()
        if streams is not None:
            self.task.draws.begin(streams)
        ready = {n: c.flatten(0, 1) for n, c in self.task.prepare(batch, streams).items()}
        x = ready[self.task.inputs[0]]
        for layer in self.layers:
            x = layer.forward(x)
        value, weight, backward = self.loss(x, ready)
        outer, total, count = weighed(value, weight, mask, shape, mean)
        grad = backward(outer if factor is None else outer * factor)
        for layer in reversed(self.layers[self.first :]):
            grad = layer.backward(grad)
        return None if lr is not None else grads, total, count


def flat(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of nested `nn.Sequential`s in the order of their calls, with their paths."""
    if any(getattr(module, name) for name in HOOKS):
        raise InputError(f"{called(path)} has hooks: it is in no sequence")
    if type(module) is not nn.Sequential:
        yield path, module
        return
    for name, child in module._modules.items():  # named_children skips what is called again
        assert child is not None
        yield from flat(child, f"{path}.{name}" if path else name)
