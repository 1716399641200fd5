"""Steps captured as CUDA graphs: the host replays a step, and launches little else.

A replay reads and writes the tensors of the capture, so these stay in their places: rows and sums
of the slots, the batch in the backend's memory, and here the counts, streams, model and learning
rate. No GPU has run this yet: it follows the constraints of `torch.cuda.graph`.
"""

import logging
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from vecfl.engine.rule import LocalRule, Update, update_of
from vecfl.engine.slots import Slots
from vecfl.engine.together import Gather, Taken, add_up_
from vecfl.errors import InputError
from vecfl.losses import Batch
from vecfl.trial import first_line

log = logging.getLogger("vecfl")
WARM = 3  # steps of a kind that are taken as they are: libraries choose, caches and memory fill
Take = Callable[[], None]


class Recorder(Protocol):
    """`warm` runs a step; `record` gives what runs it again, and runs nothing."""

    def warm(self, take: Take) -> None: ...

    def record(self, take: Take) -> Take: ...


class Cuda:
    """Captures into one pool of memory; nothing in it outlives a replay, so graphs share it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm(self, take: Take) -> None:
        now = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            take()
        now.wait_stream(self.stream)

    def record(self, take: Take) -> Take:
        """Raises InputError where the step asks for a value or a copy that waits."""
        graph = torch.cuda.CUDAGraph()
        try:
            # The next cohort may be copied meanwhile, by a thread of its own.
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                take()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise InputError(
                f"graphs: the step cannot be captured: {first_line(error)}; leave out graphs"
            ) from error
        return graph.replay


def require_cuda(device: torch.device) -> None:
    """InputError unless a device can capture."""
    if device.type != "cuda":
        raise InputError(f"graphs: CUDA graphs need a CUDA device, not {device}")


def recorder(device: torch.device) -> Recorder:
    """What captures on a device."""
    return Cuda(device)


def make_graphs(slots: Slots, rule: LocalRule, backend: str) -> "Graphs | None":
    """Captured steps for these slots; None, and a warning, where gradients accumulate.

    InputError for the loop, whose clients take steps of their own, and for noised examples.
    """
    if rule.examples is not None:
        raise InputError("graphs: steps of dp_sgd are not captured; leave out graphs")
    if backend == "loop":
        raise InputError("graphs: the loop backend has no step of all slots; use vmap or stacked")
    if rule.batches.full:
        log.warning("graphs: gradients accumulate over an epoch: no step is captured")
        return None
    return Graphs(slots)


class Graphs:
    """The captured steps of a worker's slots, by kind; they are freed with it.

    lr [], model [P]          of the round, which `update` writes
    valid [S], streams [S, 3]  of the step

    A kind is a shape of the step and all that is no tensor in it: mask or none, draws or none, the
    place of the batch, optimizer, clip and mu. The learning rate is a tensor, so that schedules
    capture nothing anew.
    """

    def __init__(self, slots: Slots) -> None:
        self.slots, self.recorder = slots, recorder(slots.flat.device)
        self.lr, self.model = slots.flat.new_zeros(()), slots.flat.new_zeros(slots.layout.size)
        self.valid = torch.zeros_like(slots.seen)
        self.streams = slots.seen.new_zeros(slots.number, 3)
        self.taken: dict[Hashable, int] = {}
        self.captured: dict[Hashable, Take] = {}

    def update(self, rule: LocalRule, round: int, model: Tensor) -> Update:
        """The update of a round that begins from `model` [P]; its steps are replayed."""
        self.lr.fill_(rule.lr_of(round))
        self.model.copy_(model)
        update = update_of(rule, self.slots.layout.param_views(self.model), self.lr)
        kind = rule.optimizer, rule.clip, rule.mu
        return replace(update, replay=partial(self.train_, kind, update))

    def train_(
        self,
        rule: Hashable,
        update: Update,
        gather: Gather,
        index: Tensor,
        valid: Tensor,
        streams: Tensor | None,
        full: bool,
        step_: Taken,
    ) -> None:
        """The steps of a block: index [L, S, B], valid [L, S], streams [L, S, 3] or None.

        What is gathered, outside, lands where the captured step reads it, so examples may lie
        elsewhere in each round. full: every example counts, and there is no mask.
        """
        for step, at in enumerate(index.unbind()):
            batch = gather(at)
            self.valid.copy_(valid[step])
            if streams is not None:
                self.streams.copy_(streams[step])
            places = tuple((t.data_ptr(), t.shape) for t in batch.values())
            take = partial(self._take, update, batch, full, streams is not None, step_)
            self._play((rule, full, streams is None, places), take)

    def _play(self, kind: Hashable, take: Take) -> None:
        if kind not in self.captured:
            self.taken[kind] = self.taken.get(kind, 0) + 1
            if self.taken[kind] <= WARM:
                self.recorder.warm(take)
                return
            self.captured[kind] = self.recorder.record(take)
        self.captured[kind]()

    def _take(self, update: Update, batch: Batch, full: bool, drawn: bool, step_: Taken) -> None:
        """One step of all slots, on tensors that stay in their places."""
        slots, mask = self.slots, None
        if not full:
            size = next(iter(batch.values())).shape[1]
            examples = torch.arange(size, device=self.valid.device)
            mask = (examples < self.valid[:, None]).to(slots.flat.dtype)
        grads, total, weight = step_(batch, mask, self.streams if drawn else None, True)
        if grads is not None:
            update(slots.all, grads)
        add_up_(slots, total[None], (self.valid if weight is None else weight)[None])
