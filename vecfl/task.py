"""Task: an ordinary module, a loss per example and metrics, made ready for many clients at once."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_map

from vecfl.augment import Transform, augmented, checked, random_places
from vecfl.errors import InputError
from vecfl.layout import Layout, freeze
from vecfl.losses import Batch, Score
from vecfl.modules import Draws, KeyedDropout, called, key_dropouts, refuse_batchnorm
from vecfl.trial import (
    changing_buffers,
    check_embeddings,
    check_pair,
    refuse_two_scaled,
    require_inputs,
    task_copy,
    try_forward,
    try_prepare,
)

# What the results of a client are called beside its metrics.
TAKEN = {
    "loss": "the loss itself",
    "weight": "the loss weight of a client",
    "client": "the id of a client",
    "examples": "how many a client has",
    "update_norm": "the norm of what a client sent",
}


class Task:
    """What clients learn.

    module   an ordinary nn.Module for an ordinary batch; the task keeps a copy, with its dropout
             layers replaced by keyed ones. Parameters with requires_grad=False are frozen.
    loss     (output, batch) -> (sum [B], weight [B]): see `vecfl.losses`
    metrics  name -> (output, batch) -> (sum [B], weight [B]), from the same forward pass; any
             name without spaces and slashes (see `vecfl.metrics`)
    example  a small batch, two examples or more (four are tried), which should differ
    inputs   the columns that the module is called with, in this order
    scale    uint8 inputs x become x * scale, in the step and on the device
    augment  what then happens to the first of the inputs, in this order: `vecfl.crop`, `vecfl.flip`
             and functions of your own (see `vecfl.augment`) in training steps, and
             `vecfl.normalise` in evaluation too. The loss and the metrics see what they make of it.

    The module is tried on the example, in float64 and with padding. Raises InputError naming the
    submodule, the reason and the remedy where clients cannot train it side by side: it has
    BatchNorm, is lazy or a script, gives sparse gradients, draws from torch's generator, mixes the
    examples of a batch, computes buffers from them, keeps other state, calls dropout in its
    backward pass, or fails; or where the loss gives no pair of [B] or reads the module's
    parameters. A trial is no proof: it sees what it meets.
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
        augment: Sequence[Transform] = (),
    ) -> None:
        refuse_kinds(module)
        refuse_batchnorm(module)
        if not any(p.requires_grad for p in module.parameters()):
            raise InputError("the module has no trainable parameter: all have requires_grad=False")
        check_metrics(metrics or {})
        self.draws, self.bf16 = Draws(), False
        self.module = key_dropouts(copy.deepcopy(module), self.draws).train()
        self.loss: Score = loss
        self.metrics: Mapping[str, Score] = dict(metrics or {})
        self.inputs, self.scale, self.augment = tuple(inputs), scale, checked(augment)
        refuse_two_scaled(self.inputs, example)
        changing = changing_buffers(self, example, list(module.parameters()))
        self.layout = Layout.of(self.module, changing)
        self.example = {name: column[:4].cpu().clone() for name, column in example.items()}

    @property
    def keyed(self) -> bool:
        """Whether a training step draws from Philox."""
        drops = any(isinstance(m, KeyedDropout) for m in self.module.modules())
        return drops or bool(random_places(self.augment))

    def scored(self, metrics: Mapping[str, Score]) -> "Task":
        """A copy with more metrics; InputError for a name that it has already, and for a metric
        that gives no pair of [B] on the example."""
        check_metrics(metrics)
        for name in metrics:
            if name in self.metrics:
                raise InputError(f"metric {name}: there is one of this name")
        if metrics:
            tried = task_copy(self)
            ready = try_prepare(tried, self.example)
            output = try_forward(tried, ready)
        for name, metric in metrics.items():
            check_pair(tried, f"metric {name!r}", metric, output, ready)
        new = copy.deepcopy(self)
        new.metrics = {**self.metrics, **metrics}
        return new

    def frozen(self, pattern: str) -> "Task":
        """A copy in which parameters do not train, by their names: see `vecfl.freeze`."""
        new = copy.deepcopy(self)
        freeze(new.module, pattern)
        new.layout = Layout.of(new.module, [e.name for e in self.layout.buffers])
        return new

    def to(self, device: str | torch.device, dtype: torch.dtype) -> "Task":
        """An independent copy on `device` with floating-point parameters of `dtype`."""
        new = copy.deepcopy(self)
        new.module.to(device, dtype)
        new.layout = Layout.of(new.module, [e.name for e in self.layout.buffers])
        return new

    def prepare(self, batch: Batch, streams: Tensor | None = None) -> dict[str, Tensor]:
        """Columns as the module takes them: uint8 inputs scaled, floats in its dtype, augmented.

        batch [..., B, ...]; streams [..., 3] of a training step, None in evaluation.
        """
        dtype = next(self.module.parameters()).dtype
        ready = {}
        for name, column in batch.items():
            if column.dtype == torch.uint8 and name in self.inputs:
                column = column.to(dtype) * self.scale
            elif column.is_floating_point():
                column = column.to(dtype)
            ready[name] = column
        if self.augment:
            x = ready[self.inputs[0]]
            ready[self.inputs[0]] = augmented(x, self.augment, streams, self.draws.seed)
        return ready

    def output(self, batch: Batch, w: dict[str, Tensor] | None = None) -> Any:
        """The module's output for a prepared batch, with the tensors `w` in place of its own,
        where it leaves the buffers that it changes.

        With `bf16` it runs in autocast, and bfloat16 outputs come back in the module's dtype.
        """
        if self.bf16:
            kind = next(self.module.parameters())
            with torch.autocast(kind.device.type, torch.bfloat16, cache_enabled=False):
                found = self._called(batch, w)
            return tree_map(lambda x: x.to(kind.dtype) if is_bf16(x) else x, found)
        return self._called(batch, w)

    def _called(self, batch: Batch, w: dict[str, Tensor] | None) -> Any:
        inputs = tuple(batch[name] for name in self.inputs)
        return self.module(*inputs) if w is None else functional_call(self.module, w, inputs)

    def check_labels(self, output: Any, columns: Batch) -> None:
        """InputError if the loss knows that labels of `columns` do not fit the module's output."""
        check = getattr(self.loss, "check", None)
        if check is not None:
            check(output, columns)

    def check(self, columns: Batch) -> None:
        """InputError if `columns` [n, ...] do not fit: a missing input, an index or a label
        out of range."""
        require_inputs(self, columns)
        if not len(columns[self.inputs[0]]):
            return
        task = copy.deepcopy(self)
        task.module.eval()
        device = next(task.module.parameters()).device
        one = {name: column[:1].clone().to(device) for name, column in columns.items()}
        with torch.no_grad():
            check_embeddings(task, columns)
            self.check_labels(task.output(task.prepare(one)), columns)


