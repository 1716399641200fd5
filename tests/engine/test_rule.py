"""The local rule by hand: clipping, the pull to the anchor, the correction, and their order."""

import math

import pytest
import torch
from torch import Tensor

from vecfl.engine.rule import LocalRule, accumulate_, apply_, clip_rows, make_update, mean_weight
from vecfl.errors import InputError
from vecfl.optim import Rows, momentum, sgd
from vecfl.schedule import Batches
from vecfl.within_round import within_round

BATCHES = Batches(4)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rows(*w: Tensor, bias: list[Tensor] | None = None, full: bool = False) -> Rows:
    total = [torch.zeros_like(t) for t in w] if full else None
    count = torch.zeros(len(w[0]), dtype=torch.float64) if full else None
    return Rows(list(w), [], bias, total, count, None)


# ------------------------------------------------------------------ clipping


@pytest.mark.parametrize(
    "rule, plain",
    [
        (LocalRule(sgd(), BATCHES, lr=0.5), 0.5),
        (LocalRule(sgd(), BATCHES, lr=0.5, clip=1.0), None),
        (LocalRule(sgd(), BATCHES, lr=0.5, mu=0.1), None),
        (LocalRule(sgd(), BATCHES, lr=0.5, bias=True), None),
        (LocalRule(momentum(), BATCHES, lr=0.5), None),
        (LocalRule(sgd(), BATCHES, lr=0.5, statistics=True), None),
        (LocalRule(sgd(0.1), BATCHES, lr=0.5), None),
        (LocalRule(within_round(sgd(), lambda step: 0.5**step), BATCHES, lr=0.5), None),
    ],
)
def test_only_sgd_without_corrections_is_plain(rule: LocalRule, plain: float | None) -> None:
    assert make_update(rule, [torch.zeros(1)], 0).plain == plain


def test_clip_uses_the_norm_over_all_parameters_of_a_row() -> None:
    """Row 0: (3, 4; 0; 12) has norm 13, row 1: (0, 3; 4; 0) norm 5, row 2 nothing, row 3 norm 1."""
    matrix = torch.tensor([[[3, 4]], [[0, 3]], [[0, 0]], [[0.6, 0]]], dtype=torch.float64)
    grads = [matrix, doubles(0, 4, 0, 0.8), doubles(12, 0, 0, 0).view(4, 1, 1)]
    a, b, c = clip_rows(grads, 6.5)
    assert a[0].tolist() == [[1.5, 2]] and b[0] == 0 and c[0].item() == 6
    for before, after in zip(grads, (a, b, c), strict=True):
        assert torch.equal(after[1:], before[1:])  # 5 and less: as they were, zero stays zero
    clipped = clip_rows(grads, 1.0)
    squares = sum(g.reshape(4, -1).square().sum(1) for g in clipped)
    torch.testing.assert_close(squares, doubles(1, 1, 0, 1))
    assert clipped[1][1].item() == pytest.approx(4 / 5)


def test_an_infinite_limit_is_the_identity() -> None:
    grads = [doubles(3, 0, 1e-300), torch.full((3, 2), 1e9, dtype=torch.float64)]
    grads[1][1] = 0
    assert all(map(torch.equal, clip_rows(grads, math.inf), grads))


def test_a_row_that_is_not_finite_does_not_reach_the_others() -> None:
    a, b = clip_rows([doubles(math.nan, 3, math.inf), doubles(1, 4, 1)], 1.0)
    assert (a[1].item(), b[1].item()) == pytest.approx((0.6, 0.8))
    assert b[0].isnan() and a[2].isnan()


# ------------------------------------------------------------------ clip, pull, correct, step


def test_the_order_is_clip_pull_bias() -> None:
    """w = (5, 1), anchor (1, 1), g = (6, 8), clip 5, mu 0.5, bias (1, -1), lr 0.1.

    Clipped: (3, 4). Pulled: 0.5 (4, 0) added: (5, 4). Corrected: (6, 3). w = (4.4, 0.7).
    Clipping last would give a g of norm 5; pulling before clipping 5 (8, 8) / 11.3.
    """
    rule = LocalRule(sgd(), BATCHES, lr=0.1, clip=5.0, mu=0.5, bias=True)
    w = torch.tensor([[5, 1]], dtype=torch.float64)
    bias = torch.tensor([[1, -1]], dtype=torch.float64)
    grad = torch.tensor([[6, 8]], dtype=torch.float64)
    update = make_update(rule, [doubles(1, 1)], round=0)
    update(rows(w, bias=[bias]), [grad])
    torch.testing.assert_close(w, torch.tensor([[4.4, 0.7]], dtype=torch.float64))
    assert grad.tolist() == [[6, 8]] and bias.tolist() == [[1, -1]]


def test_each_row_is_pulled_from_where_it_is() -> None:
    """lr 1, mu 0.25, no gradient: w - (w - anchor) / 4, parameter by parameter."""
    rule = LocalRule(sgd(), BATCHES, lr=1.0, mu=0.25)
    w, scalar = torch.tensor([[4.0, 0.0], [8.0, -4.0]]), torch.tensor([1.0, 5.0])
    update = make_update(rule, [torch.tensor([0.0, 4.0]), torch.tensor(1.0)], round=0)
    update(rows(w, scalar), [torch.zeros_like(w), torch.zeros_like(scalar)])
    assert w.tolist() == [[3, 1], [6, -2]] and scalar.tolist() == [1, 4]


