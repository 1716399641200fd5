"""Local privacy: the law of the noise, its scale, whose it is, and what stands around it.

Statistical tests have fixed seeds; the false-alarm probabilities that they state are over seeds.
"""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import vecfl
from vecfl import InputError
from vecfl.algorithms import Algorithm
from vecfl.privacy import Event, Sampling, epsilon
from vecfl.random import Kind, normal, stream
from vecfl.transforms import Transform
from vecfl.transforms.local_privacy import analytic_gaussian
from vecfl.transforms.private import private
from vecfl.worker import finite

from .messages import finished, sent
from .worlds import ALGORITHMS, UNIFORM, WORK, population, simulation

SIZES = (6, 0, 3, 9, 1, 5)
LOCAL: dict[str, Callable[[], Transform]] = {
    "gaussian": lambda: vecfl.local_gaussian(0.5, 2.0, 1e-4),
    "laplace": lambda: vecfl.local_laplace(0.5, 4.0),
    "flute": lambda: vecfl.flute_local_dp(0.9, 0.5, weights_between=(0.1, 1.0)),
    "privunit": lambda: vecfl.privunit2(8.0, 0.5),
}
PROMISE: dict[str, Any] = {"noise_multiplier": 1.0, "cohort": 3.0, "delta": 1e-3}


def delta_of(std: float, sensitivity: float, e: float) -> float:
    """Delta of a Gaussian mechanism at epsilon e: Balle and Wang, theorem 8."""
    half, rest = sensitivity / (2 * std), e * std / sensitivity
    return float(stats.norm.cdf(half - rest) - math.exp(e) * stats.norm.cdf(-half - rest))


def noise_of(transform: Transform, clients: int, size: int, **how: Any) -> Tensor:
    """What is added to messages of zeros."""
    return sent(transform, torch.zeros(clients, size, dtype=torch.float64), **how).update


@pytest.mark.parametrize(
    ("e", "delta"), [(1.0, 1e-5), (0.1, 1e-7), (0.001, 0.01), (8.0, 1e-5), (60.0, 1e-9), (3.0, 0.5)]
)
def test_the_deviation_is_the_least_that_is_enough(e: float, delta: float) -> None:
    std = analytic_gaussian(2.0, e, delta)
    assert delta_of(std, 2.0, e) == pytest.approx(delta, rel=1e-8)
    assert delta_of(std * (1 - 1e-5), 2.0, e) > delta


def test_the_deviation_is_that_of_others() -> None:
    """3.730632 in the authors' own program; the accountant finds the epsilon again."""
    assert analytic_gaussian(1.0, 1.0, 1e-5) == pytest.approx(3.730632, rel=1e-6)
    event = Event("gaussian", analytic_gaussian(1.0, 2.0, 1e-4), Sampling("everyone"), 10)
    assert epsilon((event,), 1e-4) == pytest.approx(2.0, rel=1e-3)


def test_gaussian_noise_has_the_promised_law() -> None:
    """20,000 draws for messages 2 * 0.5 apart: a variance within 5 standard errors, sqrt(2 / n)
    each (p = 6e-7), and a Kolmogorov-Smirnov test (p > 1e-6)."""
    drawn = noise_of(LOCAL["gaussian"](), 40, 500, seed=1).flatten()
    assert delta_of(float(drawn.std()), 1.0, 2.0) == pytest.approx(1e-4, rel=0.5)
    drawn = drawn / analytic_gaussian(1.0, 2.0, 1e-4)
    assert abs(float(drawn.square().mean()) - 1) < 5 * math.sqrt(2 / len(drawn))
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-6


def test_laplace_noise_has_the_promised_law() -> None:
    """Scale 2 * 0.5 / 4, and a variance of 2 / 16 within 5 standard errors: squares x^2 have a
    variance of E x^4 - (E x^2)^2 = 24 - 4 at scale 1 (p = 6e-7)."""
    drawn = noise_of(LOCAL["laplace"](), 40, 500, seed=1).flatten()
    error = math.sqrt(20 / len(drawn)) / 16
    assert abs(float(drawn.square().mean()) - 2 / 16) < 5 * error
    assert stats.kstest(drawn.numpy(), "laplace", (0, 0.25)).pvalue > 1e-6


