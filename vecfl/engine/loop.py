"""The loop backend: one client after the other, a plain module and autograd. The reference."""

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from vecfl.engine.backend import gather
from vecfl.engine.examples import ahead, clipped_sum, noised, told
from vecfl.engine.rule import ExampleNoise, Update, accumulate_, apply_, mean_weight
from vecfl.engine.slots import Slots
from vecfl.layout import restore
from vecfl.losses import Batch
from vecfl.tape import Block
from vecfl.task import Task

AT_A_TIME = 1 << 24  # numbers of a client's next batches that are gathered and prepared at a time
# What torch.autograd.grad calls after 20 us of checks in Python, a fifth of a small client's step.
run_backward = torch.autograd.Variable._execution_engine.run_backward


def cut(steps: int, numbers: int) -> list[slice]:
    """`steps` steps of so many numbers each, in parts of AT_A_TIME numbers or of one step."""
    some = max(1, AT_A_TIME // max(1, numbers))
    return [slice(start, start + some) for start in range(0, steps, some)]


class LoopBackend:
    """Trains each slot by itself, on batches cut to their valid examples.

    examples  where steps take gradients of single examples: their clip and noise
    """

    name = "loop"
    layers: Mapping[str, list[str]] = {}

    def __init__(self, task: Task, examples: ExampleNoise | None = None) -> None:
        self.task, self.keyed, self.examples = copy.deepcopy(task), task.keyed, examples
        module = self.task.module.train()
        self.outer: dict[int, Tensor] = {}  # 1/n for each batch length n
        self.params = tuple(module.get_parameter(e.name) for e in task.layout.params)

    def run_(
        self, slots: Slots, block: Block, columns: Mapping[str, Tensor], update: Update
    ) -> int:
        index, seed = block.index.to(slots.flat.device), self.task.draws.seed
        valid = block.valid.T.tolist()
        apply = [] if block.apply is None else block.apply.T.tolist()
        streams: Sequence[Tensor | None] = [None] * block.active
        if block.streams is not None:  # in the order of the two loops
            active = block.streams[:, : block.active].transpose(0, 1).to(index.device)
            self.task.draws.begin_all(active.flatten(0, 1))
            streams = active.unbind()
        parts = cut(len(index), sum(c[:1].numel() for c in columns.values()) * index.shape[-1])
        for s, drawn in enumerate(streams):
            self._point_at(slots, s)
            for part in parts:
                examples = gather(columns, index[part, s])
                batches = self.task.prepare(examples, None if drawn is None else drawn[part])
                due = None if block.apply is None else apply[s][part]
                with torch.enable_grad():
                    if self.examples is not None and drawn is not None:
                        noise = ahead(self.examples, seed, drawn[part], slots.layout.trainable)
                        self._train_noised(slots, s, batches, valid[s][part], noise, update)
                    else:
                        self._train(slots, s, batches, valid[s][part], due, update)
            for entry, view in zip(self.task.layout.buffers, slots.buffers, strict=True):
                view[s] = self.task.module.get_buffer(entry.name)
        slots.seen += block.valid.sum(0).to(index.device)
        return block.active * len(index)

    def _point_at(self, slots: Slots, s: int) -> None:
        """Let the module's parameters be views of row s, so that updates land in the slot."""
        for p, view in zip(self.params, slots.model[s], strict=True):
            p.data = view
        for entry, view in zip(self.task.layout.buffers, slots.buffers, strict=True):
            self.task.module.get_buffer(entry.name).copy_(restore(entry, view[s]))

    def _train(
        self,
        slots: Slots,
        s: int,
        batches: Batch,
        valid: list[int],
        apply: list[bool] | None,
        update: Update,
    ) -> None:
        """The steps of slot s on batches [L, B, ...], of which valid[l] examples count."""
        rows, size = slots.one[s], next(iter(batches.values())).shape[1]
        sums, weights = [], []
        steps = zip(*(column.unbind() for column in batches.values()), strict=True)
        for step, (columns, n) in enumerate(zip(steps, valid, strict=True)):
            batch = dict(zip(batches, columns, strict=True))
            if n < size:
                batch = {name: column[:n] for name, column in batch.items()}
            if self.keyed:
                self.task.draws.next_step()
            value, weight = self.task.loss(self.task.output(batch), batch)
            if weight is not None:
                weight = weight.detach()
                weights.append(weight)
            grads = self._gradients(value, weight, n, apply is None)
            if apply is None:
                update(rows, grads)
            else:
                accumulate_(rows, grads, value.new_tensor(n) if weight is None else weight.sum())
                if apply[step]:
                    apply_(rows, update)
            sums.append(value.detach())
        if slots.statistics is not None:
            counts = [w.sum() for w in weights] or [sums[0].new_tensor(n) for n in valid]
            for values, counted in zip(sums, counts, strict=True):
                slots.statistics.batch_loss[s] += values.sum() * mean_weight(counted)
        total, count = slots.sums[s].unbind()
        total += torch.cat(sums).sum(dtype=torch.float64)
        count += torch.cat(weights).sum(dtype=torch.float64) if weights else sum(valid)

    def _train_noised(
        self,
        slots: Slots,
        s: int,
        batches: Batch,
        valid: list[int],
        noise: Iterable[Tensor | None],
        update: Update,
    ) -> None:
        """As `_train`, example by example: their gradients are clipped, added up and noised."""
        assert self.examples is not None
        size = next(iter(batches.values())).shape[1]
        places = torch.arange(size, device=slots.flat.device).split(1)
        for step, (n, drawn) in enumerate(zip(valid, noise, strict=True)):
            if self.keyed:
                self.task.draws.next_step()
            found = []
            for place in range(n):
                self.task.draws.only(places[place], n)
                batch = {name: c[step, place : place + 1] for name, c in batches.items()}
                value, weight = self.task.loss(self.task.output(batch), batch)
                weight = None if weight is None else weight.detach()
                found.append((self._gradients(value, weight, 1, True), value.detach(), weight))
            with torch.no_grad():
                grads = [torch.stack(g, 1) for g in zip(*(g for g, _, _ in found), strict=True)]
                sums = clipped_sum(grads, None, self.examples.clip)
                update(slots.one[s], noised(sums, drawn, slots.layout, size))
                value = torch.cat([v for _, v, _ in found])[None]
                weights = [w for _, _, w in found if w is not None]
                total, count = told(value, torch.cat(weights)[None] if weights else None, None)
                slots.sums[s] += torch.cat((total, count))

    def _gradients(self, value: Tensor, weight: Tensor | None, n: int, mean: bool) -> list[Tensor]:
        """Gradients [1, *shape] of the sum of value [n], or of its weighted mean."""
        if not mean:
            outer = torch.ones_like(value)
        elif weight is not None:
            outer = mean_weight(weight.sum()).expand_as(value)
        elif n in self.outer:
            outer = self.outer[n]
        else:
            outer = self.outer[n] = torch.full_like(value, 1 / n)
        grads = run_backward(
            (value,),
            (outer,),
            False,
            False,
            self.params,
            allow_unreachable=True,
            accumulate_grad=False,
        )
        return [
            (torch.zeros_like(p) if g is None else g).unsqueeze(0)
            for p, g in zip(self.params, grads, strict=True)
        ]
