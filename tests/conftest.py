"""One operator thread: tensors are small here, and two threads waiting for a core are slow."""

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

torch.set_num_threads(1)
os.environ["WANDB_MODE"] = "disabled"  # the tests of W&B say otherwise
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
if not torch.cuda.is_available():  # read when Triton is imported, by whomever, and kernels are made
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def no_choices_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the probe chose before, in the user's cache folder, is neither read nor written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_report_header() -> str:
    """Whether the kernels are tested."""
    found = find_spec("triton") is not None
    return "kernels: " + ("by Triton" if found else "NOT TESTED, for Triton is not installed")
