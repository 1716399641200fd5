"""Central differential privacy: bounds, denominators, noise, and what is accounted.

Statistical tests have fixed seeds; the false-alarm probabilities that they state are over seeds.
"""

import functools
import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats

import vecfl
from vecfl import InputError
from vecfl.aggregate import Aggregate
from vecfl.algorithms import Finished, Round, Upload
from vecfl.algorithms.base import Server
from vecfl.privacy import Event, Population, Sampling
from vecfl.privacy.events import spend
from vecfl.sampling import law_of
from vecfl.transforms.private import private

from .worlds import ALGORITHMS, CLIPS, UNIFORM, WORK, module, population, simulation, sums_of_rounds

SIZES = (6, 0, 3, 9, 1, 5, 4, 12)
FEDAVG = ALGORITHMS["fedavg"]
PROMISE: dict[str, Any] = {"noise_multiplier": 1.0, "cohort": 4.0, "delta": 1e-3}


def noise_of(rounds: int, seed: int = 5, z: float = 1.5, **how: Any) -> torch.Tensor:
    """What is added to the sum in each round, over z C: cohorts without a client, [rounds, M]."""
    data = population(*SIZES)
    sampler = vecfl.sampling.lawful(
        lambda eligible, seed, round: torch.empty(0, dtype=torch.int64),
        lambda n: Sampling("poisson", 0.5),
    )
    algorithm = private(
        FEDAVG(), vecfl.clip_by_norm(0.5), noise_multiplier=z, cohort=4.0, delta=1e-3
    )
    sim = simulation(algorithm, data, sampler, seed=seed, **how)
    start, drawn = sim.start(), []
    for t in range(rounds):
        after, _ = sim.round(replace(start, round=t))
        drawn.append((start.server["w"] - after.server["w"]) * 4.0 / (z * 0.5))
    return torch.stack(drawn)


def test_the_sum_by_hand() -> None:
    """Without noise the model moves by the sum of clipped updates over the cohort of the promise.

    Of four clients one has no example and one is not finite: they add nothing, and the denominator
    stays 4.
    """
    data = population(6, 0, 3, 5, spoilt=2, huge=3)
    plain = vecfl.fedavg(weights=UNIFORM, **WORK)
    alone = []
    for k in (0, 3):
        sim = simulation(plain, data, lambda *_, k=k: torch.tensor([k]))
        before = sim.start()
        update = before.server["w"] - sim.round(before)[0].server["w"]
        alone.append(update * min(1.0, 0.5 / float(update.norm())))
    assert float(alone[1].norm()) == pytest.approx(0.5)
    algorithm = private(plain, vecfl.clip_by_norm(0.5), **PROMISE | {"noise_multiplier": 0.0})
    sim = simulation(algorithm, data, vecfl.everyone())
    state, metrics = sim.round(before := sim.start())
    moved = before.server["w"] - state.server["w"]
    torch.testing.assert_close(moved, sum(alone) / 4, rtol=1e-9, atol=1e-12)
    assert metrics["privacy/clipping_norm"] == 0.5 and metrics["privacy/noise_std"] == 0
    assert sim.releases.told(state)["privacy/epsilon"] == math.inf


def test_weights_are_shares_of_the_largest_and_come_before_the_clip() -> None:
    """capped(5) and 3 examples: 3/5 of the update, clipped then; a long one is clipped to C."""
    data = population(3, 9, huge=1)
    capped, whole = vecfl.fedavg(weights=vecfl.capped(5), **WORK), []
    for k in (0, 1):
        sim = simulation(capped, data, lambda *_, k=k: torch.tensor([k]))
        before = sim.start()
        whole.append((before.server["w"] - sim.round(before)[0].server["w"]).double())
    made = private(capped, vecfl.clip_by_norm(0.5), **PROMISE | {"cohort": 2.0})
    sums = sums_of_rounds(made, data, [0, 1])
    short, long = whole[0] * 3 / 5, whole[1] * 0.5 / whole[1].norm()
    assert float(short.norm()) < 0.5 < float(whole[1].norm())
    torch.testing.assert_close(sums[0].total, short + long, rtol=1e-9, atol=1e-12)


