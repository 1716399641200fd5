"""Slot counts by hand. Linear(4, 3) has 15 parameters, 60 bytes of float32."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from vecfl import Task, squared_error
from vecfl.engine import LocalRule, slot_count
from vecfl.engine.size import SHARE, activation_bytes, row_numbers
from vecfl.optim import ClientOptimizer, adam, keep_gradient, momentum, sgd
from vecfl.schedule import Batches

EXAMPLE = {"x": torch.ones(2, 4), "y": torch.zeros(2, 3)}


class Counting(nn.Linear):
    """Two numbers more in a row: a counter and a trace of the bias that training changes."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("trace", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.trace = self.bias.detach()[0] + 1
        return super().forward(x)


def task(module: nn.Module) -> Task:
    return Task(module, squared_error, example=EXAMPLE)


def rule(
    optimizer: ClientOptimizer, *, size: int = 2, full: bool = False, bias: bool = False
) -> LocalRule:
    return LocalRule(optimizer, Batches(size, full=full), lr=0.1, bias=bias)


@pytest.mark.parametrize(
    ("rule", "numbers"),
    [
        (rule(sgd()), 17),
        (rule(momentum()), 17 + 15),
        (rule(keep_gradient()), 17 + 15),
        (rule(adam()), 17 + 2 * 15),
        (rule(sgd(), bias=True), 17 + 15),
        (rule(sgd(), full=True), 17 + 15),
        (rule(adam(), bias=True, full=True), 17 + 4 * 15),
    ],
)
def test_row_numbers(rule: LocalRule, numbers: int) -> None:
    assert row_numbers(task(Counting()).layout, rule) == numbers


def test_activation_bytes() -> None:
    """Autograd keeps x (4 floats) for the weight and the error (3 floats) for its square: 28 B."""
    linear = task(nn.Linear(4, 3))
    assert [activation_bytes(linear, EXAMPLE, n) for n in (1, 10, 1000)] == [28, 280, 28000]
    double = linear.to("cpu", torch.float64)
    assert activation_bytes(double, EXAMPLE, 10) == 560


def test_activation_bytes_leave_the_buffers_as_they_are() -> None:
    """28 bytes as above; Counting keeps nothing more for the backward pass."""
    counting = task(Counting())
    assert activation_bytes(counting, EXAMPLE, 1) == 28
    assert int(counting.module.calls) == 0 and counting.module.trace.item() == 0


def test_a_deeper_model_keeps_more_and_parameters_do_not_count() -> None:
    """Tanh keeps its 4 outputs, which the next layer keeps too: 16 B more an example, 44 B."""
    deep = task(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    assert activation_bytes(deep, EXAMPLE, 100) == 4400
    wide = task(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 300), nn.Linear(300, 3)))
    assert activation_bytes(wide, EXAMPLE, 100) == 4400 + 100 * 300 * 4


@pytest.mark.parametrize(
    ("cache", "slots"), [(600, 7), (420, 7), (419, 4), (240, 4), (60, 1), (0, 1)]
)
def test_slots_within_a_cache(cache: int, slots: int) -> None:
    """A row of SGD has 60 bytes; 7 clients fill 6 slots in two waves, and so they fill 4."""
    assert slot_count(task(nn.Linear(4, 3)), rule(sgd()), 7, EXAMPLE, cache=cache) == slots


def test_wider_rows_take_fewer_slots() -> None:
    linear = task(nn.Linear(4, 3))
    assert slot_count(linear, rule(adam()), 100, EXAMPLE, cache=1800) == 10  # 180 bytes
    double = linear.to("cpu", torch.float64)
    assert slot_count(double, rule(adam()), 100, EXAMPLE, cache=1800) == 5


def test_slots_within_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 60, gradient 60, twice 5 * 28 of activations: 400 bytes a client.

    Free is what the driver has, and what torch has reserved but does not use: here 1,000 bytes.
    """
    linear = task(nn.Linear(4, 3))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 700)
    for fit in (1, 3, 50):
        free = int(400 * (fit + 0.5) / SHARE) - 1000
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * free))
        assert slot_count(linear, rule(sgd(), size=5), 100, EXAMPLE, cache=None) == fit
        assert slot_count(linear, rule(sgd(), size=5), 2, EXAMPLE, cache=None) == min(fit, 2)
    # 60 more of the row of an earlier pass, 120 of the gradient that it adds up and keeps.
    before = LocalRule(keep_gradient(), Batches(5, full=True), 0.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(5815 / SHARE) - 1000, 0))
    of_two = partial(slot_count, linear, rule(sgd(), size=5), 100, EXAMPLE, cache=None)
    assert (of_two(), of_two(before=before)) == (13, 10)  # 14 fit; 13 fill as few waves
