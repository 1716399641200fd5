"""Evaluation of a model: on pooled examples, and on every client's own; in batches, exact means."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.losses import Batch, Score
from vecfl.mesh import Mesh
from vecfl.task import TAKEN, Task

BATCH = 1024
ALONE = Mesh()
OF_ROUNDS = (
    "train",
    "server",
    "comm",
    "late",
    "system",
    "update",
    "privacy",
)  # what rounds call their metrics
Columns = dict[str, Any]  # [N]: arrays, and the ids of clients
Pairs = dict[str, tuple[Tensor, Tensor]]


def scores(task: Task, w: Tensor, columns: Batch, mesh: Mesh) -> Iterator[tuple[slice, Pairs]]:
    """Loss and metrics as (sum [b], weight [b]) of the model w [P], for this rank's batches."""
    was_training = task.module.training
    task.module.eval()
    n = len(columns[task.inputs[0]])
    try:
        mine = range(0, n, BATCH)[mesh.rank :: mesh.size]
        for start in mine:
            part = slice(start, min(start + BATCH, n))
            batch = task.prepare(
                {name: c[part].clone().to(w.device) for name, c in columns.items()}
            )
            inputs = tuple(batch[name] for name in task.inputs)
            with torch.no_grad():
                tensors = task.layout.unflatten(w.clone())  # a module may change its buffers
                output = functional_call(task.module, tensors, inputs)
                if start == mine[0]:
                    task.check_labels(output, columns)
                yield (
                    part,
                    {name: in_full(*f(output, batch)) for name, f in functions(task).items()},
                )
    finally:
        task.module.train(was_training)


def in_full(value: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums and weights [b] in float64, weights written out."""
    return value.double(), torch.ones_like(value).double() if weight is None else weight.double()


def functions(task: Task) -> dict[str, Score]:
    """The loss and the metrics."""
    return {"loss": task.loss} | dict(task.metrics)


def evaluate(task: Task, w: Tensor, columns: Batch, mesh: Mesh = ALONE) -> dict[str, float]:
    """Loss and metrics of the model w [P] on pooled examples: (sum of sums) / (sum of weights).

    columns [n, ...], the same on each rank of `mesh`, which share the work; the result has the same
    bits for any number of ranks. Raises InputError if there is no example.
    """
    batches = -(-len(columns[task.inputs[0]]) // BATCH)
    if batches == 0:
        raise InputError("nothing to evaluate: the evaluation data have no example")
    sums = torch.zeros(len(functions(task)), 2, batches, dtype=torch.float64)
    for part, pairs in scores(task, w, columns, mesh):
        sums[:, :, part.start // BATCH] = torch.stack(
            [torch.stack(p).sum(1) for p in pairs.values()]
        )
    (sums,) = mesh.sum(sums)
    values, weights = sums.sum(2).unbind(1)
    means = torch.where(weights != 0, values / weights, torch.nan)
    return dict(zip(functions(task), means.tolist(), strict=True))


def evaluate_clients(
    task: Task, w: Tensor, data: FederatedDataset, mesh: Mesh = ALONE
) -> dict[str, np.ndarray]:
    """Loss and metrics of the model w [P] on each client's examples: arrays [N].

    Beside them "weight", the loss weight of each client: its examples, or its tokens. Where that
    is 0 there is nothing to measure, and the others are NaN. `mesh` as in `evaluate`.
    """
    data.check_files()

    def owner(examples: Tensor) -> Tensor:
        return torch.searchsorted(data.offsets, examples, right=True) - 1

    # A client has a sum in each batch that it reaches into; these are added up in their order.
    starts = torch.arange(0, int(data.offsets[-1]), BATCH)
    first, last = owner(starts), owner((starts + BATCH).clamp(max=data.offsets[-1]) - 1)
    reached = last - first + 1
    shift = reached.cumsum(0) - reached - first  # from the client to its place in the batch's part
    whose = torch.arange(int(reached.sum())) - shift.repeat_interleave(reached)
    sums = torch.zeros(len(functions(task)), 2, len(whose), dtype=torch.float64)
    for part, pairs in scores(task, w, data.columns, mesh):
        place = owner(torch.arange(part.start, part.stop)) + shift[part.start // BATCH]
        for into, pair in zip(sums, pairs.values(), strict=True):
            for row, values in zip(into, pair, strict=True):
                row.index_add_(0, place, values.cpu())
    (sums,) = mesh.sum(sums)
    totals = torch.zeros(len(sums), 2, data.num_clients, dtype=torch.float64)
    for into, rows in zip(totals.flatten(0, 1), sums.flatten(0, 1), strict=True):
        into.index_add_(0, whose, rows)
    means = (totals[:, 0] / totals[:, 1]).numpy()
    return dict(zip(functions(task), means, strict=True)) | {"weight": totals[0, 1].numpy()}


def columns_of(
    per_client: Mapping[str, np.ndarray], data: FederatedDataset, norm: np.ndarray | None
) -> Columns:
    """What each client of `data` came to, [N]: see `Simulation.client_results`."""
    who = {"client": data.client_ids, "examples": data.sizes.numpy()}
    return {**who, **per_client} | ({} if norm is None else {"update_norm": norm})


def spread(per_client: Mapping[str, Any], name: str = "client") -> dict[str, float]:
    """How the model serves the clients, as `name/...` metrics; clients without weight aside.

    Of the loss the 90th percentile; of each metric mean, 10th, 50th and 90th percentile over
    clients, and the worst, which is the lowest: metrics count as better when they are higher. A
    client that has a loss and no value of a metric (it has no example of a class) is left out of
    it, and `name/METRIC_clients` tells how many have one, where some have none.
    """
    result = {}
    some = per_client["weight"] > 0
    for metric in per_client:
        if metric in TAKEN and metric != "loss":
            continue
        known = per_client[metric][some] if some.any() else np.array([np.nan])
        if metric == "loss":
            result[f"{name}/loss_p90"] = float(np.percentile(known, 90))
            continue
        lacking = np.isnan(known) & np.isfinite(per_client["loss"][some] if some.any() else known)
        if lacking.any():
            known = known[~lacking]
            result[f"{name}/{metric}_clients"] = len(known)
            known = known if len(known) else np.array([np.nan])
        result[f"{name}/{metric}_mean"] = float(known.mean())
        for q in (10, 50, 90):
            result[f"{name}/{metric}_p{q}"] = float(np.percentile(known, q))
        result[f"{name}/{metric}_worst"] = float(known.min())
    return result


def check_name(name: str) -> str:
    """`name` itself; InputError unless its `name/...` are metrics of an evaluation alone."""
    if not isinstance(name, str) or name in ("", *OF_ROUNDS) or "/" in name:
        raise InputError(
            f"name: expected a name for these metrics without '/', and not "
            f"{', '.join(OF_ROUNDS)}, got {name!r}"
        )
    return name
