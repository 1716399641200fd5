"""Sums and weights per example, against numbers worked out on paper and torch.nn.functional."""

import math

import pytest
import torch
import torch.nn.functional as F

from vecfl.errors import InputError
from vecfl.losses import accuracy, check_labels, cross_entropy, squared_error

# The softmax of [0, log 3] is [1/4, 3/4]; of [0, 0] it is [1/2, 1/2].
SURE, OPEN = [0.0, math.log(3)], [0.0, 0.0]
LOG2, LOG4, LOG4_3 = math.log(2), math.log(4), math.log(4 / 3)


def test_cross_entropy_of_classes() -> None:
    output = torch.tensor([SURE, SURE, OPEN])
    value, weight = cross_entropy(output, {"y": torch.tensor([0, 1, 1])})
    torch.testing.assert_close(value, torch.tensor([LOG4, LOG4_3, LOG2]))
    assert weight is None


def test_cross_entropy_of_sequences_counts_labelled_positions() -> None:
    output = torch.tensor([[SURE, SURE, OPEN], [OPEN, SURE, OPEN]])
    value, weight = cross_entropy(output, {"y": torch.tensor([[0, -100, 1], [-100] * 3])})
    torch.testing.assert_close(value, torch.tensor([LOG4 + LOG2, 0.0]))
    assert weight is not None and weight.dtype == output.dtype and weight.tolist() == [2, 0]


def test_cross_entropy_agrees_with_torch() -> None:
    g = torch.Generator().manual_seed(0)
    output = torch.randn(4, 5, 3, 7, generator=g, dtype=torch.float64)
    y = torch.randint(7, (4, 5, 3), generator=g)
    y[torch.rand(4, 5, 3, generator=g) < 0.4] = -100
    value, weight = cross_entropy(output, {"y": y})
    assert weight is not None and value.shape == weight.shape == (4,)
    for i in range(4):
        whole = F.cross_entropy(output[i].flatten(0, 1), y[i].flatten(), reduction="sum")
        torch.testing.assert_close(value[i], whole)
        assert weight[i] == (y[i] >= 0).sum()
    mean = F.cross_entropy(output.flatten(0, 2), y.flatten())
    torch.testing.assert_close(value.sum() / weight.sum(), mean)
    plain, none = cross_entropy(output[:, 0, 0], {"y": y[:, 0, 0].clamp(min=0)})
    expected = F.cross_entropy(output[:, 0, 0], y[:, 0, 0].clamp(min=0), reduction="none")
    assert torch.equal(plain, expected) and none is None


def test_an_example_without_labels_has_gradient_zero() -> None:
    output = torch.tensor([[SURE, OPEN], [SURE, OPEN]], requires_grad=True)
    value, _ = cross_entropy(output, {"y": torch.tensor([[-100, -100], [0, -100]])})
    value.sum().backward()
    # softmax minus one-hot at the one labelled position: [1/4 - 1, 3/4]
    expected = [[[0, 0], [0, 0]], [[-0.75, 0.75], [0, 0]]]
    torch.testing.assert_close(output.grad, torch.tensor(expected))


def test_accuracy() -> None:
    output = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.2, 0.1], [0.0, 0.0, 2.0]])
    value, weight = accuracy(output, {"y": torch.tensor([1, 1, 2])})
    assert value.tolist() == [1, 0, 1] and value.dtype == output.dtype and weight is None
    value, weight = accuracy(output[None], {"y": torch.tensor([[1, -100, 0]])})
    assert weight is not None and (value.tolist(), weight.tolist()) == ([1], [2])


def test_squared_error_is_half_and_summed_over_an_example() -> None:
    value, weight = squared_error(torch.tensor([3.0, 1.0]), {"y": torch.tensor([1.0, 1.0])})
    assert value.tolist() == [2, 0] and weight is None
    output = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 2.0]]])
    value, weight = squared_error(output, {"y": torch.zeros(2, 2, 2)})
    assert value.tolist() == [15, 2] and weight is None  # (1 + 4 + 9 + 16) / 2 and 4 / 2


def test_labels_that_fit_and_that_do_not() -> None:
    assert cross_entropy.check is check_labels
    check_labels(torch.zeros(1, 3), {"y": torch.tensor([0, 2, 1])})
    check_labels(torch.zeros(1, 2, 3), {"y": torch.tensor([[0, -100], [2, 1]])})
    for y, label, example in ([0, 3], 3, 1), ([-100, 0], -100, 0), ([[0, 1], [1, -1]], -1, 1):
        with pytest.raises(InputError) as error:
            check_labels(torch.zeros(2, 3), {"y": torch.tensor(y)})
        assert str(error.value) == (
            f"column 'y': label {label} of example {example} is out of range: "
            "the model has 3 outputs, so labels are 0 to 2"
        )
    with pytest.raises(InputError, match="'y' is torch.float64; cross_entropy needs integer"):
        check_labels(torch.zeros(2, 3), {"y": torch.zeros(2, dtype=torch.float64)})


def test_labels_of_another_shape_are_refused_with_both_shapes() -> None:
    output = torch.zeros(4, 3)
    for score in (cross_entropy, accuracy):
        with pytest.raises(InputError) as error:
            score(output, {"y": torch.zeros(4, 1, dtype=torch.int64)})
        assert str(error.value).startswith("output [4, 3] does not fit labels 'y' [4, 1]: output")
    with pytest.raises(InputError) as error:
        squared_error(torch.zeros(4, 1), {"y": torch.zeros(4)})
    assert str(error.value) == (
        "output [4, 1] and column 'y' [4] differ in shape; "
        "for one number per example end the module with nn.Flatten(0)"
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    output, y = torch.eye(3), torch.tensor([0, 1, 0])
    value, _ = cross_entropy(output, {"y": y.to(dtype)})
    torch.testing.assert_close(value, F.cross_entropy(output, y, reduction="none"))
    assert accuracy(output, {"y": y.to(dtype)})[0].tolist() == [1, 1, 0]


@pytest.mark.parametrize("classes", [3, 100])  # below and above where vmap takes another formula
def test_cross_entropy_is_the_same_under_vmap(classes: int) -> None:
    z = torch.zeros(2, 4, classes)
    z[..., 0], z[1, :, 1] = 1000.0, -1000.0  # as sums of exponentials these overflow
    y = torch.tensor([[0, 1, 2, -100], [0, 1, 2, -100]])
    found = torch.func.vmap(lambda z, y: cross_entropy(z, {"y": y})[0])(z, y)
    assert found.tolist() == [[0.0, 1000.0, 1000.0, 0.0], [0.0, 2000.0, 1000.0, 0.0]]
    assert found.tolist() == [
        cross_entropy(a, {"y": b})[0].tolist() for a, b in zip(z, y, strict=True)
    ]
