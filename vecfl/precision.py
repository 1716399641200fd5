"""How exactly clients' products are computed where their numbers are float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vecfl.errors import InputError
from vecfl.task import Task

PRECISIONS = ("float32", "tf32", "bf16")


def check_precision(precision: str, device: torch.device, dtype: torch.dtype) -> None:
    """InputError unless a run on this device and in this dtype can have this precision."""
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is not known; choose float32, tf32 or bf16")
    if precision != "float32" and dtype != torch.float32:
        raise InputError(f"precision {precision}: products of float32 numbers, not of {dtype}")
    if precision == "tf32" and device.type != "cuda":
        raise InputError(f"precision tf32: needs a CUDA device, not {device}; choose float32")


def lowered(task: Task, precision: str) -> Task:
    """The task as its clients train: under bf16 a copy whose module runs in autocast."""
    if precision != "bf16":
        return task
    new = task.to(next(task.module.parameters()).device, next(task.module.parameters()).dtype)
    new.bf16 = True
    return new


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Under tf32, products and convolutions on a GPU round their factors to 10 bits meanwhile."""
    if precision != "tf32":
        yield
        return
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32"
        yield
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.fp32_precision = was
