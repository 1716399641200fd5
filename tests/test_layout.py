"""The layout of a row: where each tensor sits, views that alias the row, and the way back."""

import copy

import pytest
import torch
from torch import Tensor, nn

from vecfl.errors import InputError
from vecfl.layout import Entry, Layout, freeze, restore


class Sample(nn.Module):
    """One of everything: a frozen, a 0-d, a tied and an empty parameter; three kinds of buffers."""

    constant: Tensor
    calls: Tensor
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.full((2,), 9.0), requires_grad=False)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.first = nn.Linear(3, 2)
        self.none = nn.Parameter(torch.empty(0, 4))
        self.second = nn.Linear(3, 2, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("constant", torch.tensor([7.0]))
        self.register_buffer("calls", torch.tensor(3))
        self.register_buffer("average", torch.tensor([[0.25, -1.5]]))
        with torch.no_grad():
            self.first.weight.copy_(torch.arange(1.0, 7.0).view(2, 3))
            self.first.bias.copy_(torch.tensor([-1.0, -2.0]))


CHANGING = ("average", "calls")
# gain (1), none (0), first.weight (2 x 3), first.bias (2), then calls (1) and average (1 x 2).
ROW = [0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -1.0, -2.0, 3.0, 0.25, -1.5]


@pytest.fixture
def module() -> Sample:
    return Sample()


@pytest.fixture
def layout(module: Sample) -> Layout:
    return Layout.of(module, CHANGING)


def test_where_each_tensor_sits(layout: Layout) -> None:
    # named_parameters gives a module's own parameters first, then those of its children.
    assert layout.params == (
        Entry("gain", (), 0, torch.float32),
        Entry("none", (0, 4), 1, torch.float32),
        Entry("first.weight", (2, 3), 1, torch.float32),
        Entry("first.bias", (2,), 7, torch.float32),
    )
    assert layout.buffers == (
        Entry("calls", (), 9, torch.int64),
        Entry("average", (1, 2), 10, torch.float32),
    )
    assert [e.size for e in layout.params] == [1, 0, 6, 2]
    assert layout.trainable == 9 and layout.size == 12


def test_buffers_that_do_not_change_have_no_place(module: Sample) -> None:
    layout = Layout.of(module)
    assert layout.buffers == () and layout.size == layout.trainable == 9
    assert layout.flatten(module).tolist() == ROW[:9]


def test_flatten_copies_the_module(module: Sample, layout: Layout) -> None:
    row = layout.flatten(module)
    assert row.tolist() == ROW and row.dtype == torch.float32 and not row.requires_grad
    row.zero_()
    assert layout.flatten(module).tolist() == ROW
    double = layout.flatten(copy.deepcopy(module).double())
    assert double.tolist() == ROW and double.dtype == torch.float64


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_views_alias_the_buffer(layout: Layout, leading: tuple[int, ...]) -> None:
    flat = torch.zeros(*leading, 12)
    views = layout.param_views(flat) + layout.buffer_views(flat)
    for i, view in enumerate(views):
        view.fill_(i + 1)
    row = [1] + 6 * [3] + 2 * [4] + [5] + 2 * [6]
    assert torch.equal(flat, torch.tensor(row, dtype=torch.float32).expand(*leading, 12))
    entries = layout.params + layout.buffers
    assert [view.shape for view in views] == [(*leading, *e.shape) for e in entries]
    flat.fill_(-1.0)
    assert all((view == -1).all() for view in views)


def test_a_view_of_one_row_reaches_that_row_alone(layout: Layout) -> None:
    flat = torch.zeros(4, 12)
    weight = layout.param_views(flat[2])[2]
    weight[1, 0] = 8.0  # first.weight begins at 1 and has rows of 3
    assert flat.nonzero().tolist() == [[2, 4]] and flat[2, 4] == 8


def test_parameter_views_take_rows_without_buffers(layout: Layout) -> None:
    momentum = torch.zeros(4, 9)
    layout.param_views(momentum)[3].fill_(1.0)  # first.bias
    assert momentum.sum(0).tolist() == [0.0] * 7 + [4.0] * 2


def test_unflatten_is_the_way_back(module: Sample, layout: Layout) -> None:
    tensors = layout.unflatten(layout.flatten(module))
    assert list(tensors) == ["gain", "none", "first.weight", "first.bias", "calls", "average"]
    state = module.state_dict()
    for name, tensor in tensors.items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name


def test_a_row_makes_another_module_equal(module: Sample, layout: Layout) -> None:
    other = Sample()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    other.load_state_dict(layout.unflatten(layout.flatten(module)), strict=False)
    assert torch.equal(other.second.weight, module.first.weight)  # tied: there under one name
    assert other.calls == 3 and other.average.tolist() == [[0.25, -1.5]]
    assert other.frozen.tolist() == [0.0, 0.0] and other.constant.tolist() == [0.0]


def test_unflatten_rounds_integers_and_nothing_else(layout: Layout) -> None:
    # The mean of 3 and 4 calls is 3.5 and of 2 and 3 is 2.5: both go to the even neighbour.
    row = torch.tensor(ROW)
    for mean, rounded in ((3.5, 4), (2.5, 2), (2.4, 2), (-1.6, -2)):
        row[9] = mean
        tensors = layout.unflatten(row)
        assert tensors["calls"].dtype == torch.int64 and tensors["calls"].item() == rounded
        assert tensors["gain"].item() == 0.5 and tensors["average"].tolist() == [[0.25, -1.5]]
        assert row[9] == torch.tensor(mean)  # the row keeps its mean


def test_round_integers_writes_into_the_row(layout: Layout) -> None:
    row = torch.tensor(ROW, dtype=torch.float64)
    row[9] = 3.7
    layout.round_integers_(row)
    assert row.tolist() == ROW[:9] + [4.0, 0.25, -1.5]


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [(torch.int64, 2.6, 3), (torch.uint8, 254.7, 255), (torch.bool, 0.6, True)],
)
def test_restore_gives_what_the_module_expects(
    dtype: torch.dtype, value: float, expected: int
) -> None:
    restored = restore(Entry("calls", (), 0, dtype), torch.tensor(value))
    assert restored.dtype == dtype and restored.item() == expected


