"""The vmap backend: one step of all S clients at the same time, by torch.func."""

import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import grad, vmap

from vecfl.engine.examples import clipped_sum, noise_of, noised, told
from vecfl.engine.memory import Memory
from vecfl.engine.rule import ExampleNoise, Update, mean_weight
from vecfl.engine.slots import Slots
from vecfl.engine.together import Step, busy, gathered, train_together_
from vecfl.errors import InputError
from vecfl.layout import restore
from vecfl.losses import Batch
from vecfl.modules import blame
from vecfl.random import Kind, stream
from vecfl.tape import Block
from vecfl.task import Task
from vecfl.trial import first_line

log = logging.getLogger("vecfl")
REPORT = r"\.? (?:Please file us|\(Triggered internally)"  # where torch asks to be told of it
warn_of_fallbacks = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]


class VmapBackend:
    """Trains all slots that have a client in one call.

    examples  where steps take gradients of single examples: their clip and noise

    Raises InputError at construction, naming the submodule, if torch.func cannot vectorise it.
    """

    name = "vmap"
    layers: Mapping[str, list[str]] = {}

    def __init__(self, task: Task, example: Batch, examples: ExampleNoise | None = None) -> None:
        self.task, self.examples = copy.deepcopy(task), examples
        self.task.module.train()
        self.names = [e.name for e in task.layout.params]
        self.batch = Memory()
        self.slow = self._try(example)

    def warn(self) -> None:
        """Log why it will be slow, if it will."""
        for why in self.slow:
            log.warning("the vmap backend will be slow: %s", why)

    def run_(
        self, slots: Slots, block: Block, columns: Mapping[str, Tensor], update: Update
    ) -> int:
        slots, block = busy(slots, block, update)

        def step_(batch: Batch, mask: Tensor | None, streams: Tensor | None, mean: bool) -> Step:
            batch = self.task.prepare(batch, streams)
            if self.examples is not None and streams is not None:
                return self.noised(self.examples, slots.all.w, batch, mask, streams)
            grads, total, weight, buffers = self.gradients(
                slots.all.w, slots.buffers, batch, mask, streams, mean
            )
            for view, value in zip(slots.buffers, buffers, strict=True):
                view.copy_(value)
            return grads, total, weight

        return train_together_(slots, block, gathered(columns, self.batch), update, step_)

    def gradients(
        self,
        w: list[Tensor],
        buffers: list[Tensor],
        batch: Batch,
        mask: Tensor | None,
        streams: Tensor | None,
        mean: bool,
    ) -> tuple[list[Tensor], Tensor, Tensor | None, list[Tensor]]:
        """Gradients [S, *shape] of each client's batch, loss sums and weights [S], and buffers.

        mask [S, B] is 1 where an example counts (None: all do); streams [S, 3] feeds keyed
        modules; `mean` differentiates the mean of the batch, else its sum. The weights are None
        where the loss gives none: every example that counts has weight 1.
        """

        def loss(
            w: list[Tensor],
            buffers: list[Tensor],
            batch: Batch,
            mask: Tensor | None,
            streams: Tensor | None,
        ) -> tuple[Tensor, tuple[Tensor, list[Tensor], list[Tensor]]]:
            if streams is not None:
                self.task.draws.begin(streams)
            value, weight, changed = self._forward(w, buffers, batch)
            given = weight is not None
            if mask is not None:
                value, weight = value * mask, mask if weight is None else weight * mask
            total = value.sum()
            count = None if weight is None else weight.detach().sum()
            if not mean:
                objective = total
            else:
                objective = total / len(value) if count is None else total * mean_weight(count)
            return objective, (
                total.detach(),
                [count] if given and count is not None else [],
                changed,
            )

        dims = (0, 0, 0, None if mask is None else 0, None if streams is None else 0)
        vectorised = vmap(grad(loss, has_aux=True), in_dims=dims, randomness="error")
        with interruptible():
            grads, (total, weight, changed) = vectorised(w, buffers, batch, mask, streams)
        return grads, total, weight[0] if weight else None, changed

    def noised(
        self,
        noise: ExampleNoise,
        w: list[Tensor],
        batch: Batch,
        mask: Tensor | None,
        streams: Tensor,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """What steps take for gradients under DP-SGD, loss sums and weights; as `gradients`."""
        size = next(iter(batch.values())).shape[1]

        def loss(
            w: list[Tensor], example: Batch, streams: Tensor, place: Tensor
        ) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
            self.task.draws.begin(streams)
            self.task.draws.only(place.unsqueeze(0), size)
            alone = {name: column.unsqueeze(0) for name, column in example.items()}
            value, weight, _ = self._forward(w, [], alone)
            counted = [] if weight is None else [weight.detach().sum()]
            total = value.sum()
            return total * (mean_weight(counted[0]) if counted else 1), (total.detach(), counted)

        by_example = vmap(grad(loss, has_aux=True), in_dims=(None, 0, None, 0), randomness="error")
        by_client = vmap(by_example, in_dims=(0, 0, 0, None), randomness="error")
        places = torch.arange(size, device=streams.device)
        with interruptible():
            grads, (value, weight) = by_client(w, batch, streams, places)
        layout = self.task.layout
        drawn = noise_of(noise, self.task.draws.seed, streams, layout.trainable)
        sums = clipped_sum(grads, mask, noise.clip)
        return noised(sums, drawn, layout, size), *told(value, weight[0] if weight else None, mask)

    def _forward(
        self, w: list[Tensor], buffers: list[Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """One client's loss sums and weights [B] and its changed buffers."""
        tensors = dict(zip(self.names, w, strict=True))
        entries = self.task.layout.buffers
        for entry, buffer in zip(entries, buffers, strict=True):
            tensors[entry.name] = restore(entry, buffer).clone()
        value, weight = self.task.loss(self.task.output(batch, tensors), batch)
        return value, weight, [tensors[e.name].to(b) for e, b in zip(entries, buffers, strict=True)]

    def _try(self, example: Batch) -> list[str]:
        """One step of two clients with three examples each, so that what cannot be vectorised is
        named before round 1. What torch says of operators that it takes one client at a time."""
        layout, module = self.task.layout, self.task.module
        flat = layout.flatten(module).expand(2, -1).contiguous()
        device = flat.device
        batch = {k: c[:1].to(device).repeat(2, 3, *[1] * (c.dim() - 1)) for k, c in example.items()}
        streams = stream(Kind.DROPOUT, client=torch.arange(2)).to(device)
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]], device=device, dtype=flat.dtype)
        warn_of_fallbacks(True)
        with blame(module) as found, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                w, ready = layout.param_views(flat), self.task.prepare(batch, streams)
                if self.examples is not None:
                    self.noised(self.examples, w, ready, mask, streams)
                else:
                    self.gradients(w, layout.buffer_views(flat), ready, mask, streams, mean=True)
            except Exception as error:
                where = found[0] or "the backward pass of the module"
                raise InputError(
                    f"{where} cannot be vectorised: {first_line(error)}; "
                    "use the loop backend, or replace the module"
                ) from error
        said = (re.split(REPORT, str(w.message))[0] for w in caught)
        slow = list(dict.fromkeys(line for line in said if "batching rule" in line))
        if slow:
            warn_of_fallbacks(False)  # once is enough
        return slow


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C be one, whatever torch makes of it."""
    try:
        yield
    except RuntimeError as error:
        if interrupted(error):
            raise KeyboardInterrupt from None
        raise


def interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: inside torch's nesting of vmap it breaks an assertion."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
