"""VECFL_KERNELS: which code runs, and one line where it cannot."""

import pytest
import torch
from torch import nn

import vecfl
from vecfl.errors import InputError
from vecfl_kernels import by_triton
from vecfl_kernels.choice import chosen

from ..oracles.bridge import dataset

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_auto_is_the_reference_until_a_gpu_has_shown_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VECFL_KERNELS", raising=False)
    monkeypatch.setattr("vecfl_kernels.choice.find_spec", lambda name: name)
    assert not by_triton(CPU) and not by_triton(GPU)
    monkeypatch.setattr("vecfl_kernels.choice.AUTO", "triton")
    assert not by_triton(CPU) and by_triton(GPU)
    monkeypatch.setenv("VECFL_KERNELS", "reference")
    assert not by_triton(GPU)
    monkeypatch.setenv("VECFL_KERNELS", "auto")
    monkeypatch.setattr("vecfl_kernels.choice.find_spec", lambda name: None)
    assert not by_triton(GPU)


def test_triton_runs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vecfl_kernels.choice.find_spec", lambda name: name)
    monkeypatch.setenv("VECFL_KERNELS", "triton")
    assert by_triton(GPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert by_triton(CPU)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="on cpu need TRITON_INTERPRET=1"):
        by_triton(CPU)
    monkeypatch.setattr("vecfl_kernels.choice.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="on cpu need TRITON_INTERPRET=1"):
        by_triton(CPU)  # not to install Triton, which would not help yet
    with pytest.raises(ValueError, match="pip install triton"):
        by_triton(GPU)
    monkeypatch.setenv("VECFL_KERNELS", "")  # counts as unset
    assert not by_triton(CPU)


def test_the_module_is_the_one_that_was_chosen(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    for wish in ("reference", "triton"):
        monkeypatch.setenv("VECFL_KERNELS", wish)
        module = chosen("vecfl_kernels.rows", torch.zeros(1, device=device))
        assert module.__name__ == f"vecfl_kernels.rows.{wish}"


def test_a_simulation_says_it_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset([{"x": torch.ones(2, 1), "y": torch.zeros(2, dtype=torch.long)}])
    task = vecfl.Task(nn.Linear(1, 2), vecfl.cross_entropy, example=data.examples(2))
    parts = task, data, vecfl.fedavg(lr=0.1, batches=vecfl.Batches(2)), vecfl.everyone()
    monkeypatch.setenv("VECFL_KERNELS", "cuda")
    with pytest.raises(InputError, match="VECFL_KERNELS=cuda: expected reference, triton or auto"):
        vecfl.Simulation(*parts)
