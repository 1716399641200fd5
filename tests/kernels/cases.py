"""What the tests of kernels share: both implementations of an operation, and rows of any kind."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor

T = TypeVar("T")
TYPES = (torch.float32, torch.float64)
SHAPES = [(0, 5), (1, 1), (2, 3), (37, 127), (2, 128), (3, 5001)]
CPU = torch.device("cpu")


def both(run: Callable[[torch.device], T], device: torch.device) -> tuple[T, T]:
    """What `run` gives by the reference on a CPU, and by the kernel on the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VECFL_KERNELS", "reference")
        reference = run(CPU)
        patch.setenv("VECFL_KERNELS", "triton")
        return reference, run(device)


def normals(seed: int, *shape: int) -> Tensor:
    """Float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def strided(rows: Tensor) -> dict[str, Tensor]:
    """The same rows as they may lie in memory: packed, beside other numbers, by columns."""
    wide = torch.full((len(rows), rows.shape[1] + 3), 7.0, dtype=rows.dtype)
    wide[:, 2:-1] = rows
    return {"packed": rows, "wide": wide[:, 2:-1], "columns": rows.T.contiguous().T}


def hard(dtype: torch.dtype) -> Tensor:
    """Rows [6, 5] of zeros, denormals, the largest numbers, both signs, NaN and infinity."""
    about = torch.finfo(dtype)
    tiny, most, least = about.tiny, about.max, about.smallest_normal * about.eps
    nan, inf = float("nan"), float("inf")
    rows = [
        [0.0, -0.0, 0.0, 0.0, 0.0],
        [tiny, -tiny / 4, least, -least, 0.0],
        [most, -most, most / 3, 1.0, tiny],
        [1.0, -1.0, 0.5, -0.25, tiny],
        [nan, 1.0, -1.0, 0.0, tiny],
        [inf, 1.0, -inf, 0.0, tiny],
    ]
    return torch.tensor(rows, dtype=dtype)


def same(a: Tensor, b: Tensor) -> None:
    """Equal bits, but for the kind of NaN."""
    a, b = a.cpu(), b.cpu()
    assert a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan())
    kept = ~a.isnan()
    assert torch.equal(a[kept], b[kept])
    assert torch.equal(a[kept].signbit(), b[kept].signbit())
