"""The tests of kernels, compiled for the GPU; the reference is that of the CPU."""

import os

import pytest
import torch

from ..kernels.test_moves import *  # noqa: F403
from ..kernels.test_noise import *  # noqa: F403
from ..kernels.test_rounding import *  # noqa: F403
from ..kernels.test_rows import *  # noqa: F403

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> torch.device:
    """The GPU, where kernels are compiled."""
    name = os.environ.get("VECFL_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (VECFL_TEST_DEVICE=cpu tries the code of the test)")
    pytest.importorskip("triton", reason="needs Triton")
    if name == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: kernels would not be compiled; run tests/gpu by itself")
    return torch.device(name)
