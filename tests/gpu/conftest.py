"""The device of the tests in this folder."""

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts


@pytest.fixture
def device() -> Iterator[str]:
    """The device under test, exact in float32 and as deterministic as torch can be."""
    name = os.environ.get("VECFL_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (VECFL_TEST_DEVICE=cpu tries the code of the test)")
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield name
    torch.use_deterministic_algorithms(False)
    for switch, precision in zip(switches, before, strict=True):
        switch.fp32_precision = precision
