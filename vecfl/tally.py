"""What a round comes to over all ranks, in one all-reduce."""

import logging
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vecfl.aggregate import Aggregate, everyone, late_, left_grid, on_grid, shift_
from vecfl.aggregator import combined
from vecfl.algorithms import Algorithm
from vecfl.cohorts import Cohort
from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.geometry import norms
from vecfl.job import Fold, Job
from vecfl.mesh import Mesh
from vecfl.task import Task

log = logging.getLogger("vecfl")


COMPARE = 10  # rounds from one comparison of the ranks' models to the next


@dataclass(frozen=True)
class Tally:
    """Sums of all ranks, the same bits on each.

    dropped   positions of the clients that were not finite, rising
    loss      mean over all examples in the steps of the others
    clients   how many of the others have a positive weight
    executed  slot-steps, idle ones included
    bytes     of what all clients sent, the dropped ones included
    signal    the greatest that came to a rank, 0 for none
    norm      [C] of the updates, by their place in the cohort, where they are measured
    seconds   [3, ranks] from the first client's start to the last one's end; of all workers
              together; of the busiest worker
    left      whether exact sums may have left their range
    trained   when this rank's last client had finished, by `time.perf_counter`
    lr        the clients' learning rate
    """

    aggregate: Aggregate
    dropped: list[int]
    loss: float
    clients: int
    executed: int
    bytes: int
    signal: int
    norm: torch.Tensor
    seconds: torch.Tensor
    trained: float
    left: bool
    lr: float

    def metrics(self, cohort: Cohort, began: float, waited: float) -> dict[str, float | int]:
        """`train/...`: what a round says about its clients; `system/...`: what they took.

        It ends now; it began, and waited for its examples, as this rank's clock says.
        """
        clients, steps = len(cohort.clients), int(cohort.plan.steps.sum())
        now, (train, busy, worker) = time.perf_counter(), self.seconds
        return {
            "train/loss": self.loss,
            "train/lr": self.lr,
            "train/cohort": cohort.drawn,
            "train/lost_clients": cohort.drawn - clients,
            "train/clients": self.clients,
            "train/dropped_clients": len(self.dropped),
            "system/clients_per_s": clients / (now - began),
            "system/round_s": now - began,
            "system/wait_s": waited,
            "system/train_s": float(train.max()),
            "system/aggregate_s": now - self.trained,
            "system/worker_max_s": float(worker.max()),
            "system/client_s": float(busy.sum()) / max(clients, 1),
            "system/slot_efficiency": steps / max(self.executed, 1),
            "system/client_steps": steps,
        }


def tally(
    mesh: Mesh, fold: Fold, cohort: Cohort, job: Job, signal: int, algorithm: Algorithm
) -> Tally:
    """Add up what the ranks gathered for a cohort, of which `job` is this rank's part.

    Raises RankError where the ranks drew different cohorts or, every COMPARE rounds, have different
    states: then their rounds were not one.
    """
    sums, distinct = fold.aggregate, cohort.clients.unique()
    for rounds in sorted({0, *cohort.plan.delay.tolist()}):
        agree_(mesh, late_(sums, rounds))
    told = fold.told
    ok, weight = told.ok.cpu(), told.weight.cpu()
    trained = time.perf_counter()  # what was copied waited for a GPU
    loss = told.sums.cpu()[ok]
    losses, range = on_grid(loss, sums.grid).sum(0), loss.abs().sum()
    size = int(told.bytes.sum())
    counts = torch.tensor([int((weight > 0).sum()), fold.executed, size])
    bad = torch.searchsorted(distinct, told.client[~ok])
    bad = bad.bincount(minlength=len(distinct))
    state = job.server.values() if job.round % COMPARE == 0 else ()
    placed = map(mesh.place, (signal, *seconds(fold, trained)))
    marks = torch.stack((mesh.mark(cohort.clients), mesh.mark(*state), *placed))
    norm = norms(fold.updates, len(cohort.clients) if job.sampled is not None else 0)
    flat = flattened(sums)
    found = mesh.sum(*flat, range, losses, counts, bad, marks, norm)
    range, losses, counts, bad, marks, norm = found[len(flat) :]
    drawn, models, signals, *times = marks.cpu()
    mesh.check("cohort", drawn)
    mesh.check("model", models)
    sums = unflattened(sums, found[: len(flat)])
    sums = replace(sums, bound=torch.maximum(sums.bound, range.to(sums.bound)))
    if algorithm.aggregator is not None:
        sums = combined(mesh, fold.kept, len(cohort.clients), sums, algorithm)
    return Tally(
        sums,
        distinct.repeat_interleave(bad.cpu().long()).tolist(),
        float(losses[0] / losses[1]),
        int(counts[0]),
        int(counts[1]),
        int(counts[2]),
        int(signals.max()),
        norm,
        torch.stack(times),
        trained,
        bool(counts[0]) and left_grid(everyone(sums) if sums.grid else sums, len(cohort.clients)),
        fold.lr,
    )


