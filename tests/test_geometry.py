"""Norms and cosines of updates: by hand, the sample, and what must not matter."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vecfl
from vecfl import Batches, InputError, Simulation, Task, everyone, fedavg
from vecfl.geometry import measure, sample, summary
from vecfl.gram import effective_rank, gram
from vecfl.mesh import Mesh
from vecfl.random import Kind, stream, words

from .oracles.bridge import dataset, recorded
from .oracles.tasks import PROBLEMS
from .oracles.tiny import SETTLED, STEEP, client, squared

WAYS: dict[str, dict[str, Any]] = {
    "loop": {"backend": "loop", "slots": 1},
    "loop, slots": {"backend": "loop", "slots": 3},
    "loop, workers": {"backend": "loop", "slots": 2, "workers": 2},
    "vmap": {"backend": "vmap", "slots": 2},
}


class Plane(nn.Module):
    """y = w x for x in the plane; w starts at (1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


def plane(*clients: tuple[float, float, float], **kind: Any) -> Simulation:
    """Clients of one example (x1, x2, y); one step with lr 1 sends the gradient (w x - y) x."""
    rows = [torch.tensor(c, dtype=torch.float32) for c in clients]
    columns = [{"x": r[None, :2].clone(), "y": r[2:].clone()} for r in rows]
    data = dataset(columns)
    task = Task(Plane(), squared, example=data.examples(2))
    algorithm = fedavg(lr=1.0, batches=Batches(1))
    return Simulation(task, data, algorithm, everyone(), dtype=torch.float64, **kind)


def update(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix("update/"): v for k, v in metrics.items() if k.startswith("update/")}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_norms_and_cosines_by_hand(way: dict[str, Any]) -> None:
    """w - w_k = (w x - y) x with w = (1, 1): (1, 0, -2) sends (3, 0), (0, 1, -3) sends (0, 4),
    (1, 0, 1) sends (0, 0). Equal weights: the mean is (1, 4/3), its norm sqrt(1 + 16/9) = 5/3.

    Norms 3, 4, 0: mean 7/3, sd sqrt((25 - 49/3) / 3) = sqrt(26) / 3, median 3. Cosines
    3 * 1 / (3 * 5/3) = 0.6 and 4 * 4/3 / (4 * 5/3) = 0.8; of (0, 0) there is none.

    The one pair without a zero is orthogonal. Diversity (9 + 16) / |(3, 4)|^2 = 1. Singular values
    are 3, 4 and 0: the effective rank is exp of the entropy of 3/7 and 4/7.
    """
    sim = plane((1, 0, -2), (0, 1, -3), (1, 0, 1), statistics=64, **way)
    state, metrics = sim.round(sim.start())
    assert update(metrics) == pytest.approx(
        {"norm_mean": 7 / 3, "norm_sd": math.sqrt(26) / 3, "norm_min": 0}
        | {"norm_p50": 3, "norm_max": 4, "aggregate_norm": 5 / 3, "sampled": 2}
        | {"cosine_mean": 0.7, "cosine_sd": 0.1, "cosine_min": 0.6}
        | {"cosine_p50": 0.7, "cosine_max": 0.8}
        | {f"pairwise_cosine_{k}": 0 for k in ("mean", "sd", "min", "p50", "max")}
        | {"diversity": 1, "effective_rank": (3 / 7) ** (-3 / 7) * (4 / 7) ** (-4 / 7)}
    )
    last = sim.geometry.last
    assert last is not None and last.mean is not None
    assert last.mean.tolist() == pytest.approx([1, 4 / 3])
    assert last.norm.tolist() == pytest.approx([3, 4, 0])
    assert last.products.tolist() == pytest.approx(np.diag([9.0, 16, 0]))
    np.testing.assert_allclose(last.cosine, [0.6, 0.8, math.nan])
    rows = dict(zip(last.at.tolist(), last.rows, strict=True))
    assert {place: row.tolist() for place, row in rows.items()} == {0: [3, 0], 1: [0, 4], 2: [0, 0]}
    norms = sim.client_results(state)["update_norm"]
    assert norms.tolist() == pytest.approx([3, 4, 0])


def test_the_mean_is_the_weighted_one() -> None:
    """A client with two equal examples in one batch sends (0, 4), too, with twice the weight: the
    mean of (3, 0) and twice (0, 4) is (1, 8/3): cosines 1 and 8/3 over sqrt(1 + 64/9)."""
    two = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    data = dataset(
        [
            {"x": torch.tensor([[1.0, 0.0]]), "y": torch.tensor([-2.0])},
            {"x": two, "y": torch.tensor([-3.0, -3.0])},
        ]
    )
    task = Task(Plane(), squared, example=data.examples(2))
    algorithm = fedavg(lr=1.0, batches=Batches(2))
    kind = {"dtype": torch.float64, "backend": "loop", "statistics": 2}
    _, metrics = (sim := Simulation(task, data, algorithm, everyone(), **kind)).round(sim.start())
    length = math.sqrt(1 + 64 / 9)
    assert metrics["update/aggregate_norm"] == pytest.approx(length)
    assert metrics["update/cosine_min"] == pytest.approx(1 / length)
    assert metrics["update/cosine_max"] == pytest.approx(8 / 3 / length)


def test_nothing_is_measured_unless_it_is_asked_for() -> None:
    sim = plane((1, 0, -2), (0, 1, -3), backend="loop")
    state, metrics = sim.round(sim.start())
    assert not update(metrics) and sim.geometry.last is None
    assert "update_norm" not in sim.client_results(state)


@pytest.mark.parametrize("size", [-1, 1.5, True, "64"])
def test_a_sample_has_a_size(size: Any) -> None:
    with pytest.raises(InputError) as caught:
        plane((1, 0, -2), (0, 1, -3), statistics=size)
    assert str(caught.value) == (
        f"statistics: expected a number of clients, 0 for none, got {size!r}"
    )


def test_a_client_that_is_not_finite_has_no_norm() -> None:
    """Nor has one without weight; the others are (3, 0) alone."""
    sim = plane((1, 0, -2), (0, 1, math.nan), statistics=4, backend="vmap")
    state, metrics = sim.round(sim.start())
    assert (metrics["train/dropped_clients"], metrics["update/sampled"]) == (1, 1)
    assert metrics["update/norm_min"] == metrics["update/norm_max"] == pytest.approx(3)
    np.testing.assert_allclose(sim.client_results(state)["update_norm"], [3, math.nan])


def test_a_round_without_an_update_has_no_geometry() -> None:
    sim = plane((1, 0, math.nan), (0, 1, math.nan), statistics=4, backend="loop")
    _, metrics = sim.round(sim.start())
    assert metrics.pop("update/sampled") == 0
    assert all(math.isnan(value) for value in update(metrics).values())
    empty = Simulation(
        sim.task,
        sim.data,
        sim.algorithm,
        lambda eligible, seed, round: torch.empty(0, dtype=torch.int64),
        backend="loop",
        statistics=4,
    )
    assert empty.round(empty.start())[1]["update/sampled"] == 0


def simulate(size: int, **kind: Any) -> Simulation:
    """Eleven ragged clients, some without examples and some twice in the cohort."""
    p = PROBLEMS["mlp"]
    data = dataset(p.clients((5, 0, 1, 23, 3, 4, 8, 9, 2, 7, 6)))
    task = Task(p.build(), p.loss, example=data.examples(2))
    cohort = torch.tensor([10, 3, 0, 3, 1, 6, 8, 2, 3, 9])
    algorithm = fedavg(lr=0.1, batches=Batches(4))
    return Simulation(
        task,
        data,
        algorithm,
        lambda eligible, seed, round: cohort,
        dtype=torch.float64,
        seed=7,
        statistics=size,
        **kind,
    )


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_sample_is_the_same_in_every_arrangement(way: dict[str, Any]) -> None:
    sim, other = simulate(4, **way), simulate(4, backend="loop", slots=5)
    state, last = sim.start(), other.start()
    for _ in range(2):
        (state, metrics), (last, expected) = sim.round(state), other.round(last)
        assert update(metrics) == pytest.approx(update(expected), rel=1e-9)
        a, b = sim.geometry.last, other.geometry.last
        assert a is not None and b is not None
        assert a.sampled.tolist() == b.sampled.tolist() and len(a.sampled) == 4
        np.testing.assert_allclose(a.cosine, b.cosine, rtol=1e-9)
        np.testing.assert_allclose(a.norm, b.norm, rtol=1e-9)
        assert sorted(a.at.tolist()) == a.sampled.tolist()


def test_the_sample_is_drawn_by_client_and_round() -> None:
    """Kind 8: the four smallest words of those with examples; occurrences have words of their own,
    and the place in the cohort plays no part."""
    sim = simulate(4, backend="loop")
    plan = sim.trainer.plan(sim.cohort(0))
    pairs = list(zip(plan.client.tolist(), plan.occurrence.tolist(), strict=True))
    for round in (0, 1):
        word = {
            pair: int(
                words(
                    7, stream(Kind.STATISTICS, client=pair[0], round=round, occurrence=pair[1]), 1
                )[0]
            )
            for pair in pairs
            if pair[0] != 1  # it has no examples
        }
        expected = set(sorted(word, key=lambda pair: word[pair])[:4])
        chosen = sample(plan, 4, 7, round)
        assert {pairs[i] for i in np.flatnonzero(chosen)} == expected
        order = np.arange(len(pairs))[::-1]
        assert {pairs[order[i]] for i in np.flatnonzero(sample(plan.of(order), 4, 7, round))} == (
            expected
        )
    assert int(Kind.STATISTICS) == 8
    assert sample(plan, 99, 7, 0).sum() == 9


def test_statistics_change_no_bit_of_the_model() -> None:
    runs = [simulate(size, backend="vmap", slots=3) for size in (0, 64)]
    one, two = (vecfl.run(sim, 2).server["w"] for sim in runs)
    assert torch.equal(one, two)


def test_what_is_measured_is_what_was_sent() -> None:
    """Of a client that comes three times, `update_norm` is that of its last update."""
    sent: list[dict[int, Any]] = [{}]
    sim = simulate(64, backend="loop", slots=1)
    sim.trainer.algorithm = recorded(sim.algorithm, sent)
    sim.trainer.rearrange(sim.arrangement)
    state, metrics = sim.round(sim.start())
    rows = [row for several in sent[0].values() for row, _ in several]
    weights = [weight for several in sent[0].values() for _, weight in several]
    lengths = [float(row.norm()) for row, w in zip(rows, weights, strict=True) if w > 0]
    expected = {f"update/{k}": v for k, v in summary("norm", np.array(lengths)).items()}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    mean = sum(w * r for r, w in zip(rows, weights, strict=True)) / sum(weights)
    cosines = [float(r @ mean / r.norm() / mean.norm()) for r in rows if r.any()]
    found = summary("cosine", np.array(cosines)) | geometry_of(
        torch.stack([row for row, w in zip(rows, weights, strict=True) if w > 0])
    )
    assert {n: metrics[f"update/{n}"] for n in found} == pytest.approx(found, rel=1e-9)
    last = sim.geometry.last
    assert last is not None
    by_client = sim.client_results(state)["update_norm"]
    assert by_client[3] == last.norm[8] != last.norm[1]
    assert np.isnan(by_client[[1, 4, 5, 7]]).all()  # without examples, or not in the cohort


def geometry_of(rows: torch.Tensor) -> dict[str, float]:
    """What is told of updates [s, P], pair by pair and by their singular values."""
    pairs = [(i, j) for i in range(len(rows)) for j in range(i) if rows[i].any() and rows[j].any()]
    cosines = [float(rows[i] @ rows[j] / rows[i].norm() / rows[j].norm()) for i, j in pairs]
    share = torch.linalg.svdvals(rows) / torch.linalg.svdvals(rows).sum()
    return summary("pairwise_cosine", np.array(cosines)) | {
        "diversity": float(rows.square().sum() / rows.sum(0).square().sum()),
        "effective_rank": float(torch.special.entr(share).sum().exp()),
    }


def test_equal_updates_and_orthogonal_ones() -> None:
    """Twice (3, 0): diversity (9 + 9) / 6^2 = 1/2, one direction. With signs against each other
    the sum is zero, and there is no diversity; (3, 0), (0, 3) and (0, -3) have (27 / 9)."""
    told = []
    for clients in (
        [(1, 0, -2), (1, 0, -2)],
        [(1, 0, -2), (1, 0, 4)],
        [(1, 0, -2), (0, 1, -2), (0, 1, 4)],
        [(1, 0, 1), (0, 1, 1)],
    ):
        sim = plane(*clients, statistics=3, backend="loop")
        told.append(update(sim.round(sim.start())[1]))
    same, against, three, nothing = told
    assert (same["diversity"], same["effective_rank"]) == pytest.approx((0.5, 1))
    assert (same["pairwise_cosine_mean"], against["pairwise_cosine_mean"]) == (1, -1)
    assert math.isnan(against["diversity"]) and against["effective_rank"] == pytest.approx(1)
    # singular values 3 and sqrt(18): shares 1 / (1 + sqrt 2) and sqrt 2 / (1 + sqrt 2)
    a, b = 1 / (1 + math.sqrt(2)), math.sqrt(2) / (1 + math.sqrt(2))
    assert (three["diversity"], three["effective_rank"]) == pytest.approx((3, a**-a * b**-b))
    cosines = [three[f"pairwise_cosine_{k}"] for k in ("min", "p50", "max")]
    assert cosines == [-1, 0, 0]
    assert math.isnan(nothing["effective_rank"]) and math.isnan(nothing["diversity"])


def test_updates_without_weight_are_not_compared() -> None:
    """Of three orthogonal or opposed updates one has no weight: two are left, orthogonal."""

    def weights(done: Any) -> torch.Tensor:
        return (done.client != 2).double()

    sim = plane((1, 0, -2), (0, 1, -2), (0, 1, 4), statistics=3, backend="loop")
    algorithm = fedavg(lr=1.0, batches=Batches(1), weights=weights)
    kind: dict[str, Any] = {"dtype": torch.float64, "backend": "loop", "statistics": 3}
    sim = Simulation(sim.task, sim.data, algorithm, everyone(), **kind)
    told = update(sim.round(sim.start())[1])
    assert (told["diversity"], told["effective_rank"]) == pytest.approx((1, 2))
    assert told["pairwise_cosine_min"] == told["pairwise_cosine_max"] == 0


def test_the_rank_of_equal_updates_is_one() -> None:
    """Rounding leaves eigenvalues of about 1e-13 that count for nothing."""
    row = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    products = gram(Mesh(), np.arange(20), list(row.expand(20, -1)), 20, 5000)
    assert effective_rank(products) == pytest.approx(1, abs=1e-12)


def test_products_of_long_updates_are_those_of_all_columns() -> None:
    """Three blocks of columns, the last one short; a client of another rank is zero here."""
    rows = torch.randn(2, 40_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = gram(Mesh(), np.array([2, 0]), list(rows), 3, 40_000)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    index = torch.tensor([2, 0])
    expected[index[:, None], index] = rows @ rows.T
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
    assert gram(Mesh(), np.array([], dtype=int), [], 0, 40_000).shape == (0, 0)


def test_norms_belong_to_their_round_and_to_those_that_train() -> None:
    sim = simulate(4, backend="loop")
    first, _ = sim.round(sim.start())
    second, _ = sim.round(first)
    assert "update_norm" in sim.client_results(second)
    assert "update_norm" not in sim.client_results(first)
    assert "update_norm" not in sim.client_results(second, sim.data)


def test_settled_clients_agree_with_nothing() -> None:
    """SETTLED moves nowhere at w = 1, STEEP does: 4 * lr."""
    from .oracles.tiny import Line

    data = dataset([client(SETTLED), client(STEEP)])
    task = Task(Line(), squared, example=data.examples(2))
    algorithm = fedavg(lr=0.5, batches=Batches(1))
    sim = Simulation(task, data, algorithm, everyone(), statistics=2, backend="loop")
    _, metrics = sim.round(sim.start())
    assert (metrics["update/norm_max"], metrics["update/norm_min"]) == (2, 0)
    assert (metrics["update/sampled"], metrics["update/cosine_mean"]) == (1, 1)


def test_what_is_kept_outlives_the_slots() -> None:
    """A message may be a view of rows that the next clients train in."""
    update = torch.ones(3, 4)
    place, sampled = np.array([5, 0, 2]), np.array([True, False, False, False, False, True])
    parts = [measure(update, torch.ones(3), place, s) for s in (sampled, np.ones(6, dtype=bool))]
    update.zero_()
    assert [part.at.tolist() for part in parts] == [[5, 0], [5, 0, 2]]
    assert all((part.rows == 1).all() for part in parts)
    assert [part.norm.tolist() for part in parts] == [[2, 2, 2]] * 2