def test_laplace_messages_are_one_epsilon_apart_at_most() -> None:
    """Densities at x are exp(-|x - m| / scale): their ratio is at most exp(|m - m'| / scale) for
    |m - m'| in L1, which is 1 for opposite corners. Clipped in L2 it would be sqrt(6)."""
    rows = torch.ones(2, 6, dtype=torch.float64) * torch.tensor([[5.0], [-5.0]])
    quiet = vecfl.local_laplace(0.5, 1e14)
    messages = sent(quiet, rows).update
    assert float((messages[0] - messages[1]).abs().sum()) / 0.25 == pytest.approx(4.0, rel=1e-6)


def test_noise_is_drawn_anew_for_all_that_it_must_differ_by() -> None:
    """Correlations of 20,000 pairs are within 5 / sqrt(n) (p = 6e-7 each, 17 of them)."""
    transform, std = LOCAL["gaussian"](), analytic_gaussian(1.0, 2.0, 1e-4)
    who = torch.arange(40)
    ways: list[dict[str, Any]] = [
        {},
        {"client": who + 40},
        {"number": 1},
        {"seed": 1},
        {"occurrence": who * 0 + 1},
        {"place": 1},
    ]
    draws = [noise_of(transform, 40, 500, **way) / std for way in ways]
    assert torch.equal(draws[0], noise_of(transform, 40, 500) / std)
    pairs = list(combinations(draws, 2))
    pairs += [(draws[0][1:], draws[0][:-1]), (draws[0][:, 1:], draws[0][:, :-1])]
    for a, b in pairs:
        assert abs(float((a * b).mean())) < 5 / math.sqrt(a.numel())


def test_two_mechanisms_of_one_chain_have_noise_of_their_own() -> None:
    """The same noise twice would be (1 + s) z; two draws are told apart by the stream of each."""
    quiet = vecfl.local_gaussian(1e-9, 2.0, 1e-4)
    first, second = vecfl.local_gaussian(1.0, 2.0, 1e-4), vecfl.local_gaussian(1e9, 2.0, 1e-4)
    made = vecfl.chain(vecfl.fedavg(weights=UNIFORM, **WORK), quiet, first, second)
    sim = simulation(made, population(4), vecfl.everyone(), seed=3)
    before = sim.start()
    moved = before.server["w"] - sim.round(before)[0].server["w"]
    z = normal(3, stream(Kind.NOISE, layer=2, step=2), len(moved))
    std = analytic_gaussian(2e9, 2.0, 1e-4)
    torch.testing.assert_close(moved, z * std, rtol=0, atol=1e-7 * std)


@pytest.mark.parametrize("name", LOCAL)
def test_a_client_sends_the_same_beside_any_others(name: str) -> None:
    transform, g = LOCAL[name](), torch.Generator().manual_seed(2)
    rows = torch.randn(7, 50, generator=g, dtype=torch.float64)
    together = sent(transform, rows)
    order = torch.tensor([4, 0, 6, 2])
    some = sent(transform, rows[order], client=order)
    assert torch.equal(some.update, together.update[order])
    assert torch.equal(some.weight, together.weight[order])
    one = sent(transform, rows[5:6], client=torch.tensor([5]))
    assert torch.equal(one.update[0], together.update[5])


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize(
    "how", [{"slots": 5}, {"workers": 3, "slots": 2}, {"backend": "vmap", "slots": 4}]
)
def test_runs_are_the_same_for_any_slots_and_workers(name: str, how: dict[str, Any]) -> None:
    models = []
    for way in ({}, how):
        made = vecfl.chain(vecfl.fedavg(weights=UNIFORM, **WORK), LOCAL[name]())
        sim = simulation(made, population(*SIZES), vecfl.uniform(4), **way)
        state = sim.start()
        for _ in range(2):
            state, _ = sim.round(state)
        models.append(state.server["w"])
    torch.testing.assert_close(*models, rtol=1e-8, atol=1e-9)


def private_(algorithm: Algorithm) -> Algorithm:
    return private(algorithm, vecfl.clip_by_norm(0.5), **PROMISE)


