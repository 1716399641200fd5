"""What backends share that take a step of all S clients at the same time."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vecfl.engine.memory import Memory
from vecfl.engine.rule import Update, accumulate_, apply_, mean_weight
from vecfl.engine.slots import Slots
from vecfl.losses import Batch
from vecfl.tape import Block

# Gradients [S, *shape], or None where the rows have moved already; loss sums [S]; loss weights [S],
# or None where every example that counts has weight 1.
Step = tuple[list[Tensor] | None, Tensor, Tensor | None]
Gather = Callable[[Tensor], dict[str, Tensor]]
Taken = Callable[[Batch, Tensor | None, Tensor | None, bool], Step]


def train_together_(
    slots: Slots,
    block: Block,
    gather: Gather,
    update: Update,
    step_: Taken,
) -> int:
    """Take the steps of a block; the slot-steps executed, idle ones included.

    `step_(batch, mask, streams, mean)` gives what a step needs: batch [S, B, ...], mask [S, B] (1
    where an example counts, None: all do), streams [S, 3] of keyed modules (None: there are none),
    and whether the gradient is that of the batch's mean, or of its sum.
    """
    device, dtype = slots.flat.device, slots.flat.dtype
    index = block.index.to(device, non_blocking=True)  # blocking waits for all queued steps
    valid = block.valid.to(device, non_blocking=True)
    draws = None if block.streams is None else block.streams.to(device, non_blocking=True)
    if update.replay is not None:
        update.replay(gather, index, valid, draws, block.full, step_)
        slots.seen += valid.sum(0)
        return slots.number * len(index)
    examples = torch.arange(index.shape[-1], device=device)
    mask = None if block.full else (examples < valid[..., None]).to(dtype)
    totals, counts = [], []
    for step, at in enumerate(index.unbind()):
        grads, total, weight = step_(
            gather(at),
            None if mask is None else mask[step],
            None if draws is None else draws[step],
            block.apply is None,
        )
        totals.append(total)
        counts.append(valid[step] if weight is None else weight)
        if grads is not None and block.apply is None:
            update(slots.all, grads)
        elif grads is not None and block.apply is not None:
            accumulate_(slots.all, grads, counts[-1])
            due = block.apply[step].nonzero().flatten().tolist()
            every = len(due) == slots.number
            for rows in [slots.all] if every else [slots.one[s] for s in due]:
                apply_(rows, update)
    add_up_(slots, torch.stack(totals), torch.stack(counts))
    slots.seen += valid.sum(0)
    return slots.number * len(index)


def add_up_(slots: Slots, total: Tensor, count: Tensor) -> None:
    """Add loss sums and weights of L steps, [L, S] each, to those of the slots."""
    slots.sums[:, 0].add_(total.sum(0, dtype=torch.float64))
    slots.sums[:, 1].add_(count.sum(0, dtype=torch.float64))
    if slots.statistics is not None:
        slots.statistics.batch_loss.add_((total * mean_weight(count.to(total))).double().sum(0))


def at_rate(lr: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    """What a backward pass that moves W multiplies gradients by: a number, and a tensor or None.

    A rate on the device is multiplied into the gradient of the loss: where it is part of a captured
    step, no number can be asked for.
    """
    return (1.0, lr) if isinstance(lr, Tensor) else (lr, None)


def weighed(
    value: Tensor, weight: Tensor | None, mask: Tensor | None, shape: torch.Size, mean: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a loss [S * B] says of each client.

    The factor [S * B] of each example in the gradient, which is that of the client's mean, or else
    of its sum; loss sums [S]; loss weights [S], or None where every example has weight 1.
    """
    counted = None if weight is None else weight.detach().view(shape)
    if mask is not None:
        counted = mask if counted is None else counted * mask
    outer = value.new_ones(shape) if mask is None else mask
    count = None if counted is None else counted.sum(1)
    if mean:
        share = 1 / shape[1] if count is None else mean_weight(count).unsqueeze(1)
        outer = outer * share
    value = value.detach().view(shape)
    total = (value if mask is None else value * mask).sum(1)
    return outer.flatten(), total, None if weight is None else count


def busy(slots: Slots, block: Block, update: Update) -> tuple[Slots, Block]:
    """The slots that have a client, and a block of these alone; all for captured steps.

    Where clients differ in size, few of them train at the end of a round. A last one keeps another
    slot beside it: products of one matrix may round otherwise than those of two.
    """
    number = max(block.active, min(2, slots.number))
    if update.replay is not None or number == slots.number:
        return slots, block

    def some(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[:, :number]

    index, valid = block.index[:, :number], block.valid[:, :number]
    apply, streams = some(block.apply), some(block.streams)
    block = replace(block, index=index, valid=valid, apply=apply, streams=streams)
    return slots.first(number), block


def gathered(columns: Mapping[str, Tensor], memory: Memory) -> Gather:
    """A function from index [S, B] to those examples, in `memory` that the next call overwrites."""

    def gather(index: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, column in columns.items():
            found[name] = memory.empty(name, (*index.shape, *column.shape[1:]), column)
            torch.index_select(column, 0, index.flatten(), out=found[name].flatten(0, 1))
        return found

    return gather
