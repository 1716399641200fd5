"""Ranks: the processes of one run, which share its cohorts and add up what they find.

torchrun, Slurm or MPI start them. A process that was started alone is a mesh of one: it has no
process group, and nothing here costs it anything.
"""

import atexit
import hashlib
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vecfl.errors import InputError
from vecfl.launch import Launch, launched, threads_given

# A rank that ends is noticed at once, by its closed connections. These are for one that hangs or
# whose machine is gone; as long may the others wait for the slowest client of a round.
MEET, ANSWER = timedelta(minutes=5), timedelta(minutes=30)
LAST = timedelta(seconds=25)  # torchrun kills 30 s after SIGTERM
T = TypeVar("T")


class RankError(RuntimeError):
    """The ranks cannot go on; one line says in what they differ."""


class RankLost(RankError):
    """Another rank has ended, or does not answer."""


@dataclass(frozen=True)
class Mesh:
    """This rank of `size` on `machines`; `local` on its own. All ranks call the same methods.

    Raises RankLost where another rank ends or does not answer.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    machines: int = 1

    def sum(self, *parts: Tensor) -> list[Tensor]:
        """The parts of all ranks added up in one all-reduce of float64, in the shapes they had.

        The sums are on the device of the first part and have the same bits on every rank; those of
        a mesh of one are the parts themselves.
        """
        if self.size == 1:
            return list(parts)
        device = parts[0].device
        flat = torch.cat([part.to(device, torch.float64).flatten() for part in parts])
        with answering():
            if device.type == "cuda":  # gloo sees at once that a rank has ended, NCCL would wait
                dist.all_reduce(torch.zeros(1))
            dist.all_reduce(flat)
        pieces = flat.split([part.numel() for part in parts])
        return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on every rank; its InputError too."""
        if self.size == 1:
            return make()
        made: list[object] = [None]
        if self.rank == 0:
            try:
                made = [make()]
            except InputError as error:
                made = [error]
        with answering():
            dist.broadcast_object_list(made, src=0, device=torch.device("cpu"))
        if isinstance(made[0], InputError):
            raise made[0]
        return made[0]  # type: ignore[return-value]

    def place(self, value: float) -> Tensor:
        """[size] float64 with `value` at this rank: added up, that of every rank."""
        values = torch.zeros(self.size, dtype=torch.float64)
        values[self.rank] = value
        return values

    def mark(self, *values: object) -> Tensor:
        """The fingerprint of `values` at this rank, as `place`; alone 0, for nobody compares."""
        return self.place(fingerprint(*values) if self.size > 1 else 0)

    def check(self, what: str, marks: Tensor, error: type[Exception] = RankError) -> None:
        """An error where the fingerprints [size] of `what`, added up, are not all the same."""
        others = (marks != marks[0]).nonzero().flatten().tolist()
        if others:
            raise error(
                f"rank {others[0]} of {self.size} has another {what} than rank 0; all need the same"
            )

    def device(self, device: torch.device) -> torch.device:
        """`device`; for "cuda" the GPU of this rank."""
        if self.size == 1 or device.type != "cuda":
            return device
        count = torch.cuda.device_count()
        if device.index is not None:
            raise InputError(f"device {device} for {self.size} ranks: say cuda, each takes its own")
        if self.local >= count > 1:
            raise InputError(
                f"rank {self.rank} is number {self.local + 1} on a machine with {count} GPUs; "
                "start one rank for each GPU"
            )
        mine = torch.device("cuda", self.local if count > 1 else 0)  # a launcher may show but one
        torch.cuda.set_device(mine)
        return mine

    def is_first(self, line: str) -> bool:
        """Whether no other rank has asked this about `line`: who is first prints it."""
        if self.size == 1 or _store is None:
            return self.rank == 0
        try:
            return bool(_store.add(f"line/{line}", 1) == 1)
        except RuntimeError:  # the store has ended with the rank that kept it
            return True

    def let_first_end(self) -> None:
        """Wait until rank 0 is here, too: a launcher ends all ranks once one has failed."""
        if self.size == 1 or _store is None:
            return
        with suppress(RuntimeError):
            if self.rank == 0:
                _store.set("end", "")
            else:
                _store.wait(["end"], LAST)


_mesh: Mesh | None = None
_store: dist.Store | None = None


def join() -> Mesh:
    """The ranks that this process belongs to; at the first call they meet.

    On a machine each takes its part of the cores as torch's threads, unless OMP_NUM_THREADS was
    set. Raises InputError where the others cannot be met.
    """
    global _mesh
    if _mesh is None:
        launch = launched(os.environ)
        if dist.is_available() and dist.is_initialized():
            _mesh = settled(dist.get_rank(), dist.get_world_size(), launch)
        elif launch is not None:
            meet(launch)
            atexit.register(leave)
            _mesh = settled(launch.rank, launch.size, launch)
        else:
            _mesh = Mesh()
    return _mesh


def meet(launch: Launch) -> None:
    """Make the process group: gloo for tensors on the CPU, NCCL for those on a GPU."""
    global _store
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # torchrun may keep its store for the next attempt, with the addresses of ranks that have ended.
    one = os.environ.get("GROUP_WORLD_SIZE") == "1"
    prefix = f"vecfl/{launch.restarts if one else 0}"
    rank, size = launch.rank, launch.size
    try:
        store, *_ = next(iter(dist.rendezvous("env://", rank, size, timeout=MEET)))
        _store = dist.PrefixStore(prefix, store)
        dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=ANSWER)
    except (RuntimeError, ValueError) as error:
        again = "; restarts on several machines need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        raise InputError(
            f"rank {rank} of {size} cannot meet the others at {launch.address}: {_reason(error)}"
            f"{again if launch.restarts and not one else ''}"
        ) from error


def settled(rank: int, size: int, launch: Launch | None) -> Mesh:
    """This rank among those on its machine, with its part of the cores."""
    known = hasattr(os, "sched_getaffinity")
    cores = sorted(os.sched_getaffinity(0)) if known else list(range(os.cpu_count() or 1))
    found: list[tuple[str, list[int]]] = [("", [])] * size
    with answering():
        dist.all_gather_object(found, (socket.gethostname(), cores))
    beside = [other for other in range(size) if found[other][0] == found[rank][0]]
    if not threads_given(os.environ, os.getppid()):
        all_cores = {core for other in beside for core in found[other][1]}
        torch.set_num_threads(max(1, len(all_cores) // len(beside)))
    said = None if launch is None else launch.local
    machines = len({name for name, _ in found})
    return Mesh(rank, size, beside.index(rank) if said is None else said, machines)


def leave() -> None:
    """Part from the other ranks."""
    global _mesh, _store
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    _mesh = _store = None


@contextmanager
def answering() -> Iterator[None]:
    """What torch raises where a rank does not answer is a RankLost."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"another rank has ended or hangs: {_reason(error)}") from error


def fingerprint(*values: object) -> int:
    """48 bits of BLAKE2b: of the bytes of tensors, of the text of other values."""
    digest = hashlib.blake2b(digest_size=6)
    for value in values:
        if not isinstance(value, Tensor):
            digest.update(repr(value).encode())
        elif value.numel():
            digest.update(
                value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data
            )
    return int.from_bytes(digest.digest(), "big")


def _reason(error: Exception) -> str:
    """The first sentence of an error of torch, without the place in its source."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return re.sub(r"\[\S+:\d+\] ", "", line).split(". ")[0]
