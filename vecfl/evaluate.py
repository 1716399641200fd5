"""Evaluation of a model: on pooled examples, and on every client's own; in batches, exact means."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.losses import Batch
from vecfl.task import Task

BATCH = 1024
Pairs = dict[str, tuple[Tensor, Tensor]]


def scores(task: Task, w: Tensor, columns: Batch) -> Iterator[tuple[slice, Pairs]]:
    """For slices of the examples, loss and metrics as (sum [b], weight [b]) of the model w [P]."""
    was_training = task.module.training
    task.module.eval()
    n = len(columns[task.inputs[0]])
    try:
        for start in range(0, n, BATCH):
            part = slice(start, min(start + BATCH, n))
            batch = task.prepare(
                {name: c[part].clone().to(w.device) for name, c in columns.items()}
            )
            inputs = tuple(batch[name] for name in task.inputs)
            with torch.no_grad():
                tensors = task.layout.unflatten(w.clone())  # a module may change its buffers
                output = functional_call(task.module, tensors, inputs)
                if start == 0:
                    task.check_labels(output, columns)
                functions = {"loss": task.loss} | dict(task.metrics)
                yield part, {name: in_full(*f(output, batch)) for name, f in functions.items()}
    finally:
        task.module.train(was_training)


def in_full(value: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums and weights [b] in float64, weights written out."""
    return value.double(), torch.ones_like(value).double() if weight is None else weight.double()


def evaluate(task: Task, w: Tensor, columns: Batch) -> dict[str, float]:
    """Loss and metrics of the model w [P] on pooled examples: (sum of sums) / (sum of weights).

    columns [n, ...]; raises InputError if there is no example.
    """
    totals: dict[str, list[float]] = {}
    for _, pairs in scores(task, w, columns):
        for name, (value, weight) in pairs.items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += float(value.sum())
            total[1] += float(weight.sum())
    if not totals:
        raise InputError("nothing to evaluate: the evaluation data have no example")
    return {name: v / w if w else float("nan") for name, (v, w) in totals.items()}


def evaluate_clients(task: Task, w: Tensor, data: FederatedDataset) -> dict[str, np.ndarray]:
    """Loss and metrics of the model w [P] on each client's examples: arrays [N].

    Beside them "weight", the loss weight of each client: its examples, or its tokens. Where that
    is 0 there is nothing to measure, and the others are NaN.
    """
    data.check_files()
    totals: dict[str, tuple[Tensor, Tensor]] = {}
    for part, pairs in scores(task, w, data.columns):
        examples = torch.arange(part.start, part.stop)
        owner = torch.searchsorted(data.offsets, examples, right=True) - 1
        for name, pair in pairs.items():
            zeros = torch.zeros(data.num_clients, dtype=torch.float64)
            sums = totals.setdefault(name, (zeros, zeros.clone()))
            for total, values in zip(sums, pair, strict=True):
                total.index_add_(0, owner, values.cpu())
    means = {name: (value / weight).numpy() for name, (value, weight) in totals.items()}
    return means | {"weight": totals["loss"][1].numpy()}


def spread(per_client: Mapping[str, np.ndarray], name: str = "client") -> dict[str, float]:
    """How the model serves the clients, as `name/...` metrics; clients without weight aside.

    Of the loss the 90th percentile; of each metric mean, 10th, 50th and 90th percentile over
    clients, and the worst, which is the lowest: metrics count as better when they are higher.
    """
    result = {}
    some = per_client["weight"] > 0
    for metric in per_client.keys() - {"weight"}:
        known = per_client[metric][some] if some.any() else np.array([np.nan])
        if metric == "loss":
            result[f"{name}/loss_p90"] = float(np.percentile(known, 90))
            continue
        result[f"{name}/{metric}_mean"] = float(known.mean())
        for q in (10, 50, 90):
            result[f"{name}/{metric}_p{q}"] = float(np.percentile(known, q))
        result[f"{name}/{metric}_worst"] = float(known.min())
    return result


def check_name(name: str) -> str:
    """`name` itself; InputError unless its `name/...` are metrics of an evaluation alone."""
    if not isinstance(name, str) or name in ("", "train", "system") or "/" in name:
        raise InputError(
            f"name: expected a name for these metrics without '/', and not train or system, "
            f"got {name!r}"
        )
    return name
