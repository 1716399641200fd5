"""More metrics for `Task(metrics=...)`: each gives a sum and a weight per example.

What a metric says of any set of examples is (sum of sums) / (sum of weights). So accuracies, and
recall, precision and F1 of one class, are metrics: ratios of counts. Their means over classes
(macro-F1, balanced accuracy) are not, for they are means of ratios: take one metric for each class
and average what comes out. Neither is what compares examples with each other (AUC), nor what is
worked out for each batch and averaged. Micro-averaged F1, where an example has one label, is
`vecfl.accuracy`.

Output is [B, ..., classes] and labels batch["y"] [B, ...]; positions labelled -100 do not count.
A class that no set of examples has makes NaN of it.
"""

from collections.abc import Callable

from torch import Tensor

from vecfl.errors import InputError, is_integer
from vecfl.losses import IGNORED, Batch, Pair, Score, labels, over_positions


def top_k_accuracy(k: int) -> Score:
    """1 where fewer than k logits are above that of the label, weight 1; k = 1 is the accuracy.

    Equal logits count in favour of the label.
    """
    if not is_integer(k) or k < 1:
        raise InputError(f"top_k_accuracy: expected a number of classes, at least 1, got {k!r}")

    def metric(output: Tensor, batch: Batch) -> Pair:
        y = labels(output, batch)
        counted = y != IGNORED
        own = output.gather(-1, y.clamp(min=0)[..., None])
        above = (~(output <= own)).sum(-1)  # a NaN is above, so that it is never right
        correct = (above < k) & counted
        return counts(correct.to(output.dtype), counted.to(output.dtype))

    return metric


def recall(label: int) -> Score:
    """Of the examples of a class, the share that is taken for it: TP / (TP + FN)."""
    return of_class(label, lambda predicted, true: (predicted * true, true))


def precision(label: int) -> Score:
    """Of the examples that are taken for a class, the share that is of it: TP / (TP + FP)."""
    return of_class(label, lambda predicted, true: (predicted * true, predicted))


def f1(label: int) -> Score:
    """The harmonic mean of precision and recall of a class: 2 TP / (2 TP + FP + FN)."""
    return of_class(label, lambda predicted, true: (2 * predicted * true, predicted + true))


def of_class(label: int, pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Score:
    """A metric from whether each position is predicted as a class, and whether it is of it."""
    if not is_integer(label) or label < 0:
        raise InputError(f"expected a class, counted from 0, got {label!r}")

    def metric(output: Tensor, batch: Batch) -> Pair:
        y = labels(output, batch)
        if label >= output.shape[-1]:
            raise InputError(f"no class {label}: the model has {output.shape[-1]} outputs, from 0")
        predicted = (output.argmax(-1) == label) & (y != IGNORED)
        return counts(*pair(predicted.to(output.dtype), (y == label).to(output.dtype)))

    return metric


def counts(value: Tensor, weight: Tensor) -> Pair:
    """Value and weight of every position [B, ...] summed into [B]."""
    return (value, weight) if value.dim() == 1 else over_positions(value, weight)
