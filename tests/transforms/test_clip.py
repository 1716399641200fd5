"""Clipping of what clients send: values on paper, and bounds that hold for any numbers."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vecfl
from vecfl.algorithms import Algorithm, Finished, Round, Upload
from vecfl.errors import InputError
from vecfl.layout import Entry, Layout
from vecfl.transforms.clip import clip_rows

from ..oracles.bridge import dataset
from ..oracles.tasks import PROBLEMS
from ..oracles.tiny import FAR, PLAIN, STEEP, Line, Tracked, client, squared

TYPES = (torch.float32, torch.float64)
ONE = vecfl.Batches(4)


def exact(row: Tensor) -> float:
    """The norm of a row in float64, of numbers of any size: squares are added up by halves of 2."""
    values = row.double().tolist()
    largest = max(map(abs, values))
    if not largest:
        return 0.0
    return math.ldexp(
        math.sqrt(math.fsum(math.ldexp(v, -math.frexp(largest)[1]) ** 2 for v in values)),
        math.frexp(largest)[1],
    )


def number(dtype: torch.dtype) -> st.SearchStrategy[float]:
    return st.floats(
        -1e300 if dtype == torch.float64 else -(2.0**126),
        1e300 if dtype == torch.float64 else 2.0**126,
        width=64 if dtype == torch.float64 else 32,
    )


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_no_norm_is_above_the_bound(dtype: torch.dtype) -> None:
    tiny = 5e-324 if dtype == torch.float64 else 2.0**-149

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(number(dtype), min_size=1, max_size=9),
        st.floats(2.0**-1000, 1e30) | st.floats(2.0**-160, 2.0**-120) | st.just(5e-324),
    )
    @example([0.0, -0.0], 1.0)
    @example([1e30, -1e30, 1.0], 1e-10)
    @example([tiny] * 4, 2.5 * tiny)
    @example([tiny, 1.0], 1.5 * tiny)
    @example([1e30] * 9, 1e30)
    def holds(values: list[float], limit: float) -> None:
        row = torch.tensor([values], dtype=dtype)
        after, norm, over = clip_rows(row, limit)
        before = exact(row[0])
        assert exact(after[0]) <= limit
        assert norm.item() == pytest.approx(before, rel=2e-7)
        if not over:
            assert torch.equal(after, row) and before <= limit
            return
        assert before > limit * (1 - 1e-6)
        if limit > 1e-30:  # no more is lost than was said
            assert exact(after[0]) >= limit * (1 - 1e-6)
        assert (after * row >= 0).all()

    holds()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [10_000, 1_000_001])
def test_long_rows_keep_their_bound(dtype: torch.dtype, size: int) -> None:
    """A third is rounded in every entry alike, upwards in float32: errors do not cancel."""
    rows = torch.stack((torch.full((size,), 1 / 3), torch.linspace(-1, 1, size))).to(dtype)
    for limit in (1.0, 1 / 3, 1e-3):
        after, _, over = clip_rows(rows, limit)
        assert over.all() and (after.double().norm(dim=1) <= limit).all()
        assert (after.double().square().flip(1).cumsum(1)[:, -1].sqrt() <= limit).all()
        assert (after.double().norm(dim=1) >= limit * (1 - 1e-6)).all()


def test_rows_by_hand() -> None:
    """(3, 4) has norm 5: at most 1 is (0.6, 0.8). (0, 0.5) stays, and so does nothing."""
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.5], [0.0, 0.0]], dtype=torch.float64)
    after, norm, over = clip_rows(rows, 1.0)
    assert norm.tolist() == [5, 0.5, 0] and over.tolist() == [True, False, False]
    torch.testing.assert_close(after[0], torch.tensor([0.6, 0.8]).double(), rtol=1e-7, atol=0)
    assert torch.equal(after[1:], rows[1:])


def test_a_row_that_is_not_finite_stays_so_and_reaches_no_other() -> None:
    rows = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [3.0, 4.0]])
    after, _, _ = clip_rows(rows, 1.0)
    assert not after[:2].isfinite().all(1).any() and after[2].tolist() == pytest.approx([0.6, 0.8])
    after, _, over = clip_rows(rows, math.inf)
    assert not after[:2].isfinite().all(1).any() and not over[2]


def test_squares_that_float64_cannot_hold() -> None:
    """The norm of four times 1e308 is 2e308, more than float64 holds: half of 1e308 for each."""
    rows = torch.full((1, 4), 1e308, dtype=torch.float64)
    after, _, over = clip_rows(rows, 1e308)
    assert over and after.tolist()[0] == pytest.approx([0.5e308] * 4)
    small = torch.full((1, 4), 1e-200, dtype=torch.float64)
    after, norm, _ = clip_rows(small, 1e-200)
    assert norm.item() == pytest.approx(2e-200) and after.tolist()[0] == pytest.approx([5e-201] * 4)


LAYOUT = Layout(
    (Entry("a", (2,), 0, torch.float64), Entry("b", (), 2, torch.float64)),
    (Entry("c", (1,), 3, torch.float64),),
)


def clipped(transform: vecfl.Transform, update: Tensor, weight: list[float]) -> Upload:
    zeros = torch.zeros(len(update), dtype=torch.int64)
    double = zeros.double()
    columns = (zeros, zeros, zeros, double, double, zeros)
    done = Finished(Round(0, 0, LAYOUT), update, [], None, *columns)
    transform.init(LAYOUT)
    sent = Upload(update, torch.tensor(weight).double(), log_weight=double - 3)
    return transform.client({}, done, sent)


def test_layers_by_hand() -> None:
    """Three tensors, (3, 4), 0.1 and 12, of norm 13.0004 together. sqrt(3) for all is 1 for each:
    (0.6, 0.8), 0.1, 1; bounds 2.5, 1 and 6: (1.5, 2), 0.1, 6. A buffer is a tensor, too."""
    update = torch.tensor([[3, 4, 0.1, 12], [0, 0, 0, 0.5]], dtype=torch.float64)
    given: Mapping[str, float] = {"a": 2.5, "b": 1.0, "c": 6.0}
    right = {3**0.5: [0.6, 0.8, 0.1, 1], "given": [1.5, 2, 0.1, 6]}
    for key, first in right.items():
        transform = vecfl.clip_by_layer(given if key == "given" else float(key))
        sent = clipped(transform, update, [2.0, 0.0])
        assert sent.update[0].tolist() == pytest.approx(first) and sent.update[1, 3] == 0.5
        assert {name: values.tolist() for name, values in sent.extra.items()} == {
            "clients": [True, False],
            "clipped": [True, False],
            "norm": [pytest.approx((9 + 16 + 0.01 + 144) ** 0.5), 0],
        }
        assert sent.weight.tolist() == [2, 0]
        assert sent.log_weight is not None and sent.log_weight.tolist() == [-3, -3]
    assert update[0].tolist() == [3, 4, 0.1, 12]  # what came in is left alone
    flat = clipped(vecfl.clip_by_norm(1.3), update, [1.0, 1.0])
    scale = 1.3 / 169.01**0.5
    assert flat.update[0].tolist() == pytest.approx([3 * scale, 4 * scale, 0.1 * scale, 12 * scale])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-1e30, 1e30), min_size=4, max_size=4),
    st.floats(1e-10, 1e10),
)
def test_layers_together_keep_the_bound(values: list[float], limit: float) -> None:
    sent = clipped(vecfl.clip_by_layer(limit), torch.tensor([values]).double(), [1.0])
    assert exact(sent.update[0]) <= limit


def run(algorithm: Algorithm, *transforms: vecfl.Transform, **kind: Any) -> tuple[Any, Any]:
    """The model and metrics after a round of FAR, of three STEEPs and of nobody."""
    clients = [client(FAR), client(STEEP, STEEP, STEEP), client()]
    data = dataset(clients)
    module = kind.pop("module", Line)()
    task = vecfl.Task(module, squared, example=data.examples(2))
    how = {"backend": "loop", "dtype": torch.float64} | kind
    chained = vecfl.chain(algorithm, *transforms)
    sim = vecfl.Simulation(task, data, chained, vecfl.everyone(), **how)
    state, metrics = sim.round(sim.start())
    return sim.state_dict(state), metrics


def test_metrics_by_hand() -> None:
    """Updates -0.25, 1 and, of weight 0 by examples, 0: one of two is above 0.5; mean 0.625."""
    for how in ({}, {"backend": "vmap", "slots": 2}, {"workers": 2}, {"exact_sums": True}):
        _, metrics = run(vecfl.fedavg(lr=0.25, batches=ONE), vecfl.clip_by_norm(0.5), **how)
        assert (metrics["train/clipped"], metrics["train/norm"]) == (0.5, 0.625)
    uniform = vecfl.fedavg(lr=0.25, batches=ONE, weights=vecfl.uniform_weights)
    _, metrics = run(uniform, vecfl.clip_by_norm(0.5))
    assert metrics["train/clipped"] == pytest.approx(1 / 3)
    assert metrics["train/norm"] == pytest.approx(1.25 / 3)


def test_who_does_not_count_is_not_counted_as_clipped() -> None:
    """STEEP's update 1 is above 0.5, but its weight is 0: of one that counts none was clipped."""
    fedavg = vecfl.fedavg(
        lr=0.25, batches=ONE, weights=lambda done: (done.loss < 1).double() * done.examples
    )
    for clip in (vecfl.clip_by_norm(0.5), vecfl.clip_by_layer(0.5)):
        _, metrics = run(fedavg, clip)
        assert metrics["train/clients"] == 1
        assert (metrics["train/clipped"], metrics["train/norm"]) == (0, 0.25)


