"""Losses and metrics: functions of (output, batch) that give a sum and a weight per example.

A batch is a dict of columns `[B, ...]`. Sums and weights, not means, make the mean over any set of
examples or tokens exact: it is (sum of sums) / (sum of weights). Weights are data, nothing is
differentiated through them; None stands for a weight of 1 for every example.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vecfl.errors import InputError

Batch = Mapping[str, Tensor]
Pair = tuple[Tensor, Tensor | None]
Score = Callable[[Tensor, Batch], Pair]
IGNORED = -100
FEW = 64  # classes: torch's kernel takes twice the time for rows this short under vmap on a CPU


def labels(output: Tensor, batch: Batch) -> Tensor:
    """batch["y"] as int64; InputError unless it has the shape of output without its last axis."""
    y = batch["y"]
    if output.shape[:-1] != y.shape:
        raise InputError(
            f"output {list(output.shape)} does not fit labels 'y' {list(y.shape)}: output is "
            "[B, ..., classes], with the classes last, and labels are [B, ...]"
        )
    return y.long()


def over_positions(value: Tensor, counted: Tensor) -> Pair:
    """Sum value and weight of every position [B, ...] into [B]."""
    return value.flatten(1).sum(1), counted.to(value.dtype).flatten(1).sum(1)


def _nll(output: Tensor, y: Tensor) -> Tensor:
    """-log softmax(output [B, V])[y [B]], one for each example."""
    vectorised = torch._C._functorch.is_functorch_wrapped_tensor(output)
    if vectorised and output.is_cpu and output.shape[-1] < FEW:
        value = output.logsumexp(-1) - output.gather(-1, y.clamp(min=0)[:, None])[:, 0]
        return value.where(y != IGNORED, 0)
    return F.cross_entropy(output, y, reduction="none")


def cross_entropy(output: Tensor, batch: Batch) -> Pair:
    """Cross-entropy of logits output [B, V] and labels batch["y"] [B].

    For sequences output is [B, ..., V] and y [B, ...]; a label of -100 is a position without
    weight, and the weight of an example is the number of its positions that count.
    """
    y = labels(output, batch)
    if y.dim() == 1:
        return _nll(output, y), None
    value = F.cross_entropy(output.flatten(0, -2), y.flatten(), reduction="none")
    return over_positions(value.view(y.shape), y != IGNORED)


def count_tokens(labels: Tensor) -> Tensor:
    """How many positions of each example count in `cross_entropy`: labels [n, ...] give [n]."""
    return (labels != IGNORED).flatten(1).sum(1) if labels.dim() > 1 else (labels != IGNORED).long()


def accuracy(output: Tensor, batch: Batch) -> Pair:
    """1 where the largest logit is the label, weight 1; positions labelled -100 do not count."""
    y = labels(output, batch)
    correct = (output.argmax(-1) == y).to(output.dtype)
    if y.dim() == 1:
        return correct, None
    return over_positions(correct, y != IGNORED)


def squared_error(output: Tensor, batch: Batch) -> Pair:
    """Half the squared difference of output and batch["y"], [B, ...], summed over an example."""
    if output.shape != batch["y"].shape:
        raise InputError(
            f"output {list(output.shape)} and column 'y' {list(batch['y'].shape)} differ in shape; "
            "for one number per example end the module with nn.Flatten(0)"
        )
    error = 0.5 * (output - batch["y"]) ** 2
    return error.flatten(1).sum(1) if error.dim() > 1 else error, None


def check_labels(output: Tensor, batch: Batch) -> None:
    """InputError if a label batch["y"] [n, ...] is no class of output [..., V] (nor -100)."""
    y, classes = batch["y"], output.shape[-1]
    if y.is_floating_point():
        raise InputError(f"column 'y' is {y.dtype}; cross_entropy needs integer labels: y.long()")
    low, high = (int(bound) for bound in y.aminmax()) if y.numel() else (0, 0)
    if low >= 0 and high < classes:  # seen without a copy, which counts for a store
        return
    wrong = (y < 0) | (y >= classes)
    if y.dim() > 1:
        wrong &= y != IGNORED
    if wrong.any():
        raise InputError(
            f"column 'y': label {int(y[wrong][0])} of example {int(wrong.nonzero()[0, 0])} is out "
            f"of range: the model has {classes} outputs, so labels are 0 to {classes - 1}"
        )


cross_entropy.check = check_labels  # type: ignore[attr-defined]
