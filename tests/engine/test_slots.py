"""Slots: starting a client resets everything it will meet, and all views are of one memory."""

from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

from vecfl.engine import LocalRule, Slots
from vecfl.engine.rule import Statistics
from vecfl.errors import InputError
from vecfl.layout import Layout
from vecfl.optim import ClientOptimizer, Rows, adam, keep_gradient, momentum, sgd
from vecfl.schedule import Batches

CPU = torch.device("cpu")


class Net(nn.Module):
    """Rows of 6 + 1 parameters (the second has no dimensions) and 2 + 1 buffer entries."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(2, 3))
        self.gain = nn.Parameter(torch.zeros(()))
        self.register_buffer("trace", torch.zeros(2))
        self.register_buffer("calls", torch.tensor(0))


LAYOUT = Layout.of(Net(), ["trace", "calls"])
TRAINABLE, P, S = 7, 10, 4


def make(
    optimizer: ClientOptimizer | None = None, *, full: bool = True, bias: bool = True
) -> Slots:
    batches = Batches(2, full=full)
    rule = LocalRule(optimizer or adam(), batches, lr=0.1, bias=bias, statistics=bias)
    return Slots(LAYOUT, rule, S, CPU, torch.float64)


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor that an object of slots reaches."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, Rows | Statistics):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def memory(slots: Slots) -> dict[int, Tensor]:
    """The tensors [S, ...] of a slots object that hold its memory, whatever their names are."""
    found = (t for value in vars(slots).values() for t in tensors_in(value))
    owned = {t.untyped_storage().data_ptr(): t._base if t._is_view() else t for t in found}
    return {pointer: t for pointer, t in owned.items() if t is not None}


def test_shapes_and_what_a_rule_needs() -> None:
    slots = make()
    assert slots.flat.shape == (S, P) and slots.sums.shape == (S, 2) and slots.seen.shape == (S,)
    assert [t.shape for t in slots.state] == [(S, TRAINABLE)] * 2
    assert slots.bias is not None and slots.bias.shape == (S, TRAINABLE)
    assert slots.total is not None and slots.total.shape == (S, TRAINABLE)
    assert slots.count is not None and slots.count.shape == (S,)
    assert slots.steps is not None and slots.steps.dtype == torch.float32
    assert slots.sums.dtype == torch.float64 and slots.seen.dtype == torch.int64
    assert slots.flat.dtype == torch.float64 and len(memory(slots)) == 10
    plain = make(sgd(), full=False, bias=False)
    assert (plain.bias, plain.total, plain.count, plain.steps, plain.state) == (None,) * 4 + ([],)
    assert len(memory(plain)) == 3  # flat, sums, seen
    assert len(make(momentum()).state) == len(make(keep_gradient()).state) == 1


def test_rows_begin_on_cache_lines_of_64_bytes() -> None:
    slots = make()
    assert slots.flat.data_ptr() % 64 == 0 and slots.flat.stride() == (16, 1)  # for P = 10


def test_start_resets_everything_a_slot_has() -> None:
    """With rubbish in all memory, slots 1 and 3 start: they are as in fresh slots, no other is."""
    model, bias = torch.arange(2.0 * P).view(2, P).double(), torch.ones(2, TRAINABLE).double()
    seats = torch.tensor([3, 1])
    slots, fresh = make(), make()
    for t in (*memory(slots).values(), *memory(fresh).values()):
        t.fill_(77)
    fresh.start_(torch.arange(S), torch.zeros(P).double(), torch.zeros(S, TRAINABLE).double())
    for s in (slots, fresh):
        s.start_(seats, model, bias)
    pairs = list(zip(memory(slots).values(), memory(fresh).values(), strict=True))
    assert len(pairs) == 10
    for used, new in pairs:
        assert torch.equal(used[[1, 3]], new[[1, 3]])
        assert (used[[0, 2]] == 77).all()
    assert torch.equal(slots.flat[3], model[0]) and torch.equal(slots.flat[1], model[1])
    assert slots.bias is not None and (slots.bias[1] == 1).all()


def test_one_model_for_all_that_start() -> None:
    slots, model = make(sgd(), full=False, bias=False), torch.arange(float(P)).double()
    slots.start_(torch.tensor([0, 2]), model, None)
    assert torch.equal(slots.flat[[0, 2]], model.expand(2, P)) and not slots.flat[[1, 3]].any()
    model += 1
    assert slots.flat[0, 0] == 0  # the row is a copy


def test_a_rule_with_bias_needs_one() -> None:
    with pytest.raises(InputError) as error:
        make().start_(torch.tensor([0]), torch.zeros(P).double(), None)
    assert str(error.value) == "the rule has a bias, but the algorithm's begin gives none"


def test_views_are_of_the_same_memory() -> None:
    slots = make()
    slots.all.w[0][2] = torch.arange(6.0).view(2, 3)
    slots.model[2][1].fill_(6)  # no dimensions
    slots.buffers[0][2] = torch.tensor([7, 8])
    slots.buffers[1][2] = 9
    assert slots.flat[2].tolist() == list(range(10)) and not slots.flat[[0, 1, 3]].any()
    assert slots.one[2].w[0].shape == (1, 2, 3) and slots.one[2].w[1].tolist() == [6]
    slots.all.state[1][1][3] = 4
    assert slots.state[1][3].tolist() == [0] * 6 + [4] and not slots.state[0].any()
    for wide, narrow in zip(tensors_in(slots.all), tensors_in(slots.one[1]), strict=True):
        narrow.fill_(5)
        assert (wide[1] == 5).all() and not (wide[0] == 5).any()
    assert {t.untyped_storage().data_ptr() for t in tensors_in([slots.all, slots.one])} < set(
        memory(slots)
    )