def test_no_row_is_copied_where_none_is_over() -> None:
    """And what a row comes to does not depend on others that are."""
    rows = torch.randn(4, 9000, generator=torch.Generator().manual_seed(1))
    after, norm, over = clip_rows(rows, 1e3)
    assert after is rows and not over.any()
    beside = torch.cat((rows, rows[:1] * 1e6))
    scaled, norms, one = clip_rows(beside, 1e3)
    assert torch.equal(scaled[:4], rows) and torch.equal(norms[:4], norm)
    assert one.tolist() == [False] * 4 + [True]


def test_a_clip_after_a_clip_tells_of_itself() -> None:
    """Of norms 0.25 and 1 the first scales one to 0.5, the second both to 0.2."""
    clips = vecfl.clip_by_norm(0.5), vecfl.clip_by_norm(0.2)
    state, metrics = run(vecfl.fedavg(lr=0.25, batches=ONE), *clips)
    assert (metrics["train/clipped"], metrics["train/norm"]) == (0.5, 0.625)
    assert metrics["train/clipped.1"] == 1 and metrics["train/norm.1"] == pytest.approx(0.375)
    assert state["w"].item() == pytest.approx((1.2 + 3 * 0.8) / 4)


def test_nobody() -> None:
    algorithm = vecfl.chain(vecfl.fedavg(lr=0.25, batches=ONE), vecfl.clip_by_norm(1))
    data = dataset([client(FAR), client(FAR)])
    task = vecfl.Task(Line(), squared, example=data.examples(2))
    nobody = torch.zeros(0, dtype=torch.int64)
    sim = vecfl.Simulation(task, data, algorithm, lambda eligible, seed, round: nobody)
    _, metrics = sim.round(sim.start())
    assert math.isnan(metrics["train/clipped"]) and math.isnan(metrics["train/norm"])


