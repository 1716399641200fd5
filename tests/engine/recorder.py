"""CUDA graphs without CUDA: what a recorded step runs again is its operators, not its Python.

As a capture does, `record` leaves all memory as it was and refuses whatever asks for a value; what
runs again reads and writes the same tensors, whatever the Python names have become meanwhile. After
each run all memory that the step made is spoiled, so that nothing may be handed on in it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from vecfl_kernels import philox


@torch.library.custom_op("vecfl_tests::philox", mutates_args=())
def drawn(counter: Tensor, seed: int) -> Tensor:
    """Philox as one operator: on a CPU it is numpy's, which no recording would see."""
    return philox(counter, seed)


ASKING = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select")


def storages(found: Any) -> set[int]:
    """Where the memory of the tensors in `found` begins."""
    return {t.untyped_storage().data_ptr() for t in tree_leaves(found) if isinstance(t, Tensor)}


def alias(found: Any) -> Any:
    """A tensor of the same memory, which keeps its shape if that one's is changed."""
    return found.detach() if isinstance(found, Tensor) else found


class Recording(TorchDispatchMode):
    """The operators that run inside, with their tensors; memory from outside that they wrote."""

    def __init__(self, asking: tuple[str, ...]) -> None:
        super().__init__()
        self.asking, self.calls = asking, []
        self.own: dict[int, Tensor] = {}
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs, schema = kwargs or {}, function._schema
        if schema.name in self.asking:
            raise RuntimeError(f"operation not permitted when stream is capturing: {schema.name}")
        writes = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        for argument in writes:
            at = schema.arguments.index(argument)
            value = args[at] if at < len(args) else kwargs.get(argument.name)
            for t in tree_leaves(value):
                memory = t.untyped_storage()
                if memory.data_ptr() not in self.own:
                    self.before.setdefault(memory.data_ptr(), (memory, memory.clone()))
        if torch.Tag.inplace_view in function.tags:  # another shape of the same memory
            return function(*args, **kwargs)
        as_it_is = tree_map(alias, (args, kwargs))
        out = function(*args, **kwargs)
        view = not writes and storages(out) & storages((args, kwargs))
        if not writes and not view:
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    self.own[t.untyped_storage().data_ptr()] = t
        if not view:
            self.calls.append((function, *as_it_is, tree_map(alias, out), bool(writes)))
        return out

    def restore(self) -> None:
        for memory, was in self.before.values():
            memory.copy_(was)

    def run(self) -> None:
        for function, args, kwargs, out, writes in self.calls:
            found = function(*args, **kwargs)
            if not writes:
                for t, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
                    if isinstance(t, Tensor):
                        t.copy_(new)
        self.spoil()

    def spoil(self) -> None:
        for t in self.own.values():
            t.fill_(float("nan") if t.is_floating_point() else 1)


class Recorder:
    """Counts what it does; `asking` are the operators that a capture refuses."""

    def __init__(self, asking: tuple[str, ...] = ASKING) -> None:
        self.asking, self.warmed, self.recorded, self.replayed = asking, 0, 0, 0

    def warm(self, take: Callable[[], None]) -> None:
        self.warmed += 1
        take()

    def record(self, take: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        recording = Recording(self.asking)
        with recording:
            take()
        recording.restore()
        recording.spoil()

        def replay() -> None:
            self.replayed += 1
            recording.run()

        return replay