AROUND: dict[str, Callable[[Algorithm], Algorithm]] = {
    "alone": lambda algorithm: algorithm,
    "private": private_,
    "median": lambda algorithm: vecfl.aggregated_by(algorithm, vecfl.coordinate_median()),
    "feedback": lambda algorithm: vecfl.chain(algorithm, vecfl.error_feedback(vecfl.top_k(0.3))),
    "private feedback": lambda algorithm: private_(AROUND["feedback"](algorithm)),
    "quantized": lambda algorithm: vecfl.chain(algorithm, vecfl.qsgd(4)),
}


def whole_runs() -> list[Any]:
    """Every mechanism with every algorithm and every way around: a quarter of them by day, all by
    night."""
    found = []
    for i, name in enumerate(LOCAL):
        for j, algorithm in enumerate(("fedavg", "dga", "scaffold")):
            for k, around in enumerate(AROUND):
                if (algorithm, around) != ("scaffold", "median"):  # refused
                    marks = [] if (i + j + k) % len(LOCAL) == 0 else [pytest.mark.slow]
                    found.append(pytest.param(name, algorithm, around, marks=marks))
    return found


@pytest.mark.parametrize(("name", "algorithm", "around"), whole_runs())
def test_whole_runs(name: str, algorithm: str, around: str) -> None:
    """Models stay finite, whatever stands around the mechanism, and are others than without it."""
    data, models = population(*SIZES, spoilt=2), []
    for local in ([LOCAL[name]()], []):
        made = AROUND[around](vecfl.chain(ALGORITHMS[algorithm](), *local))
        sim = simulation(made, data, vecfl.poisson(0.5), seed=4)
        state = sim.start()
        for _ in range(3):
            state, metrics = sim.round(state)
            assert metrics["train/dropped_clients"] <= 1
        models.append(state.server["w"])
    assert models[0].isfinite().all() and (models[0] != models[1]).any()


def test_a_round_by_hand() -> None:
    """Each client's clipped update and its own normals; their mean is what the model moves by."""
    data, plain = population(4, 5, huge=1), vecfl.fedavg(weights=UNIFORM, **WORK)
    alone = []
    for k in (0, 1):
        sim = simulation(plain, data, lambda *_, k=k: torch.tensor([k]), seed=9)
        before = sim.start()
        update = before.server["w"] - sim.round(before)[0].server["w"]
        alone.append(update * min(1.0, 0.5 / float(update.norm())))
    assert float(alone[1].norm()) == pytest.approx(0.5)
    sim = simulation(vecfl.chain(plain, LOCAL["gaussian"]()), data, vecfl.everyone(), seed=9)
    before = sim.start()
    state, metrics = sim.round(before)
    at = stream(Kind.NOISE, client=torch.tensor([0, 1]), step=2)
    std = analytic_gaussian(1.0, 2.0, 1e-4)
    right = (torch.stack(alone) + std * normal(9, at, len(alone[0]))).mean(0)
    torch.testing.assert_close(before.server["w"] - state.server["w"], right, rtol=1e-9, atol=1e-9)
    assert 0 < metrics["train/clipped"] <= 1