def test_the_noise_has_the_promised_law() -> None:
    """26 numbers of 400 rounds: 10,400 draws. Their variance is 1 within 5 standard errors,
    sqrt(2 / n) each (p = 6e-7), and a Kolmogorov-Smirnov test holds them to be normal (p > 1e-6).
    """
    draws = noise_of(400)
    n = draws.numel()
    assert n == 10_400
    assert abs(float(draws.square().mean()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float(draws.mean())) < 5 / math.sqrt(n)
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-6


def test_noise_is_drawn_anew_for_each_round_number_and_seed() -> None:
    """Correlations of 10,400 pairs are within 5 / sqrt(n) (p = 6e-7 each, three of them)."""
    draws, other = noise_of(400), noise_of(400, seed=6)
    bound = 5 / math.sqrt(draws.numel())
    next_round, neighbour = draws[1:] * draws[:-1], draws[:, 1:] * draws[:, :-1]
    for product in (next_round, neighbour, draws * other):
        assert abs(float(product.mean())) < bound
    assert torch.equal(draws, noise_of(400))
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], other[0])


def test_a_server_sees_no_sum_without_noise() -> None:
    """One of an algorithm of one's own, which takes a sum where it finds it, finds it no more."""
    seen, inner = list[dict[str, float]](), FEDAVG()

    def upload(state: Server, done: Finished) -> Upload:
        return replace(inner.upload(state, done), extra={"x": done.examples.double()})

    def server(state: Server, sums: Aggregate, round: Round) -> Server:
        seen.append({name: float(value) for name, value in sums.extra.items()})
        after = inner.server(state, sums, round)
        return after | {"w": after["w"] + float(sums.extra.get("x", 0.0))}

    own, models = replace(inner, name="own", upload=upload, server=server), []
    for algorithm in (inner, own):
        made = private(algorithm, vecfl.clip_by_norm(0.5), **PROMISE)
        sim = simulation(made, population(*SIZES), vecfl.poisson(0.5))
        models.append(sim.round(sim.start())[0].server["w"])
    assert seen == [{"clients": 4.0}] * 2  # of the step by zeros at the start, too
    assert torch.equal(*models)
    sim = simulation(own, population(*SIZES), vecfl.everyone())
    sim.round(sim.start())
    assert seen[-1]["x"] == sum(SIZES)  # without privacy it is there


def test_laplace_noise_has_the_promised_law() -> None:
    """Scale z C of a sum clipped in L1, over 5,200 draws: a Kolmogorov-Smirnov test (p > 1e-6), and
    the mean of their sizes is 1 within 5 standard errors, 1 / sqrt(n) each (p = 6e-7)."""
    algorithm = private(FEDAVG(), vecfl.clip_by_l1(0.5), **PROMISE | {"noise_multiplier": 3.0})
    sampler = vecfl.sampling.lawful(
        lambda *_: torch.empty(0, dtype=torch.int64), lambda n: Sampling("poisson", 0.5)
    )
    sim = simulation(algorithm, population(*SIZES), sampler)
    start = sim.start()
    moved = [
        start.server["w"] - sim.round(replace(start, round=t))[0].server["w"] for t in range(200)
    ]
    drawn = torch.stack(moved).flatten() * 4.0 / (3.0 * 0.5)
    assert stats.kstest(drawn.numpy(), "laplace").pvalue > 1e-6
    assert abs(float(drawn.abs().mean()) - 1) < 5 / math.sqrt(5200)
    std = math.sqrt(2) * 3.0 * 0.5 / 4.0
    assert sim.round(start)[1]["privacy/noise_std"] == pytest.approx(std, rel=1e-12)
    assert sim.releases.event == Event("laplace", 3.0, Sampling("poisson", 0.5), 8)


