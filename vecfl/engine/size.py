"""How many slots: as many rows as the cache (CPU) or the memory (GPU) holds well."""

import copy

import torch

from vecfl.engine.rule import LocalRule
from vecfl.layout import Layout
from vecfl.losses import Batch
from vecfl.random import Kind, stream
from vecfl.task import Task

CACHE = {
    "loop": 1 << 18,
    "vmap": 1 << 24,
    "stacked": 1 << 23,
    "stacked-each": 1 << 23,
    "stacked-grouped": 1 << 23,
    "stacked-unfold": 1 << 23,
}  # bytes of rows that a CPU still trains fast
SHARE = 0.6  # of the free GPU memory; the rest is for the data and for fragmentation


def row_numbers(layout: Layout, rule: LocalRule) -> int:
    """Numbers of a slot: row, optimizer state, bias, accumulated gradient, those of examples."""
    kept = rule.optimizer.states + rule.bias + rule.batches.full
    kept += 0 if rule.examples is None else rule.batches.size
    return layout.size + kept * layout.trainable


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU; what torch keeps unused is free, too."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def activation_bytes(task: Task, example: Batch, size: int) -> int:
    """Bytes that autograd keeps for the backward pass of one batch of `size` examples."""
    task, saved = copy.deepcopy(task), dict[int, int]()  # a forward pass may change buffers

    def keep(t: torch.Tensor) -> torch.Tensor:
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    params = {p.data_ptr() for p in task.module.parameters()}
    device, n = next(task.module.parameters()).device, len(example[task.inputs[0]])
    batch = task.prepare({name: column.to(device) for name, column in example.items()})
    task.draws.begin(stream(Kind.DROPOUT).to(device))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        task.loss(task.output(batch), batch)
    return sum(b for pointer, b in saved.items() if pointer not in params) * size // n


def slot_count(
    task: Task,
    rule: LocalRule,
    cohort: int,
    example: Batch,
    *,
    cache: int | None,
    before: LocalRule | None = None,
) -> int:
    """How many slots, between 1 and `cohort`: rows within `cache` bytes, or GPU memory if None.

    On a GPU a client costs its row, a gradient and twice its activations, and its row of a pass
    `before`; on a CPU rows that leave the cache cost more than fewer steps at a time save. What
    fits is made smaller where the cohort fills as many waves all the same: 1,000 clients sit twice
    in 500 slots, not in 534.
    """
    weight = next(task.module.parameters())
    number = torch.finfo(weight.dtype).bits // 8
    row = row_numbers(task.layout, rule) * number
    if cache is None:
        activations = activation_bytes(task, example, rule.batches.size)
        row += number * row_numbers(task.layout, before) if before else 0
        fit = int(SHARE * free_memory(weight.device)) // (
            row + task.layout.trainable * number + 2 * activations
        )
    else:
        fit = cache // row
    waves = -(-cohort // max(1, fit))
    return -(-cohort // waves)