def test_changing_buffers_are_part_of_the_message() -> None:
    """FAR: w 1 -> 1.25, calls 0 -> 1, trace 0 -> 0.5: the message (-0.25, -1, -0.5) has norm
    1.1456. STEEP: w 1 -> 0, calls and trace the same: (1, -1, -0.5), norm 1.5. At most 1.5:
    nothing happens. At most 0.75: the second is halved, (0.5, -0.5, -0.25), and the first scaled
    by 0.6547. The mean of calls would round."""
    fedavg = vecfl.fedavg(lr=0.25, batches=ONE)
    plain, _ = run(fedavg, module=Tracked)
    same, metrics = run(fedavg, vecfl.clip_by_norm(1.6), module=Tracked)
    assert same == plain and metrics["train/clipped"] == 0
    after, metrics = run(fedavg, vecfl.clip_by_norm(0.75), module=Tracked)
    scale = 0.75 / (0.0625 + 1 + 0.25) ** 0.5
    assert metrics["train/clipped"] == 1
    assert after["w"].item() == pytest.approx((1 + 0.25 * scale + 3 * 0.5) / 4)
    assert after["trace"].item() == pytest.approx((0.5 * scale + 3 * 0.25) / 4)
    assert after["calls"].item() == round((scale + 3 * 0.5) / 4)