def refuse_kinds(module: nn.Module) -> None:
    """InputError naming the first part of a module that torch cannot copy, hook or add up."""
    if any(isinstance(p, nn.UninitializedParameter) for p in module.parameters()):
        raise InputError("the module is lazy: call it once on a batch, so that it has shapes")
    for path, m in module.named_modules():
        if isinstance(m, torch.jit.ScriptModule):
            raise InputError(f"{called(path)} is compiled by torch.jit; use the module it is of")
        if any(isinstance(hook, WeightNorm) for hook in m._forward_pre_hooks.values()):
            raise InputError(
                f"{called(path)} ({type(m).__name__}) has torch.nn.utils.weight_norm, which cannot "
                "be copied; use torch.nn.utils.parametrizations.weight_norm"
            )
        if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse and m.weight.requires_grad:
            raise InputError(
                f"{called(path)} ({type(m).__name__}) gives sparse gradients, which no row of "
                "clients can add up; use sparse=False"
            )


def is_bf16(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.bfloat16


def check_metrics(metrics: Mapping[str, Score]) -> None:
    """InputError for a name that records, curves or dashboards could not tell from another."""
    for name in metrics:
        if not isinstance(name, str) or not name or re.search(r"[\s/]", name):
            raise InputError(
                f"metric {name!r}: expected a name without spaces and '/', which part the name of "
                "an evaluation from that of a metric"
            )
        if name in TAKEN:
            raise InputError(f"no metric can be called {name!r}: that is {TAKEN[name]}")
