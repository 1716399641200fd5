"""The engine: slots, the local rule, and the backends that train rows."""

from vecfl.engine.backend import Backend
from vecfl.engine.graphs import Graphs, make_graphs, require_cuda
from vecfl.engine.layers import has_convolutions, usual_formulation
from vecfl.engine.loop import LoopBackend
from vecfl.engine.rule import ExampleNoise, LocalRule, make_update
from vecfl.engine.size import CACHE, free_memory, slot_count
from vecfl.engine.slots import Slots
from vecfl.engine.stacked import StackedBackend
from vecfl.engine.vmap import VmapBackend
from vecfl.errors import InputError
from vecfl.losses import Batch
from vecfl.task import Task

__all__ = [
    "CACHE",
    "Backend",
    "ExampleNoise",
    "Graphs",
    "LocalRule",
    "Slots",
    "VmapBackend",
    "free_memory",
    "has_convolutions",
    "make_backend",
    "make_graphs",
    "make_update",
    "require_cuda",
    "slot_count",
    "usual_formulation",
]


def make_backend(
    name: str, task: Task, example: Batch, examples: ExampleNoise | None = None
) -> Backend:
    """The backend called `name`; InputError for one that is not known.

    examples  where steps take gradients of single examples, which stacked layers do not have; it
              is an InputError where training changes buffers
    """
    if name not in CACHE:
        raise InputError(f"backend {name!r} is not known; choose from {', '.join(CACHE)}")
    if examples is not None and task.layout.buffers:
        raise InputError(
            f"dp_sgd: buffer '{task.layout.buffers[0].name}' changes in training, and nothing "
            "bounds what an example does to it; use a module without such buffers"
        )
    if name == "loop":
        return LoopBackend(task, examples)
    if name == "vmap":
        vmap = VmapBackend(task, example, examples)
        vmap.warn()
        return vmap
    if examples is not None:
        raise InputError(
            f"backend {name!r} has no gradients of single examples, which dp_sgd clips: use vmap "
            "or loop"
        )
    return StackedBackend(task, example, name.removeprefix("stacked").removeprefix("-"))