@pytest.mark.parametrize("name", ["fedsgd", "fedavg"])
def test_messages_of_one_plain_step_have_their_noise(name: str) -> None:
    """Clients of one full batch, whose gradients stacked runs may add up without a row of each."""
    data, models = population(4, 3, 2, 4), []
    plain = ALGORITHMS[name]()
    for backend in ("loop", "stacked"):
        for made in (plain, vecfl.chain(plain, LOCAL["gaussian"]())):
            sim = simulation(made, data, vecfl.everyone(), backend=backend, slots=4)
            state, metrics = sim.round(sim.start())
            models.append(state.server["w"])
    quiet, right, other, found = models
    torch.testing.assert_close(quiet, other, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(right, found, rtol=1e-9, atol=1e-10)
    assert float((right - quiet).norm()) > 1


def test_a_local_mechanism_bounds_nothing() -> None:
    for name in LOCAL:
        with pytest.raises(InputError, match="does not bound what clients send"):
            private(ALGORITHMS["fedavg"](), LOCAL[name](), **PROMISE)
        done = private(ALGORITHMS["fedavg"](), vecfl.clip_by_norm(1.0), **PROMISE)
        with pytest.raises(InputError, match="there it could undo the clip"):
            vecfl.chain(done, LOCAL[name]())


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_of_any_size(name: str, dtype: torch.dtype) -> None:
    """Zeros, denormal and huge rows send what is finite; NaN and infinity are dropped."""
    info = torch.finfo(dtype)
    tiny = 2.0**-149 if dtype == torch.float32 else 5e-324
    good = [[0.0] * 6, [tiny] * 6, [tiny, 0, 0, 0, 0, 0], [info.max] * 6, [info.max, tiny] * 3]
    bad = [[math.nan] + [0.0] * 5, [math.inf, *[1.0] * 5], [-math.inf, math.nan, 0, 0, 0, 0]]
    rows = torch.tensor(good + bad, dtype=dtype)
    found = sent(LOCAL[name](), rows)
    assert found.update.dtype == dtype
    ok, _ = finite(finished(rows), found)
    assert ok.tolist() == [True] * len(good) + [False] * len(bad)
    assert (found.update[: len(good)].abs().amax(1) < 1e3).all()


def quiet(epsilon: float = 1e20, **how: Any) -> Transform:
    """FLUTE's mechanism without any noise to speak of."""
    return vecfl.flute_local_dp(epsilon, 2.5, **how)


def test_flute_by_hand() -> None:
    """(3, 4) is scaled to (1.5, 2), and (0.3, 0.4) up to the same; zeros stay, huge rows do not
    become 0. The noise is sqrt(2 ln(1.25e7)) 2.5 / 0.5 = 28.5843 for the message alone, with a
    weight up to 6 hypot(2.5, 6) = 6.5 in the place of 2.5: 74.3192."""
    rows = torch.tensor([[3, 4], [0.3, 0.4], [0, 0], [3e300, 4e300]], dtype=torch.float64)
    found = sent(quiet(), rows)
    right = torch.tensor([[1.5, 2], [1.5, 2], [0, 0], [1.5, 2]], dtype=torch.float64)
    torch.testing.assert_close(found.update, right, rtol=1e-9, atol=1e-9)
    assert found.weight.tolist() == [1] * 4
    assert found.extra["norm"].tolist() == pytest.approx([5, 0.5, 0, 5e300])
    assert found.extra["clipped"].tolist() == [True, False, False, True]
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    z = normal(0, stream(Kind.NOISE, client=torch.tensor([0, 1]), step=2), 4)
    assert sent(vecfl.flute_local_dp(0.5, 2.5), zeros).update.tolist() == [
        pytest.approx(row) for row in (z[:, :3] * 28.584296).tolist()
    ]
    noisy = vecfl.flute_local_dp(0.5, 2.5, weights_between=(0.0, 6.0))
    assert sent(noisy, zeros).update.tolist() == [
        pytest.approx(row) for row in (z[:, :3] * 74.319169).tolist()
    ]


def test_weights_of_flute_by_hand() -> None:
    """Weight w times scaler 2, at most 6, and noise; brought between 1 and 6, divided by 2. Of an
    epsilon without noise: 2 stays, 0.1 becomes 0.5 and 5 becomes 3; 0 stays."""
    rows = torch.ones(1, 2, dtype=torch.float64)
    still = quiet(weight_scaler=2.0, weights_between=(1.0, 6.0))
    for weight, right in ((2.0, 2.0), (0.1, 0.5), (5.0, 3.0), (0.0, 0.0)):
        assert sent(still, rows, weight).weight.tolist() == [pytest.approx(right)]
    # epsilon 200: a deviation of sqrt(2 ln(1.25e7)) hypot(2.5, 6) / 200 = 0.18580
    noisy = quiet(200.0, weight_scaler=2.0, weights_between=(1.0, 6.0))
    many = torch.ones(9, 2, dtype=torch.float64)
    z = normal(0, stream(Kind.NOISE, client=torch.arange(9), step=2), 3)[:, 2]
    right = ((4 + 0.18579792 * z) / 2).tolist()
    assert sent(noisy, many, 2.0).weight.tolist() == [pytest.approx(w) for w in right]
    above = sent(noisy, many, 100.0).weight  # 6 and noise, cut off at 6
    assert above.tolist() == [pytest.approx(w) for w in ((6 + 0.18579792 * z).clamp(1, 6) / 2)]
    assert (above < 3).any() and (above == 3).any()


def test_weights_that_are_logs_get_noise_too() -> None:
    """A client of DGA counts exp(log 1.5) = 1.5: that is what is noised, and no log leaves."""
    rows, logs = torch.ones(3, 2, dtype=torch.float64), torch.full((3,), 1.5).double().log()
    logs[1] = math.nan
    found = sent(quiet(weights_between=(1.0, 6.0)), rows, logs=logs)
    assert found.log_weight is None and found.weight[0] == pytest.approx(1.5)
    assert finite(finished(rows), found)[0].tolist() == [True, False, True]
    plain = sent(quiet(), rows, logs=logs)  # without bounds weights are left alone
    assert plain.log_weight is logs


def test_flute_below_zero_clips_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    rows = torch.tensor([[3, 4], [0.3, 0.4]], dtype=torch.float64)
    clip = vecfl.flute_local_dp(-1, 2.5, weights_between=(1.0, 6.0))
    found = sent(clip, rows, 9.0)
    assert found.update[0].tolist() == pytest.approx([1.5, 2]) and found.weight.tolist() == [9, 9]
    assert torch.equal(found.update[1], rows[1])
    assert clip.limit is not None and clip.limit.norm({}) == 2.5
    assert not caplog.text


def test_a_warning_above_epsilon_one(caplog: pytest.LogCaptureFixture) -> None:
    vecfl.flute_local_dp(1.0, 1.0)
    assert not caplog.text
    vecfl.flute_local_dp(100.0, 1.0)
    assert "flute_local_dp(epsilon=100): its formula is proven up to epsilon 1" in caplog.text
    caplog.clear()
    vecfl.local_gaussian(1.0, 100.0, 1e-5)
    assert not caplog.text


def test_names_tell_runs_apart() -> None:
    assert vecfl.local_gaussian(1, 2, 1e-5).name == "local_gaussian 1.0 2.0 1e-05"
    assert vecfl.local_laplace(1, 2).name == "local_laplace 1.0 2.0"
    assert vecfl.flute_local_dp(1, 2).name == "flute_local_dp 1.0 2.0 1e-07 1.0 None"
    assert vecfl.flute_local_dp(-1, 2).name == "flute_local_dp clip 2.0"
    bounds = vecfl.flute_local_dp(1, 2, weights_between=(0, 1))
    assert bounds.name == "flute_local_dp 1.0 2.0 1e-07 1.0 (0.0, 1.0)"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: vecfl.local_gaussian(math.inf, 1, 1e-5),
            "local_gaussian(norm) must be positive and finite, not inf",
        ),
        (
            lambda: vecfl.local_gaussian(1, 0, 1e-5),
            "local_gaussian(epsilon) must be positive and finite, not 0",
        ),
        (
            lambda: vecfl.local_gaussian(1, 1, 0),
            "local_gaussian(delta) must be between 0 and 1, not 0",
        ),
        (
            lambda: vecfl.local_laplace(1, math.nan),
            "local_laplace(epsilon) must be positive and finite, not nan",
        ),
        (
            lambda: vecfl.flute_local_dp(0, 1),
            "flute_local_dp(epsilon) must be positive and finite, or below 0 to clip alone, not 0",
        ),
        (
            lambda: vecfl.flute_local_dp(1, 1, delta=2),
            "flute_local_dp(delta) must be between 0 and 1, not 2",
        ),
        (
            lambda: vecfl.flute_local_dp(1, 1, weight_scaler=-1),
            "flute_local_dp(weight_scaler) must be positive and finite, not -1",
        ),
        (
            lambda: vecfl.flute_local_dp(1, 1, weights_between=(2, 1)),
            "flute_local_dp(weights_between=(2, 1)): expected 0 <= least <= most",
        ),
    ],
)
def test_bad_numbers(build: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        build()
    assert str(error.value) == message
