"""Which code runs: plain torch or a Triton kernel, as VECFL_KERNELS says."""

import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

AUTO = "reference"  # what auto takes for CUDA tensors; "triton" once a GPU has shown that it wins
CHOICES = ("reference", "triton", "auto")


def by_triton(device: torch.device) -> bool:
    """Whether operations on this device are Triton kernels.

    Raises ValueError, in one line, where VECFL_KERNELS is no choice or cannot be had.
    """
    wish = os.environ.get("VECFL_KERNELS") or "auto"
    if wish not in CHOICES:
        raise ValueError(f"VECFL_KERNELS={wish}: expected reference, triton or auto")
    if wish != "triton":
        auto = wish == "auto" and AUTO == "triton" and device.type == "cuda"
        return auto and find_spec("triton") is not None
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"VECFL_KERNELS=triton: tensors on {device.type} need TRITON_INTERPRET=1, a slow "
            "interpreter; take VECFL_KERNELS=auto"
        )
    if find_spec("triton") is None:
        raise ValueError("VECFL_KERNELS=triton: Triton is not installed; pip install triton")
    return True


def chosen(package: str, like: Tensor) -> ModuleType:
    """The module of `package` that works on tensors beside `like`."""
    return import_module(f"{package}.{'triton' if by_triton(like.device) else 'reference'}")


def launch(kernel: Any, programs: int, *arguments: object, **constants: object) -> None:
    """Run `programs` programs of a kernel on the device of its first argument.

    Products and sums stay two roundings, as they are in torch.
    """
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **constants, enable_fp_fusion=False)
