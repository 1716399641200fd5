"""Kernels run in Triton's interpreter here, on the CPU; tests/gpu runs the same tests compiled."""

import pytest
import torch

from .cases import both


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of the kernels under test."""
    pytest.importorskip("triton", reason="kernels are not tested: pip install triton")
    try:
        both(add_one, torch.device("cpu"))
    except Exception as error:
        if "only 0-dimensional arrays" not in str(error):
            raise
        pytest.skip("kernels are not tested: this Triton's interpreter needs numpy < 2.4")
    return torch.device("cpu")


def add_one(device: torch.device) -> None:
    from vecfl_kernels import weighted_sum_

    weighted_sum_(torch.zeros(1).double(), torch.ones(1, 1), torch.ones(1).double())