def test_plain_rule_is_the_optimizer_alone() -> None:
    w = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    make_update(LocalRule(sgd(), BATCHES, lr=0.5), [torch.zeros(2)], 0)(
        rows(w), [torch.tensor([[2.0, 0.0], [0.0, -2.0]])]
    )
    assert w.tolist() == [[0, 2], [3, 5]]


def test_the_learning_rate_follows_the_round() -> None:
    rule = LocalRule(sgd(), BATCHES, lr=lambda t: 1 / (1 + t))
    assert [rule.lr_of(t) for t in (0, 1, 3)] == [1, 0.5, 0.25]
    assert LocalRule(sgd(), BATCHES, lr=0.3).lr_of(7) == 0.3
    for t, expected in (0, -1), (1, 0), (3, 0.5):  # w = 1, g = 2
        w = torch.tensor([[1.0]])
        make_update(rule, [torch.zeros(1)], t)(rows(w), [torch.tensor([[2.0]])])
        assert w.item() == expected


# ------------------------------------------------------------------ accumulation


def test_accumulate_and_apply() -> None:
    """Row 0: sums 3 and 5 with weights 1 and 3 are a mean of 2; row 1: sums 6, 0 and weight 2: 3.

    lr 0.1 moves row 0 by 0.2 and row 1 by 0.3, and totals start anew.
    """
    w = doubles(1, 1)
    r = rows(w, full=True)
    accumulate_(r, [doubles(3, 6)], doubles(1, 2))
    accumulate_(r, [doubles(5, 0)], doubles(3, 0))
    assert r.total is not None and r.count is not None
    assert r.total[0].tolist() == [8, 6] and r.count.tolist() == [4, 2]
    assert w.tolist() == [1, 1]
    apply_(r, make_update(LocalRule(sgd(), BATCHES, lr=0.1), [doubles(0)], 0))
    torch.testing.assert_close(w, doubles(0.8, 0.7))
    assert r.total[0].tolist() == [0, 0] and r.count.tolist() == [0, 0]


def test_clipping_sees_the_mean_of_what_was_accumulated() -> None:
    """(30, 40) over weight 2 is (15, 20) of norm 25; clipped to 5 it is (3, 4), times lr 1."""
    w = torch.zeros(1, 2, dtype=torch.float64)
    r = rows(w, full=True)
    accumulate_(r, [torch.tensor([[30, 40]], dtype=torch.float64)], doubles(2))
    apply_(r, make_update(LocalRule(sgd(), BATCHES, lr=1.0, clip=5.0), [doubles(0, 0)], 0))
    torch.testing.assert_close(w, torch.tensor([[-3, -4]], dtype=torch.float64))


def test_what_has_no_weight_moves_nothing() -> None:
    w = doubles(1, 2)
    r = rows(w, full=True)
    accumulate_(r, [doubles(0, 9)], doubles(0, 0))
    apply_(r, make_update(LocalRule(sgd(), BATCHES, lr=0.1), [doubles(0)], 0))
    assert w.tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_weight(dtype: torch.dtype) -> None:
    factor = mean_weight(torch.tensor([4, 0.5, 0, 1e-30], dtype=dtype))
    assert factor[:3].tolist() == [0.25, 2, 0] and factor[3].item() == pytest.approx(1e30)
    assert factor.dtype == dtype


# ------------------------------------------------------------------ validation


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip": 0.0}, "clip must be positive or None, not 0.0"),
        ({"clip": -1}, "clip must be positive or None, not -1"),
        ({"clip": math.nan}, "clip must be positive or None, not nan"),
        ({"mu": -0.1}, "mu must be at least 0, not -0.1"),
        ({"mu": math.nan}, "mu must be at least 0, not nan"),
        ({"lr": -1e-3}, "lr must be at least 0 and finite, not -0.001"),
        ({"lr": math.nan}, "lr must be at least 0 and finite, not nan"),
    ],
)
def test_rules_that_make_no_sense_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        LocalRule(**({"optimizer": momentum(), "batches": BATCHES, "lr": 0.1} | fields))
    assert str(error.value) == message


def test_gradients_are_counted_after_the_clip_and_before_the_rest() -> None:
    """Row 0: (3, 4; 0), clipped to (0.6, 0.8; 0); row 1: (0.1, 0; -0.5). Pull and bias are of no
    account. A second step adds up."""
    rule = LocalRule(sgd(), BATCHES, lr=0.1, clip=1.0, mu=5.0, bias=True, statistics=True)
    w = [torch.zeros(2, 2).double(), torch.zeros(2).double()]
    found = torch.zeros(2, 3).double()
    r = Rows(w, [], [torch.ones_like(t) for t in w], None, None, None, found)
    update = make_update(rule, [torch.ones(2).double(), doubles(1).squeeze()], 0)
    grads = [torch.tensor([[3, 4], [0.1, 0]]).double(), doubles(0, -0.5)]
    for times in (1, 2):
        update(r, [g.clone() for g in grads])
        right = torch.tensor([[3, 1.4, 1.0], [3, -0.4, 0.26]]).double() * times
        torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-9)