def test_restore_leaves_floats_in_the_dtype_of_the_row() -> None:
    value: Tensor = torch.tensor(2.6, dtype=torch.float64)
    assert restore(Entry("average", (), 0, torch.float32), value) is value


def test_frozen_parameters_are_left_out() -> None:
    """By part of the name; of a tied parameter either name will do, and it has both."""
    for pattern, names, left in (
        ("bias$", ["first.bias"], ["gain", "none", "first.weight"]),
        ("^second", ["second.weight"], ["gain", "none", "first.bias"]),
        ("weight", ["first.weight", "second.weight"], ["gain", "none", "first.bias"]),
        ("frozen|gain", ["frozen", "gain"], ["none", "first.weight", "first.bias"]),
    ):
        sample = Sample()
        assert freeze(sample, pattern) == names
        assert [e.name for e in Layout.of(sample).params] == left
        assert not sample.frozen.requires_grad


def test_what_cannot_be_frozen() -> None:
    sample = Sample()
    names = "frozen, gain, none, first.weight, first.bias, second.weight"
    for pattern, said in (
        ("third", f"freeze('third'): no parameter is called so; there are {names}"),
        ("", "freeze(''): nothing would remain to train"),
        ("gain|none|first", "freeze('gain|none|first'): nothing would remain to train"),
        (
            "(",
            "freeze('('): no regular expression: missing ), unterminated subpattern at position 0",
        ),
    ):
        with pytest.raises(InputError) as caught:
            freeze(sample, pattern)
        assert str(caught.value) == said
        assert [e.name for e in Layout.of(sample).params][0] == "gain"  # all is as it was
        assert sample.first.bias.requires_grad