@pytest.mark.parametrize("name", ["linear", "tokens", "buffers"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_an_infinite_norm_is_no_clip(name: str, dtype: torch.dtype) -> None:
    problem, models = PROBLEMS[name], []
    data = dataset(problem.clients())
    task = vecfl.Task(problem.build(), problem.loss, example=data.examples(2))
    plain = vecfl.fedavg(lr=0.1, batches=ONE)
    for clips in ([], [vecfl.clip_by_norm(math.inf)], [vecfl.clip_by_layer(math.inf)]):
        algorithm = vecfl.chain(plain, *clips)
        sim = vecfl.Simulation(task, data, algorithm, vecfl.everyone(), dtype=dtype, slots=3)
        models.append(sim.round(sim.start())[0].server["w"])
    assert torch.equal(models[0], models[1]) and torch.equal(models[0], models[2])


def test_bad_bounds() -> None:
    for build, name in ((vecfl.clip_by_norm, "norm"), (vecfl.clip_by_layer, "layer")):
        for bad in (0.0, -1.0, math.nan):
            with pytest.raises(InputError) as caught:
                build(bad)
            assert str(caught.value) == f"clip_by_{name}(norm) must be positive, not {bad}"
    plain, data = vecfl.fedavg(lr=0.25, batches=ONE), dataset([client(PLAIN)])
    for bounds, said in (
        ({"weight": 1.0}, "'bias' has no bound"),
        ({"weight": 1.0, "bias": 1.0, "c": 2.0}, "'c' is no parameter or changing buffer"),
    ):
        module = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1), nn.Flatten(0))
        task = vecfl.Task(module, squared, example=data.examples(2))
        inner = {f"1.{k}" if k != "c" else k: v for k, v in bounds.items()}
        algorithm = vecfl.chain(plain, vecfl.clip_by_layer(inner))
        sim = vecfl.Simulation(task, data, algorithm, vecfl.everyone(), backend="loop")
        with pytest.raises(InputError) as caught:
            sim.start()
        said = said.replace("bias", "1.bias")
        assert str(caught.value) == f"clip_by_layer(norm): {said}; give one for each"
    with pytest.raises(InputError, match="clip_by_layer\\(norm\\) must be positive, not -2"):
        vecfl.clip_by_layer({"a": -2})


def test_names_tell_runs_apart() -> None:
    assert vecfl.clip_by_norm(1).name == vecfl.clip_by_norm(1.0).name == "clip_by_norm 1.0"
    assert vecfl.clip_by_norm(0.12345678).name != vecfl.clip_by_norm(0.12345679).name
    assert vecfl.clip_by_layer({"a": 1}).name == "clip_by_layer {'a': 1}"
