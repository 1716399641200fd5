"""Aggregators: what they get, what they may give, and runs that do not depend on their order."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vecfl
from vecfl.algorithms import Algorithm, Finished, Upload

from .oracles.bridge import dataset

MESSAGES = torch.tensor([[1.0, 9], [2, 0], [4, 5], [8, 1], [100, 2]], dtype=torch.float64)
B = vecfl.Batches(4)


def simulation(algorithm: Algorithm, bad: int | None = None, **how: Any) -> vecfl.Simulation:
    """Five clients, of 0, 1, 3, 6 and 9 examples."""
    generator = torch.Generator().manual_seed(3)
    clients = [
        {"x": torch.randn(n, 3, generator=generator), "y": torch.randn(n, generator=generator)}
        for n in (0, 1, 3, 6, 9)
    ]
    if bad is not None:
        clients[bad]["x"][0] = torch.nan
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    data = dataset(clients)
    task = vecfl.Task(module, vecfl.squared_error, example=data.examples(2))
    return vecfl.Simulation(task, data, algorithm, vecfl.everyone(), dtype=torch.float64, **how)


def heard(algorithm: Algorithm, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The messages and weights that an aggregator got in one round, and what it moved w by."""
    got: list[Tensor] = []

    def first(messages: Tensor, weights: Tensor) -> Tensor:
        got.extend((messages.clone(), weights.clone()))
        return messages[0]

    sim = simulation(vecfl.aggregated_by(algorithm, first), **how)
    state = sim.start()
    after, _ = sim.round(state)
    return got[0], got[1], state.server["w"] - after.server["w"]


def test_median_and_trimmed_mean_by_hand() -> None:
    weights = torch.ones(5)
    assert vecfl.coordinate_median()(MESSAGES, weights).tolist() == [4, 2]
    assert vecfl.coordinate_median()(MESSAGES[:4], weights[:4]).tolist() == [3, 3]  # middle of two
    # 0.2 * 5 = 1 at either end: (2 + 4 + 8) / 3 and (1 + 2 + 5) / 3; 0.19 * 5 < 1: the mean
    trimmed = vecfl.trimmed_mean(0.2)(MESSAGES, weights)
    torch.testing.assert_close(trimmed, torch.tensor([14 / 3, 8 / 3], dtype=torch.float64))
    assert vecfl.trimmed_mean(0.19)(MESSAGES, weights).tolist() == pytest.approx([23, 3.4])
    with pytest.raises(vecfl.InputError, match=r"trimmed_mean\(share=0.5\): .* below 0.5"):
        vecfl.trimmed_mean(0.5)


def test_a_share_is_taken_as_it_is_written() -> None:
    """0.29 * 100 is 28.999999999999996 as floats: 29 of 100 are left out at either end. Of squares
    0, 1, ..., 99^2 those of 29 to 70 remain: their mean is 70 * 71 * 141 / 6 less 28 * 29 * 57 / 6,
    109,081, over 42; with 28 left out it would be another."""
    squares = torch.arange(100, dtype=torch.float64).square()[:, None]
    found = vecfl.trimmed_mean(0.29)(squares, torch.ones(100))
    assert found.item() == pytest.approx(109_081 / 42, rel=1e-12)


def test_it_gets_the_rows_of_those_who_count_in_the_order_of_the_cohort() -> None:
    messages, weights, moved = heard(vecfl.fedavg(lr=0.1, batches=B))
    assert weights.tolist() == [1, 3, 6, 9]  # nobody's client does not count
    assert messages.dtype == weights.dtype == torch.float64 and messages.shape == (4, 4)
    torch.testing.assert_close(moved, messages[0])
    assert len({tuple(row) for row in messages.tolist()}) == 4
    assert heard(vecfl.fedavg(lr=0.1, batches=B), bad=3)[1].tolist() == [1, 3, 9]


def test_weights_that_are_logs_come_in_range() -> None:
    """DGA's weights, of which e^-5000 apart are none, but for a common factor."""
    beta, losses = 3.0, []
    dga = vecfl.dga(lr=0.1, batches=B, softmax_beta=beta)

    def upload(server: dict, done: Finished) -> Upload:
        losses.extend((done.loss / done.weight)[done.weight > 0].tolist())
        return dga.upload(server, done)

    _, weights, _ = heard(replace(dga, upload=upload), slots=1)
    by_loss = torch.tensor(sorted(losses), dtype=torch.float64).mul(-beta).exp()
    found = weights.sort(descending=True).values
    torch.testing.assert_close(found / found[0], by_loss / by_loss[0])
    assert found[0] == 1
    far = heard(vecfl.dga(lr=0.1, batches=B, softmax_beta=1e5))[1]
    assert far.max() == 1 and far.min() < 1e-300  # not 0 / 0


