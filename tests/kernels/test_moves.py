"""Momentum and Adam on rows by the kernels, beside the reference, which is torch's."""

import pytest
import torch
from torch import Tensor

from vecfl.layout import Entry, Layout
from vecfl.optim import ClientOptimizer, Rows, adam, adamw, momentum

from .cases import TYPES, both, normals

SHAPES = ((2, 3), (127,), (), (128, 1), (1200,))
STARTS = [sum(torch.Size(s).numel() for s in SHAPES[:i]) for i in range(len(SHAPES))]
P = 6 + 127 + 1 + 128 + 1200
OPTIMIZERS = {
    "momentum": momentum(0.8),
    "nesterov": momentum(0.8, nesterov=True),
    "momentum, decay": momentum(0.8, weight_decay=0.3),
    "adam": adam((0.8, 0.95), 1e-3),
    "adam, default": adam(),
    "adam, decay": adam(weight_decay=0.3),
    "adamw": adamw((0.8, 0.95), 1e-3, 0.3),
}


def moved(
    optimizer: ClientOptimizer, w: Tensor, steps: int, at: torch.device, by_columns: bool = False
) -> list[Tensor]:
    """Rows and states [R, P] after steps of which row r has made r more."""
    entries = zip(SHAPES, STARTS, strict=True)
    layout = Layout(tuple(Entry(str(o), s, o, w.dtype) for s, o in entries))
    wide = torch.cat((w, torch.full((len(w), 3), 7.0)), 1).to(at, w.dtype)  # rows beside others
    states = [torch.zeros_like(wide) for _ in range(optimizer.states)]
    rows = Rows(
        w=layout.param_views(wide[:, :P]),
        state=[layout.param_views(t[:, :P]) for t in states],
        bias=None,
        total=None,
        count=None,
        steps=torch.arange(len(w), device=at).float() if optimizer.counts else None,
    )
    for step in range(steps):
        grads = layout.param_views(normals(10 + step, len(w), P).to(at, w.dtype))
        if by_columns:
            grads[0] = grads[0].mT.contiguous().mT
        optimizer.step_(rows, grads, 0.05)
    assert (wide[:, P:] == 7).all()
    if rows.steps is not None:
        assert rows.steps.tolist() == [r + steps for r in range(len(w))]
    return [t[:, :P].cpu() for t in (wide, *states)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_move_as_by_torch(name: str, dtype: torch.dtype, device: torch.device) -> None:
    w = normals(1, 3, P).to(dtype)
    right, found = both(lambda at: moved(OPTIMIZERS[name], w, 3, at, True), device)
    size = 1e-6 if dtype == torch.float32 else 1e-14
    assert len(right) == 1 + OPTIMIZERS[name].states
    for a, b in zip(right, found, strict=True):
        torch.testing.assert_close(b, a, rtol=10 * size, atol=size)
    assert ((right[0] - w).abs() > 1e-4).double().mean() > 0.99


@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_any_number_of_rows(rows: int, name: str, device: torch.device) -> None:
    w = normals(2, rows, P)
    right, found = both(lambda at: moved(OPTIMIZERS[name], w, 1, at), device)
    for a, b in zip(right, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("block", [64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numbers_do_not_depend_on_the_block(
    name: str, block: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = normals(3, 1, P).float()
    _, before = both(lambda at: moved(OPTIMIZERS[name], w, 1, at), device)
    monkeypatch.setattr("vecfl_kernels.moves.triton.BLOCK", block)
    _, after = both(lambda at: moved(OPTIMIZERS[name], w, 1, at), device)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_by_hand(device: torch.device) -> None:
    """Adam's first step is lr g / (|g| + eps), momentum's lr g; 0.1 is no number of float32."""
    w, g = torch.zeros(1, P).double(), normals(10, 1, P)
    for found, *_ in both(lambda at: moved(adam(eps=0.1), w, 1, at), device):
        torch.testing.assert_close(found, -0.05 * g / (g.abs() + 0.1), rtol=1e-12, atol=0)
    for found, *_ in both(lambda at: moved(momentum(0.8), w, 1, at), device):
        torch.testing.assert_close(found, -0.05 * g, rtol=1e-14, atol=0)