def test_the_measured_sampling_rate_is_that_of_the_ledger() -> None:
    """8 clients, 2,000 rounds: 16,000 trials at the event's rate, within 5 standard errors."""
    algorithm = private(FEDAVG(), vecfl.clip_by_norm(0.5), **PROMISE | {"cohort": 2.4})
    sim = simulation(algorithm, population(*SIZES), vecfl.poisson(0.3), client_dropout=0.25)
    rate = sim.releases.event.sampling.rate
    assert rate == pytest.approx(0.3 * 0.75, rel=1e-6)
    took_part = 0
    for t in range(2000):
        sim.cohorts.ask(t)
        took_part += len(sim.cohorts.take(t).clients)
    assert abs(took_part - 16_000 * rate) < 5 * math.sqrt(16_000 * rate * (1 - rate))


@pytest.mark.parametrize(
    "how", [{"slots": 1}, {"slots": 5}, {"workers": 3}, {"backend": "vmap", "slots": 4}]
)
def test_the_noise_is_the_same_for_any_slots_and_workers(how: dict[str, Any]) -> None:
    algorithm = private(FEDAVG(), vecfl.clip_by_norm(0.5), **PROMISE)
    models = []
    for way in ({}, how):
        sim = simulation(algorithm, population(*SIZES), vecfl.poisson(0.5), **way)
        state = sim.start()
        for _ in range(3):
            state, _ = sim.round(state)
        models.append(state.server["w"])
    torch.testing.assert_close(*models, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("spoilt", [None, 0])
def test_a_round_without_a_usable_client_releases_noise_and_is_accounted(
    spoilt: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """An empty cohort, and one whose only client is not finite."""
    algorithm = private(FEDAVG(), vecfl.clip_by_norm(0.5), **PROMISE | {"cohort": 0.5})
    who = [] if spoilt is None else [0]
    sampler = vecfl.sampling.lawful(
        lambda *_: torch.tensor(who, dtype=torch.int64), lambda n: Sampling("poisson", 0.25)
    )
    sim = simulation(algorithm, population(4, 4, spoilt=spoilt), sampler)
    before = sim.start()
    state, metrics = sim.round(before)
    assert metrics["train/clients"] == 0
    assert (state.server["w"] != before.server["w"]).all()
    assert [event.times for event in state.ledger] == [1]
    assert "the model stays as it is" not in caplog.text


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_client_moves_the_sum_by_the_bound_at_most_and_reaches_it(name: str) -> None:
    """Neighbours: with and without each client, long updates, NaN and no examples among them, in
    a second round too, where clients and server have a state."""
    data, reached, bound = population(*SIZES, spoilt=2, huge=3), 0.0, 0.5
    made = private(ALGORITHMS[name](), vecfl.clip_by_norm(bound), **PROMISE | {"cohort": 8.0})
    everybody = [*range(8)]
    first, second = sums_of_rounds(made, data, everybody, everybody)
    for gone in everybody:
        others = [k for k in everybody if k != gone]
        (without,) = sums_of_rounds(made, data, others)
        _, later = sums_of_rounds(made, data, everybody, others)
        for neighbour, right in ((without, first), (later, second)):
            distance = float((neighbour.total - right.total).norm())
            assert distance <= bound * (1 + 1e-12), name
            reached = max(reached, distance)
    assert reached > 0.99 * bound, name


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_spends_what_is_accounted(name: str, clip: str) -> None:
    """Three rounds: three events, each of the sampler's law; models stay finite, and move."""
    made = private(ALGORITHMS[name](), CLIPS[clip](), **PROMISE)
    sim = simulation(made, population(*SIZES), vecfl.poisson(0.5))
    state = sim.start()
    for _ in range(3):
        state, metrics = sim.round(state)
        state = sim.observe(state, metrics)
    mechanism = "laplace" if clip == "l1" else "gaussian"
    event = Event(mechanism, 1.0, Sampling("poisson", 0.5), 8)
    assert state.ledger == (replace(event, times=3),)
    right = vecfl.privacy.epsilon(state.ledger, 1e-3)
    assert sim.releases.told(state, exact=True)["privacy/epsilon"] == right
    assert right <= sim.releases.told(state)["privacy/epsilon"] < right * 1.01
    assert state.server["w"].isfinite().all()


def test_the_grid_has_every_algorithm() -> None:
    """But FedNova, which is refused, and what stands around another algorithm."""
    builders = {
        name
        for name, made in vars(vecfl).items()
        if inspect.isfunction(made)
        and inspect.signature(made).return_annotation in (vecfl.Algorithm, "Algorithm")
        and not inspect.signature(made).parameters.keys() & {"algorithm", "inner"}
    }
    assert builders - ALGORITHMS.keys() == {"fednova"}


def test_an_adaptive_norm_that_nothing_adapts_is_refused() -> None:
    with pytest.raises(InputError, match="its norm follows a count under vecfl.private alone"):
        vecfl.chain(FEDAVG(), vecfl.adaptive_clip(0.1, count_noise=1.0))


def test_the_ledger_is_in_the_checkpoint() -> None:
    """Neither forgotten nor counted twice; rounds without the promise have no bound."""
    made, data = private(FEDAVG(), vecfl.clip_by_norm(0.5), **PROMISE), population(*SIZES)
    sim = simulation(made, data, vecfl.poisson(0.5))
    state = sim.start()
    for _ in range(3):
        state, _ = sim.round(state)
    again = simulation(made, data, vecfl.poisson(0.5))
    resumed = again.load(sim.save(state))
    assert resumed.ledger == state.ledger and again.releases.told(resumed) == sim.releases.told(
        state
    )
    resumed, _ = again.round(resumed)
    assert [event.times for event in resumed.ledger] == [4]
    plain = simulation(FEDAVG(), data, vecfl.poisson(0.5))
    with pytest.raises(InputError, match="noise multiplier 1.0"):
        other = private(FEDAVG(), vecfl.clip_by_norm(0.5), **PROMISE | {"noise_multiplier": 2.0})
        simulation(other, data, vecfl.poisson(0.5)).load(sim.save(state))
    mixed = again.load(plain.save(plain.round(plain.start())[0]), changed=True)
    assert again.releases.told(mixed)["privacy/epsilon"] == math.inf


@pytest.mark.parametrize(
    ("of", "smaller"), [(None, 1.0), (Population(10_000, 12), 0.25)], ids=["own", "stands for"]
)
def test_adaptive_clipping_by_hand(of: Population | None, smaller: float) -> None:
    """Three clients with updates longer than C = 0.1: nobody is below, b = 0 but for the noise, and
    C grows by exp(0.2 * 0.5) with none; the sum has noise (z^-2 - (2 s)^-2)^-1/2 C. Where the three
    stand for twelve, both have a quarter of the noise: on means it is that of twelve."""
    data = population(4, 4, 4)
    clip = vecfl.adaptive_clip(0.1, count_noise=2.0)
    made = private(FEDAVG(), clip, noise_multiplier=1.5, cohort=3.0, delta=1e-3, stands_for=of)
    all_three = vecfl.sampling.lawful(
        lambda *_: torch.arange(3), lambda n: Sampling("poisson", 3.0 / n)
    )
    sim = simulation(made, data, all_three)
    before = sim.start()
    state, metrics = sim.round(before)
    multiplier = (1.5**-2 - 4.0**-2) ** -0.5
    assert metrics["privacy/noise_std"] == pytest.approx(multiplier * 0.1 * smaller / 3.0)
    (name,) = (n for n in state.server if n.endswith("norm"))
    draw = vecfl.random.normal(0, vecfl.random.stream(vecfl.random.Kind.NOISE, step=1), 1)
    share = (-1.5 + 2.0 * smaller * float(draw)) / 3.0 + 0.5
    expected = 0.1 * math.exp(-0.2 * (share - 0.5))
    assert float(state.server[name]) == pytest.approx(expected, rel=1e-12)
    assert sim.releases.event.multiplier == 1.5


def test_adaptive_clipping_finds_the_quantile() -> None:
    """Without much noise C comes near the median of the norms."""
    clip = vecfl.adaptive_clip(5.0, count_noise=0.01, lr=0.5)
    made = private(FEDAVG(), clip, noise_multiplier=0.004, cohort=7.0, delta=1e-3)
    data = population(6, 5, 3, 9, 2, 5, 4)
    sim, norms = simulation(made, data, vecfl.everyone(), statistics=7), []
    start = sim.start()
    state = start
    for _ in range(40):
        after, metrics = sim.round(state)
        state = replace(after, server=after.server | {"w": start.server["w"]})
        norms.append(metrics["privacy/clipping_norm"])
    plain = simulation(FEDAVG(), data, vecfl.everyone(), statistics=7)
    plain.round(plain.start())
    lengths = plain.client_results(replace(plain.start(), round=1))["update_norm"]
    low, high = torch.as_tensor(lengths).double().sort().values[[2, 4]].tolist()
    assert low < norms[-1] < high


def test_a_smaller_population_stands_for_a_larger_one() -> None:
    """Noise z C / 1000 on the mean, of four clients that stand for a cohort of 1,000 of 10^6."""
    of = Population(1_000_000, 1000)
    made = private(FEDAVG(), vecfl.clip_by_norm(0.5), **PROMISE, stands_for=of)
    sim = simulation(made, population(*SIZES), vecfl.poisson(0.5))
    state, metrics = sim.round(sim.start())
    assert metrics["privacy/noise_std"] == pytest.approx(1.0 * 0.5 / 1000)
    assert metrics["privacy/stands_for_clients"] == 1_000_000
    assert state.ledger == (Event("gaussian", 1.0, Sampling("poisson", 0.001), 1_000_000),)


def test_a_fixed_cohort_stands_for_a_larger_one() -> None:
    """Three of eight, as 100 of 10,000: that is what is drawn in the event."""
    of = Population(10_000, 100)
    promise = PROMISE | {"cohort": 3.0, "stands_for": of}
    made = private(FEDAVG(), vecfl.clip_by_norm(0.5), **promise)
    sim = simulation(made, population(*SIZES), vecfl.uniform(3))
    state, _ = sim.round(sim.start())
    assert state.ledger == (Event("gaussian", 1.0, Sampling("fixed", size=100), 10_000),)


def test_a_capacity_has_a_price_that_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Mean 4 of 8 clients; 6 standard deviations, sqrt(2) each, are above 12."""
    made = private(FEDAVG(), vecfl.clip_by_norm(0.5), **PROMISE)
    with caplog.at_level("INFO", "vecfl"):
        sim = simulation(made, population(*SIZES), vecfl.poisson(0.5, capacity=5))
    assert sim.releases.event.sampling == Sampling("truncated", 0.5, 5)
    assert "a capacity of 5 clients costs epsilon" in caplog.text
    assert "from 12 on it costs next to nothing" in caplog.text


def test_nothing_sees_a_private_sum_without_its_noise() -> None:
    """Not a server side that is chained behind it, and not one that was put in its place."""
    made = private(FEDAVG(), vecfl.clip_by_norm(0.5), **PROMISE)
    spy = vecfl.Transform("spy", server=lambda own, sums, round: (sums, own))
    with pytest.raises(InputError, match="^spy stands behind fedavg, private clip_by_norm 0.5: "):
        vecfl.chain(made, spy)
    for part in ({"upload": FEDAVG().upload}, {"server": FEDAVG().server}):
        with pytest.raises(InputError, match="its upload or server was replaced after `private`"):
            simulation(replace(made, **part), population(*SIZES), vecfl.poisson(0.5))


@pytest.mark.parametrize("name", ["ema", "server_on_plateau", "clients_on_plateau", "dp_sgd"])
def test_what_stands_around_a_private_algorithm_keeps_its_promise(name: str) -> None:
    how: dict[str, Any] = {
        "ema": {"decay": 0.5},
        "dp_sgd": {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3},
    }.get(name, {"metric": "train/loss", "direction": "min"})
    made = private(FEDAVG(), vecfl.clip_by_norm(0.5), **PROMISE)
    sim = simulation(getattr(vecfl, name)(made, **how), population(*SIZES), vecfl.poisson(0.5))
    assert sim.releases.event == Event("gaussian", 1.0, Sampling("poisson", 0.5), 8)


def test_who_stands_around_does_not_see_whether_somebody_came() -> None:
    """A round without a client moves the mean of models, too: to (w0 + w1) / 2."""
    made = private(FEDAVG(), vecfl.clip_by_norm(0.5), **PROMISE)
    sampler = vecfl.sampling.lawful(
        lambda *_: torch.empty(0, dtype=torch.int64), lambda n: Sampling("poisson", 0.5)
    )
    sim = simulation(vecfl.ema(made, 0.5), population(*SIZES), sampler)
    before = sim.start()
    after, _ = sim.round(before)
    assert not torch.equal(before.server["w"], after.server["w"])
    mean = (before.server["w"] + after.server["w"]) / 2
    torch.testing.assert_close(sim.algorithm.model(after.server), mean, rtol=1e-12, atol=1e-15)
    data = population(*SIZES)
    task = vecfl.Task(module(), vecfl.cross_entropy, example=data.examples(2))
    trained = vecfl.replay(made, task, data.examples(4), lr=0.5, batches=vecfl.Batches(4))
    other = simulation(trained, data, sampler)
    replayed, _ = other.round(other.start())
    assert not torch.equal(replayed.server["w"], after.server["w"])


@pytest.mark.parametrize(("delta", "warned"), [(1 / 8, True), (0.124, False)])
def test_a_delta_of_one_client_or_more_is_warned_of(
    delta: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    made = private(FEDAVG(), vecfl.clip_by_norm(0.5), **PROMISE | {"delta": delta})
    simulation(made, population(*SIZES), vecfl.poisson(0.5))
    assert ("is no less than 1 / 8 clients" in caplog.text) == warned


def test_exact_sums_are_refused() -> None:
    """Their grid goes by the examples of the cohort: one client could move the rounding of all."""
    made = private(FEDAVG(), vecfl.clip_by_norm(0.5), **PROMISE)
    with pytest.raises(InputError, match="exact_sums rounds messages to a grid that depends"):
        simulation(made, population(*SIZES), vecfl.poisson(0.5), exact_sums=True)


def test_a_client_that_comes_twice_is_refused() -> None:
    made = private(FEDAVG(), vecfl.clip_by_norm(0.5), **PROMISE | {"cohort": 2.0})
    sampler = vecfl.sampling.lawful(
        lambda *_: torch.tensor([3, 3]), lambda n: Sampling("poisson", 2.0 / n)
    )
    sim = simulation(made, population(*SIZES), sampler)
    with pytest.raises(InputError, match="client 3 stands more than once in the cohort, and fedav"):
        sim.round(sim.start())


def test_a_law_is_not_that_of_what_wraps_a_sampler() -> None:
    inner = vecfl.poisson(0.5)

    @functools.wraps(inner)
    def everybody(eligible: torch.Tensor, seed: int, round: int) -> torch.Tensor:
        return eligible.nonzero().flatten()

    assert law_of(inner, 8) == Sampling("poisson", 0.5) and law_of(everybody, 8) is None


@pytest.mark.parametrize(
    ("sampler", "of"),
    [
        (vecfl.poisson(0.5, 6), Population(1000, 100)),
        (vecfl.everyone(), Population(1000, 1000)),
        (vecfl.uniform(4), Population(1000, 0.4)),
    ],
)
def test_what_cannot_stand_for_a_larger_population_is_refused(sampler: Any, of: Population) -> None:
    cohort = law_of(sampler, 8).expected(8)  # type: ignore[union-attr]
    made = private(FEDAVG(), vecfl.clip_by_norm(0.5), **PROMISE | {"cohort": cohort}, stands_for=of)
    with pytest.raises(InputError, match="stand for a larger population|have a whole number"):
        simulation(made, population(*SIZES), sampler)


def test_a_run_does_not_go_on_under_other_neighbours() -> None:
    made, data = private(FEDAVG(), vecfl.clip_by_norm(0.5), **PROMISE), population(*SIZES)
    sim = simulation(made, data, vecfl.poisson(0.5), slots=4)
    content = sim.save(sim.round(sim.start())[0])
    with pytest.raises(InputError, match="cohorts of a fixed size and of another law"):
        simulation(made, data, vecfl.uniform(4), slots=4).load(content)


def test_who_follows_metrics_is_told_that_epsilon_does_not_count_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    adaptive = vecfl.fedprox_adaptive(start=0.1, patience=2, weights=UNIFORM, **WORK)
    made = private(adaptive, vecfl.clip_by_norm(0.5), **PROMISE)
    sim = simulation(made, population(*SIZES), vecfl.poisson(0.5))
    assert "it follows metrics; where they come from clients they have no noise" in caplog.text
    state, metrics = sim.round(sim.start())
    assert len(sim.observe(state, metrics).ledger) == 1


def samplers() -> dict[str, Any]:
    n = torch.ones(8)
    return {
        "everyone": (vecfl.everyone(), 8.0, "everyone"),
        "uniform": (vecfl.uniform(3), 3.0, "fixed"),
        "fraction": (vecfl.fraction(0.5), 4.0, "fixed"),
        "poisson": (vecfl.poisson(0.5), 4.0, "poisson"),
        "capacity": (vecfl.poisson(0.5, 6), 4.0, "truncated"),
        "between": (vecfl.uniform_between(2, 4), 3.0, None),
        "with replacement": (vecfl.with_replacement(3), 3.0, None),
        "weighted": (vecfl.weighted(3, n), 3.0, None),
        "cyclic": (vecfl.cyclic(4), 4.0, None),
        "turns": (vecfl.separated(vecfl.poisson(0.5), 2), 4.0, None),
        "trace": (vecfl.available(vecfl.poisson(0.5), n[None].bool()), 4.0, None),
        "own": (lambda *_: torch.tensor([0]), 1.0, None),
    }


@pytest.mark.parametrize("name", samplers())
def test_samplers_are_accounted_by_their_law_or_refused(name: str) -> None:
    sampler, cohort, law = samplers()[name]
    made = private(FEDAVG(), vecfl.clip_by_norm(0.5), **PROMISE | {"cohort": cohort})
    if law is None:
        with pytest.raises(InputError, match="no accountant knows how its sampler draws"):
            simulation(made, population(*SIZES), sampler)
        return
    sim = simulation(made, population(*SIZES), sampler)
    assert sim.releases.event.sampling == law_of(sampler, 8)
    assert sim.releases.event.sampling.law == law
    state, _ = sim.round(sim.start())
    assert state.ledger == spend((), sim.releases.event)


def test_a_cohort_must_be_what_the_sampler_draws_but_for_rounding() -> None:
    """poisson(1/3) of 9 clients draws 3 but for 2e-9: its rate is a multiple of 2^-32."""
    data = population(*[3] * 9)
    for cohort, sampler in ((3.01, vecfl.uniform(3)), (2.99, vecfl.poisson(1 / 3))):
        made = private(FEDAVG(), vecfl.clip_by_norm(1.0), **PROMISE | {"cohort": cohort})
        with pytest.raises(InputError) as error:
            simulation(made, data, sampler)
        said = "its sampler draws 3 of 9 clients in the mean; give cohort=3"
        assert str(error.value) == f"fedavg, private clip_by_norm 1.0: {said}"
    made = private(FEDAVG(), vecfl.clip_by_norm(1.0), **PROMISE | {"cohort": 3.0})
    event = simulation(made, data, vecfl.poisson(1 / 3)).releases.event
    assert 0 < 3 - event.sampling.expected(9) < 1e-8


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: private(vecfl.fedavg(**WORK), vecfl.clip_by_norm(1.0), **PROMISE),
            "fedavg: a client's weight has no bound; give weights=uniform_weights or capped(n)",
        ),
        (lambda: private(FEDAVG(), vecfl.qsgd(4), **PROMISE), "private: qsgd 4"),
        (
            lambda: private(vecfl.delayed(FEDAVG(), buffer=2), vecfl.clip_by_norm(1.0), **PROMISE),
            "fedavg, delayed(buffer 2): messages that arrive late would be released in another",
        ),
        (
            lambda: private(
                vecfl.aggregated_by(FEDAVG(), vecfl.coordinate_median()),
                vecfl.clip_by_norm(1.0),
                **PROMISE,
            ),
            "fedavg, coordinate_median: the noise is for a sum; nobody bounds",
        ),
        (
            lambda: private(
                private(FEDAVG(), vecfl.clip_by_norm(1.0), **PROMISE),
                vecfl.clip_by_norm(1.0),
                **PROMISE,
            ),
            "fedavg, private clip_by_norm 1.0",
        ),
        (
            lambda: vecfl.chain(
                private(FEDAVG(), vecfl.clip_by_norm(1.0), **PROMISE), vecfl.qsgd(4)
            ),
            "qsgd 4",
        ),
        (
            lambda: vecfl.delayed(private(FEDAVG(), vecfl.clip_by_norm(1.0), **PROMISE), buffer=2),
            "fedavg, private",
        ),
        (
            lambda: vecfl.aggregated_by(
                private(FEDAVG(), vecfl.clip_by_norm(1.0), **PROMISE), vecfl.coordinate_median()
            ),
            "fedavg, private",
        ),
        (
            lambda: simulation(
                private(vecfl.fednova(weights=UNIFORM, **WORK), vecfl.clip_by_norm(1.0), **PROMISE),
                population(*SIZES),
                vecfl.poisson(0.5),
            ),
            "fednova: its server reads 'length', a sum over clients that no noise is added to",
        ),
        (
            lambda: simulation(
                private(FEDAVG(), vecfl.clip_by_norm(1.0), **PROMISE),
                population(*SIZES),
                vecfl.poisson(0.25),
            ),
            "fedavg, private clip_by_norm 1.0",
        ),
        (
            lambda: simulation(
                private(FEDAVG(), vecfl.clip_by_norm(1.0), **PROMISE),
                population(*SIZES),
                vecfl.poisson(0.5),
                client_dropout=torch.zeros(1, 8, dtype=torch.bool),
            ),
            "fedavg, private clip_by_norm 1.0",
        ),
        (
            lambda: simulation(
                private(FEDAVG(), vecfl.clip_by_l1(1.0), **PROMISE),
                population(*SIZES),
                vecfl.uniform(4),
            ),
            "Laplace noise is accounted under plain Poisson sampling and with everyone",
        ),
        (
            lambda: private(FEDAVG(), vecfl.adaptive_clip(count_noise=0.5), **PROMISE),
            "adaptive_clip(count_noise=0.5): the count alone spends all of noise multiplier 1.0",
        ),
        (
            lambda: private(
                FEDAVG(), vecfl.clip_by_norm(1.0), **PROMISE | {"noise_multiplier": -1.0}
            ),
            "private(noise_multiplier) must be at least 0 and finite, not -1.0",
        ),
        (
            lambda: private(FEDAVG(), vecfl.clip_by_norm(math.inf), **PROMISE),
            "private: clip_by_norm inf",
        ),
        (
            lambda: private(FEDAVG(), 0.5, **PROMISE),  # type: ignore[arg-type]
            "private: 0.5 does not bound what clients send; give a clip, such as clip_by_norm(0.5)",
        ),
        (
            lambda: private(FEDAVG(), vecfl.clip_by_norm(1.0), **PROMISE, stands_for=(10, 1)),
            "private(stands_for=(10, 1)): expected vecfl.privacy.Population(clients, cohort)",
        ),
        (
            lambda: private(FEDAVG(), vecfl.clip_by_norm(1.0), **PROMISE, accountant="gdp"),
            "private(accountant='gdp'): choose pld or rdp",
        ),
        (lambda: Population(10, 11), "Population(clients=10, cohort=11)"),
    ],
)
def test_what_could_not_keep_the_promise_is_refused(build: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        build()
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