@pytest.mark.parametrize(
    "how",
    [
        {"backend": "loop", "slots": 3},
        {"backend": "loop", "workers": 2},
        {"backend": "loop", "exact_sums": True},
    ],
)
def test_neither_slots_nor_workers_nor_a_grid_change_a_bit(how: dict[str, Any]) -> None:
    around = vecfl.chain(vecfl.fedavg(lr=0.1, batches=B), vecfl.clip_by_norm(0.1))
    algorithm = vecfl.ema(vecfl.aggregated_by(around, vecfl.coordinate_median()), 0.5)
    found = []
    for one in ({"backend": "loop", "slots": 1}, how):
        sim = simulation(algorithm, **one)
        state = sim.round(sim.round(sim.start())[0])[0]
        found.append(state.server)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_rows_that_are_views_of_slots_are_kept() -> None:
    """One slot: what the second client does must not change what the first has sent."""
    plain = vecfl.fedavg(lr=0.1, batches=B)
    bare = replace(plain, upload=lambda s, d: Upload(d.model, d.weight))
    ended, weights, _ = heard(bare, slots=1)
    assert weights.tolist() == [1, 3, 6, 9]  # one epoch
    moved, _, _ = heard(plain, slots=1)
    w = ended + moved  # what all began from
    torch.testing.assert_close(w, w[:1].expand_as(w))
    assert not torch.allclose(ended[0], ended[1])


def test_the_mean_as_an_aggregator_is_fedavg_and_updates_are_compared_with_it() -> None:
    plain = vecfl.fedavg(lr=0.1, batches=B)

    def mean(messages: Tensor, weights: Tensor) -> Tensor:
        return (weights / weights.sum()) @ messages

    found = []
    for algorithm in (plain, vecfl.aggregated_by(plain, mean), vecfl.aggregated_by(plain, opposed)):
        sim = simulation(algorithm, statistics=4)
        found.append(sim.round(sim.start()))
    (a, told), (b, same), (_, other) = found
    torch.testing.assert_close(a.server["w"], b.server["w"], rtol=1e-12, atol=0)
    for name in ("update/aggregate_norm", "update/cosine_mean", "train/loss"):
        assert told[name] == pytest.approx(same[name], rel=1e-12)
    assert other["update/cosine_mean"] == pytest.approx(-told["update/cosine_mean"], rel=1e-12)


def opposed(messages: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean with another sign."""
    return -(weights / weights.sum()) @ messages


def test_an_aggregator_may_give_another_float() -> None:
    """What comes in float32 goes on in float64: 1/3 of float32 less, times 3, is not 0."""

    def third(messages: Tensor, weights: Tensor) -> Tensor:
        return torch.full((messages.shape[1],), 1 / 3)

    sim = simulation(vecfl.aggregated_by(vecfl.fedavg(lr=0.1, batches=B), third), statistics=2)
    state = sim.start()
    after, _ = sim.round(state)
    assert sim.geometry.last is not None and sim.geometry.last.mean is not None
    assert sim.geometry.last.mean.dtype == torch.float64
    moved = state.server["w"] - after.server["w"]
    torch.testing.assert_close(moved, torch.full_like(moved, 1 / 3), rtol=1e-7, atol=0)


def test_nobody_leaves_the_model() -> None:
    algorithm = vecfl.aggregated_by(vecfl.fedavg(lr=0.1, batches=B), vecfl.coordinate_median())
    sim = simulation(algorithm, client_dropout=0.9999999)
    state = sim.start()
    after, metrics = sim.round(state)
    assert torch.equal(state.server["w"], after.server["w"]) and metrics["train/clients"] == 0


@pytest.mark.parametrize(
    ("aggregator", "line"),
    [
        (lambda messages, weights: messages, r"gave \[4, 4\]; expected a tensor \[4\]"),
        (lambda messages, weights: None, r"gave None; expected a tensor \[4\]"),
        (lambda messages, weights: messages[0] / 0, "gave numbers that are not finite"),
    ],
)
def test_results_that_are_none(aggregator: Any, line: str) -> None:
    sim = simulation(vecfl.aggregated_by(vecfl.fedavg(lr=0.1, batches=B), aggregator))
    with pytest.raises(vecfl.InputError, match=line):
        sim.round(sim.start())


def test_one_is_enough_and_runs_know_it_by_name() -> None:
    once = vecfl.aggregated_by(vecfl.fedavg(lr=0.1, batches=B), vecfl.trimmed_mean(0.1))
    with pytest.raises(vecfl.InputError, match=r"has an aggregator; coordinate_median would be"):
        vecfl.aggregated_by(once, vecfl.coordinate_median())
    other = vecfl.aggregated_by(vecfl.fedavg(lr=0.1, batches=B), vecfl.trimmed_mean(0.2))
    saved = simulation(once)
    with pytest.raises(vecfl.InputError, match=r"trimmed_mean\(0.2\)"):
        simulation(other).load(saved.save(saved.start()))