def flattened(sums: Aggregate) -> list[Tensor]:
    """The tensors of the sums and of what is late, in an order that all ranks share."""
    parts = [sums, *(sums.late[rounds] for rounds in sorted(sums.late))]
    names = sorted(sums.extra)
    return [t for p in parts for t in (p.total, p.weight, p.bound, *(p.extra[n] for n in names))]


def unflattened(sums: Aggregate, flat: list[Tensor]) -> Aggregate:
    """`sums` with the tensors that `flattened` gave, added up over the ranks."""
    names, late = sorted(sums.extra), sorted(sums.late)
    rows = iter(flat)

    def filled(part: Aggregate) -> Aggregate:
        total, weight, bound = next(rows), next(rows), next(rows)
        extra = {name: next(rows) for name in names}
        return replace(part, total=total, weight=weight, bound=bound, extra=extra, late={})

    first = filled(sums)
    return replace(first, late={rounds: filled(sums.late[rounds]) for rounds in late})


def agree_(mesh: Mesh, sums: Aggregate) -> None:
    """Bring weights that are logs to the same shift on all ranks."""
    if sums.shift is not None:
        (shifts,) = mesh.sum(mesh.place(float(sums.shift)))
        shift_(sums, shifts.max().to(sums.shift))


def seconds(fold: Fold, trained: float) -> tuple[float, float, float]:
    """Of this rank, until `trained`: in all, of its workers together, of the busiest."""
    took = trained - fold.began
    # The one worker of a GPU has long gone on when its last step ends.
    busy = fold.busy if fold.aggregate.total.is_cpu else [took]
    return took, sum(busy), max(busy)


def warn(
    mesh: Mesh,
    round: int,
    cohort: Cohort,
    found: Tally,
    client_ids: Sequence[Hashable],
    algorithm: Algorithm,
) -> None:
    """Say what is unusual about a round, on rank 0."""
    if mesh.rank:
        return
    clients = len(cohort.clients)
    if found.dropped:
        bad = ", ".join(str(client_ids[k]) for k in found.dropped)
        log.warning("round %d: client %s dropped: not finite", round + 1, bad)
    if not found.clients:
        level, who = logging.WARNING, "usable client"
        if not clients:  # legal, as Poisson sampling has it
            level, who = logging.INFO, "client takes part"
        then = "the model stays as it is"
        if algorithm.privacy is not None:
            then = "the model moves by noise alone"
        log.log(level, "round %d: no %s; %s", round + 1, who, then)
    if found.left:
        what = "updates or losses are too large for exact sums: last bits may depend on the order"
        log.warning("round %d: %s", round + 1, what)


def compare(mesh: Mesh, task: Task, data: FederatedDataset, facts: Mapping[str, object]) -> None:
    """InputError where the ranks were given different models, populations or `facts`."""
    if mesh.size == 1:
        return
    columns = [(name, c.dtype, c.shape) for name, c in data.columns.items()]
    parts = {"model": task.module.state_dict().values(), "population": (data.offsets, columns)}
    known = parts | {name.replace("_", " "): (value,) for name, value in facts.items()}
    (marks,) = mesh.sum(torch.stack([mesh.mark(*values) for values in known.values()]))
    for what, found in zip(known, marks, strict=True):
        mesh.check(what, found, InputError)
