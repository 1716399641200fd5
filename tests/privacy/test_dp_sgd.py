"""DP-SGD on clients: what a step is, whom it reaches, its noise, its bound, and what is accounted.

Statistical tests have fixed seeds; the false-alarm probabilities that they state are over seeds.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import vecfl
from vecfl import Batches, FederatedDataset, InputError, Simulation, Task, dp_sgd
from vecfl.algorithms import Algorithm, Finished, Upload
from vecfl.algorithms.dp_sgd import unseen
from vecfl.engine import graphs
from vecfl.privacy import Event, Sampling, epsilon
from vecfl.privacy.accountant import COARSE, dp_accounting

from ..oracles import test_memory
from ..oracles.loop import Setting
from ..oracles.tasks import PROBLEMS
from .worlds import ALGORITHMS, WORK, population, simulation

SIZES = (6, 0, 3, 9, 1, 5, 4, 12)
NOISE: dict[str, Any] = {"clip": 0.2, "noise_multiplier": 0.6, "delta": 1e-5}
KINDS = [{"backend": "loop", "slots": 2}, {"backend": "vmap", "slots": 3}]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["backend"])


def fedavg(**how: Any) -> Algorithm:
    return vecfl.fedavg(**WORK | how)


def noisy(algorithm: Algorithm | None = None, **how: Any) -> Algorithm:
    return dp_sgd(algorithm or fedavg(), **NOISE | how)


def sent(algorithm: Algorithm, data: FederatedDataset, **how: Any) -> dict[int, Tensor]:
    """What each client sends in round 1, [P]."""
    found = dict[int, Tensor]()

    def upload(state: dict[str, Tensor], done: Finished) -> Upload:
        one = algorithm.upload(state, done)
        found.update(zip(done.client.tolist(), one.update.clone(), strict=True))
        return one

    sim = simulation(replace(algorithm, upload=upload), data, vecfl.everyone(), **how)
    sim.round(sim.start())
    return found


def line(x: list[float], **how: Any) -> Simulation:
    """One client whose model is w x, w = 1 at first, with labels 0: gradients w x^2."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    column = torch.tensor(x, dtype=torch.float64)[:, None]
    data = FederatedDataset({"x": column, "y": 0 * column}, torch.tensor([0, len(x)]))
    example = {"x": torch.ones(2, 1), "y": torch.zeros(2, 1)}
    task = Task(module, vecfl.squared_error, example=example)
    how = {"algorithm": noisy(clip=5.0, noise_multiplier=0.0)} | how
    return Simulation(
        task, data, how.pop("algorithm"), vecfl.everyone(), dtype=torch.float64, **how
    )


@kinds
def test_a_step_by_hand(kind: dict[str, Any]) -> None:
    """B = 4, C = 5, lr = 0.5: gradients 1, 4 and 9 become 1, 4 and 5, of which a step takes
    (1 + 4 + 5) / 4 = 2.5, not their mean 10 / 3. w = 1 - 1.25 = -0.25.

    train/loss is that of the batch: (1 + 4 + 9) / 2 / 3.
    """
    sim = line([1.0, 2.0, 3.0], **kind)
    state, metrics = sim.round(sim.start())
    assert state.server["w"].tolist() == pytest.approx([-0.25], rel=1e-10)
    assert metrics["train/loss"] == pytest.approx(7 / 3)


@kinds
def test_an_example_that_is_not_finite_adds_nothing_and_costs_nobody_the_round(
    kind: dict[str, Any],
) -> None:
    """Of gradients 1, NaN, inf and 4 a step takes 5 / 4: w = 0.375. Who is dropped would tell."""
    sim = line([1.0, math.nan, math.inf, 2.0], **kind)
    state, metrics = sim.round(sim.start())
    assert state.server["w"].tolist() == [0.375]
    assert metrics["train/dropped_clients"] == 0 and metrics["train/loss"] == 5 / 2 / 2


@kinds
def test_losses_beyond_float32_drop_nobody(kind: dict[str, Any]) -> None:
    """x = 1e19: losses of 5e37, whose sum, four times 4 of them, float32 does not hold."""
    sim = line([1e19] * 16)
    task = sim.task.to("cpu", torch.float32)
    sim = Simulation(task, sim.data, sim.algorithm, vecfl.everyone(), **kind)
    state, metrics = sim.round(sim.start())
    assert metrics["train/dropped_clients"] == 0 and state.server["w"].isfinite().all()


@kinds
@pytest.mark.parametrize("last", ["keep", "drop"])
def test_without_noise_and_with_a_wide_clip_it_is_sgd(kind: dict[str, Any], last: Any) -> None:
    """Where batches are full: a short one is divided by B, not by what is in it."""
    sizes = (8, 4, 12, 0) if last == "keep" else (9, 6, 3, 15)
    data, batches = population(*sizes), Batches(4, epochs=2, last=last)
    plain = fedavg(batches=batches, optimizer=vecfl.momentum(), clip=0.4)
    wide = noisy(plain, clip=1e6, noise_multiplier=0.0)
    one, other = sent(plain, data, **kind), sent(wide, data, **kind)
    assert float(one[2 if last == "keep" else 3].norm()) > 0.1
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


MEMORY = {
    "scaffold": {"algorithm": "scaffold"},
    "feddyn": {"algorithm": "feddyn"},
    "fednova": {"algorithm": "fednova", "optimizer": "momentum", "steps": 5, "epochs": None},
}


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("noise", [(0.3, 0.0), (0.5, 0.8)], ids=["clip", "noise"])
def test_what_clients_remember_is_the_loops(name: str, noise: tuple[float, float]) -> None:
    p, kind = PROBLEMS["mlp"], {"backend": "vmap" if noise[1] else "loop", "slots": 3}
    s = Setting(seed=2**40 + 3, examples=noise, **MEMORY[name])
    test_memory.compare(p.build, p.loss, p.clients(), s, kind, name)


def test_noise_is_the_same_in_any_arrangement() -> None:
    """Bits in the loop for any slots and workers, and under vmap from two slots on."""
    data, algorithm = population(*SIZES), noisy(fedavg(batches=Batches(4, epochs=2)))
    for backend, slots in (("loop", (1, 3)), ("vmap", (2, 8))):
        found = [
            sent(algorithm, data, backend=backend, slots=s, workers=w, threads=1, dtype=dtype)
            for s in slots
            for w, dtype in ((1, torch.float32), (2, torch.float32))
        ]
        assert all(f.keys() == found[0].keys() for f in found)
        for k, update in found[0].items():
            assert all(torch.equal(f[k], update) for f in found[1:]), (backend, k)


@kinds
def test_other_clients_keep_their_bits(kind: dict[str, Any]) -> None:
    data = population(*SIZES)
    before = sent(noisy(), data, **kind)
    data.columns["x"][9:18] *= -3.0  # of client 3
    after = sent(noisy(), data, **kind)
    assert not torch.equal(before.pop(3), after.pop(3))
    assert all(torch.equal(before[k], after[k]) for k in before) and len(before) == 7


def test_a_run_that_goes_on_has_its_bits_and_its_passes() -> None:
    data, algorithm = population(*SIZES), noisy(vecfl.scaffold(**WORK))
    sim = simulation(algorithm, data, vecfl.uniform(3))
    state = sim.start()
    for _ in range(2):
        state, _ = sim.round(state)
    content = sim.save(state)
    for _ in range(2):
        state, _ = sim.round(state)
    again = simulation(algorithm, data, vecfl.uniform(3))
    other = again.load(content)
    for _ in range(2):
        other, _ = again.round(other)
    assert torch.equal(state.server["w"], other.server["w"])
    assert torch.equal(state.table.column("passes"), other.table.column("passes"))
    assert sim.releases.told(state) == again.releases.told(other)
    assert sorted(state.table.column("passes").tolist()) != [0.0] * 8
    with pytest.raises(InputError, match=r"noise multiplier 0\.6"):
        simulation(
            noisy(vecfl.scaffold(**WORK), noise_multiplier=0.7), data, vecfl.uniform(3)
        ).load(content)


# What the noise is


def noise_steps(kind: dict[str, Any], steps: int, **how: Any) -> Tensor:
    """How far clients come in `steps` steps, over lr z C / B, [12, 2000]: they have no gradient.

    lr = 0.5, z = 0.6, C = 0.2, B = 8; every client has 3 examples, of zeros.
    """
    module = nn.Linear(50, 40, bias=False)
    data = FederatedDataset(
        {"x": torch.zeros(36, 50), "y": torch.zeros(36, 40)}, 3 * torch.arange(13)
    )
    task = Task(
        module, vecfl.squared_error, example={"x": torch.rand(2, 50), "y": torch.rand(2, 40)}
    )
    rows = dict[int, Tensor]()
    algorithm = noisy(fedavg(batches=Batches(8, steps=steps)))

    def upload(state: dict[str, Tensor], done: Finished) -> Upload:
        found = algorithm.upload(state, done)
        rows.update(zip(done.client.tolist(), found.update.clone(), strict=True))
        return found

    seen = replace(algorithm, upload=upload)
    sim = Simulation(task, data, seen, vecfl.everyone(), dtype=torch.float64, **kind | how)
    sim.round(sim.start())
    return torch.stack([rows[k] for k in range(12)]) / (0.5 * 0.6 * 0.2 / 8)


@kinds
def test_the_law_of_the_noise(kind: dict[str, Any]) -> None:
    """24,000 numbers of one step, and of the next: variance, normality, no correlation.

    Each of the 2 chi-square and 2 Kolmogorov-Smirnov tests fails with probability 1e-6 over seeds,
    each of the correlations, between steps and of 66 pairs of clients and 1 of neighbours, with
    less than 1e-6: together less than 1e-4.
    """
    first = noise_steps(kind, 1)
    second = noise_steps(kind, 2) - first
    for drawn in (first, second):
        n = drawn.numel()
        low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], n)
        assert low < float(drawn.square().sum()) < high
        assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-6
    bound = 4.9  # P(|N(0, 1)| > 4.9) = 9.6e-7
    assert abs(float((first * second).sum())) < bound * math.sqrt(first.numel())
    assert abs(float((first[:, 1:] * first[:, :-1]).sum())) < bound * math.sqrt(first.numel())
    between = (first @ first.T).triu(1) / math.sqrt(2000)
    assert float(between.abs().max()) < bound
    assert not torch.equal(first, noise_steps(kind, 1, seed=1))


def test_rounds_have_noise_of_their_own() -> None:
    """Without a gradient a model moves by noise alone."""
    sim = line([0.0] * 4, algorithm=noisy())
    first, _ = sim.round(start := sim.start())
    second, _ = sim.round(first)
    moves = [float(b.server["w"] - a.server["w"]) for a, b in ((start, first), (first, second))]
    assert moves[0] != moves[1] and 0 not in moves


def test_an_example_moves_a_step_by_lr_c_over_b() -> None:
    """Neighbours: an example of any size, anywhere in its batch, or one without a gradient (NaN).

    The steps differ by at most lr C / B; the largest gradients come to it.
    """
    data, worst, bound = population(6), 0.0, 0.5 * 0.2 / 4
    algorithm = noisy(fedavg(batches=Batches(4, steps=1)))
    kept = data.columns["x"].clone()
    for kind in KINDS:
        for place in range(4):
            for size in (0.1, 1.0, 1e4):
                found = []
                for factor in (size, math.nan):
                    data.columns["x"].copy_(kept)
                    data.columns["x"][place] *= factor
                    found.append(sent(algorithm, data, **kind)[0])
                worst = max(worst, float((found[0] - found[1]).norm()))
    assert 0.99 * bound <= worst <= bound * (1 + 1e-12)


# What is accounted


PASSES = {  # by hand: sizes 6, 0, 3, 9, 1, 5, 4, 12 in batches of 4 are 2, 0, 1, 3, 1, 2, 1, 3
    "epochs": (Batches(4, epochs=2), [2, 0, 2, 2, 2, 2, 2, 2]),
    "steps": (Batches(4, steps=4), [2, 0, 4, 2, 4, 2, 4, 2]),
    "drop": (Batches(4, steps=3, last="drop"), [3, 0, 0, 2, 0, 3, 3, 1]),  # 1, 0, 0, 2, 0, 1, 1, 3
    "cap": (Batches(4, steps=3, max_examples=5), [2, 0, 3, 2, 3, 2, 3, 2]),
    "by client": (Batches(4, epochs=[3, 3, 0, 1, 2, 1, 0, 5]), [3, 0, 0, 1, 2, 1, 0, 5]),
}


@pytest.mark.parametrize("name", PASSES)
def test_passes_by_hand(name: str) -> None:
    """A round adds ceil(steps / batches of an epoch) to each client of its cohort."""
    batches, once = PASSES[name]
    cohorts = [[0, 1, 2, 3, 4, 5, 6, 7], [], [3, 0, 6]]

    def sampler(eligible: Tensor, seed: int, round: int) -> Tensor:
        return torch.tensor(cohorts[round], dtype=torch.int64)

    algorithm = noisy(fedavg(batches=batches))
    sim = simulation(algorithm, population(*SIZES), sampler)
    state = sim.start()
    for _ in range(3):
        state, _ = sim.round(state)
    passes = [n * (2 if k in cohorts[2] else 1) for k, n in enumerate(once)]
    assert state.table.column("passes").tolist() == passes
    told = sim.releases.told(state, exact=True)
    found = vecfl.example_epsilon(algorithm, state)
    assert told == {
        "privacy/example_epsilon": float(found.max()),
        "privacy/example_delta": 1e-5,
    }
    for p, one in {p: e for p, e in zip(passes, found.tolist(), strict=True)}.items():
        z = 0.6 / math.sqrt(p) if p else 1e3  # p Gaussian releases are one
        right = epsilon((Event("gaussian", z, Sampling("everyone"), 1),), 1e-5, step=COARSE)
        assert one == pytest.approx(right if p else 0.0, rel=1e-6)


def test_epsilon_by_hand() -> None:
    """9 passes at z = 6 are one Gaussian release at z = 2, whose delta at epsilon is

    Phi(1 / (2 z) - epsilon z) - e^epsilon Phi(-1 / (2 z) - epsilon z)

    (Balle and Wang, ICML 2018, theorem 8).
    """
    algorithm = noisy(fedavg(batches=Batches(4, epochs=9)), noise_multiplier=6.0)
    sim = simulation(algorithm, population(4, 0), vecfl.everyone())
    state, _ = sim.round(sim.start())
    found, nobody = vecfl.example_epsilon(algorithm, state).tolist()
    z, cdf = 2.0, stats.norm.cdf
    delta = cdf(0.5 / z - found * z) - math.exp(found) * cdf(-0.5 / z - found * z)
    assert delta == pytest.approx(1e-5, rel=1e-2) and nobody == 0
    assert found <= sim.releases.told(state)["privacy/example_epsilon"] <= 1.02 * found


def test_without_noise_epsilon_is_infinite_once_a_client_has_trained() -> None:
    sim = simulation(noisy(noise_multiplier=0.0), population(4, 0), vecfl.everyone())
    start = sim.start()
    assert sim.releases.told(start)["privacy/example_epsilon"] == 0
    state, _ = sim.round(start)
    assert sim.releases.told(state)["privacy/example_epsilon"] == math.inf


def test_a_client_that_diverges_has_spent_its_passes() -> None:
    """lr = 1e300 overflows: nothing is sent or kept but the count, for what it released shows."""
    algorithm = noisy(vecfl.scaffold(lr=1e300, batches=Batches(4, epochs=3)), clip=1e9)
    sim = simulation(algorithm, population(8, 4), vecfl.everyone())
    state, metrics = sim.round(sim.start())
    assert metrics["train/dropped_clients"] == 2
    assert state.table.column("passes").tolist() == [3.0, 3.0]
    assert not state.table.column("variate").any()


# With whom it goes


RUN = {
    "fedprox": lambda: noisy(vecfl.fedprox(mu=0.3, **WORK)),
    "fedadam": lambda: noisy(vecfl.fedadam(server_lr=0.1, **WORK)),
    "adaptive": lambda: noisy(vecfl.fedprox_adaptive(**WORK)),
    "dga": lambda: noisy(vecfl.dga(weighting="update_rms", **WORK)),
    "delayed": lambda: vecfl.delayed(noisy(), vecfl.stale(0.5)),
    "noisy delayed": lambda: noisy(vecfl.delayed(fedavg(), vecfl.stale(0.5))),
    "chain": lambda: vecfl.chain(noisy(), vecfl.clip_by_norm(0.1), vecfl.qsgd(4)),
    "feedback": lambda: vecfl.chain(noisy(), vecfl.error_feedback(vecfl.top_k(0.3))),
    "median": lambda: vecfl.aggregated_by(noisy(), vecfl.coordinate_median()),
    "ema": lambda: vecfl.ema(noisy(), 0.9),
    "plateau": lambda: vecfl.clients_on_plateau(noisy(), "train/loss", "min"),
    "local": lambda: vecfl.chain(noisy(), vecfl.local_gaussian(1.0, 1.0, 1e-5)),
}


@pytest.mark.parametrize("name", RUN)
def test_what_stands_around_it_runs_and_counts(name: str) -> None:
    sim = simulation(RUN[name](), population(*SIZES), vecfl.everyone(), backend="vmap")
    state = sim.start()
    for _ in range(2):
        state, metrics = sim.round(state)
        state = sim.observe(state, metrics)
    assert state.table.column("passes").tolist() == [2, 0, 2, 2, 2, 2, 2, 2]
    assert sim.releases.told(state)["privacy/example_epsilon"] > 0
    assert state.server["w"].isfinite().all()


def test_clients_and_examples_are_private_at_once() -> None:
    inner = noisy(ALGORITHMS["scaffold"]())
    made = vecfl.private(
        inner, vecfl.clip_by_norm(0.5), noise_multiplier=1.0, cohort=8.0, delta=1e-3
    )
    sim = simulation(made, population(*SIZES), vecfl.everyone())
    state, _ = sim.round(sim.start())
    told = sim.releases.told(state)
    assert told["privacy/delta"] == 1e-3 and told["privacy/example_delta"] == 1e-5
    assert told["privacy/epsilon"] < told["privacy/example_epsilon"]


def test_lower_precision_clips_what_it_computes() -> None:
    """bf16 rounds gradients before they are clipped: the bound holds, and the step is near."""
    data, exact = population(4), noisy(clip=0.05, noise_multiplier=0.0)
    for kind in KINDS:
        right = sent(exact, data, **kind)[0]
        found = sent(exact, data, **kind, dtype=torch.float32, precision="bf16")[0].double()
        assert 0 < float((found - right).norm()) < 0.05 * float(right.norm())
        assert float(found.norm()) <= 0.5 * 0.05 * (1 + 1e-6)


def test_auto_takes_a_backend_that_has_gradients_of_examples() -> None:
    plain = simulation(fedavg(), population(*SIZES), vecfl.everyone(), backend="stacked")
    assert plain.arrangement.backend == "stacked"
    how: dict[str, Any] = {"workers": 1, "threads": 1}
    sim = simulation(noisy(), population(*SIZES), vecfl.everyone(), backend="auto", **how)
    assert sim.arrangement.backend in ("loop", "vmap")


def test_messages_do_not_see_losses() -> None:
    """Also where weights read them in some rounds only: they see none, and the number of visits."""
    seen = list[Finished]()

    def weights(done: Finished) -> Tensor:
        seen.append(done)
        return done.examples * (1 if done.round.number == 0 else 1 + done.loss)

    sim = simulation(noisy(fedavg(weights=weights)), population(5, 3), vecfl.everyone())
    seen.clear()
    state, metrics = sim.round(sim.start())
    sim.round(state)
    assert metrics["train/loss"] > 0.1
    assert all(not done.loss.any() for done in seen)
    visits = {int(k): int(w) for d in seen for k, w in zip(d.client, d.weight, strict=True)}
    assert visits == {0: 5, 1: 3}
    done = replace(seen[0], loss=torch.ones(1), weight=torch.ones(1), seen=torch.tensor([7]))
    assert (unseen(done).loss.item(), unseen(done).weight.item()) == (0.0, 7.0)


BUILDERS = {
    "clip": (lambda: noisy(clip=0.0), "dp_sgd(clip) must be positive and finite, not 0.0"),
    "inf": (lambda: noisy(clip=math.inf), "dp_sgd(clip) must be positive and finite, not inf"),
    "noise": (
        lambda: noisy(noise_multiplier=-1.0),
        "dp_sgd(noise_multiplier) must be at least 0 and finite, not -1.0",
    ),
    "delta": (lambda: noisy(delta=1.0), "dp_sgd(delta) must be between 0 and 1, not 1.0"),
    "twice": (lambda: noisy(noisy()), "fedavg, dp_sgd: has dp_sgd already"),
    "full": (
        lambda: noisy(vecfl.fedsgd(lr=1.0)),
        "dp_sgd: fedsgd adds up gradients over a whole epoch; give Batches(size) with a step for "
        "each batch",
    ),
    "wrap": (
        lambda: noisy(fedavg(batches=Batches(4, last="wrap"))),
        "dp_sgd: a batch that is wrapped around visits an example twice in an epoch, which is "
        "accounted once; give Batches(last='keep') or 'drop'",
    ),
    "tokens": (
        lambda: noisy(fedavg(batches=Batches(4, max_tokens=9, tokens=torch.ones(3).long()))),
        "dp_sgd: under max_tokens the length of an example says who else takes part; give "
        "max_examples",
    ),
    "before": (
        lambda: noisy(vecfl.scaffold(option=1, **WORK)),
        "dp_sgd: clients of scaffold pass over their data once more, without noise; give option=2",
    ),
    "statistics": (
        lambda: noisy(vecfl.dga(weighting="variance", **WORK)),
        "dp_sgd: dga weighs clients by statistics of their steps, which no noise is added to; give "
        "another weighting, such as update_rms or uniform",
    ),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_what_a_builder_refuses(name: str) -> None:
    make, why = BUILDERS[name]
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value) == why


LOSSES = (
    ": what its clients send depends on their losses, or on how much their examples count in "
    "these, which no noise is added to; give weights such as by_examples, or a weighting such as "
    "update_rms"
)


@pytest.mark.parametrize(
    "name, make",
    [
        ("dga, dp_sgd", lambda: noisy(vecfl.dga(**WORK))),
        ("fedavg, dp_sgd", lambda: noisy(fedavg(weights=vecfl.by_tokens))),
        ("fedavg, dp_sgd", lambda: noisy(fedavg(weights=lambda done: 1 + done.loss))),
    ],
    ids=["dga", "tokens", "losses"],
)
def test_messages_that_depend_on_losses_are_refused(name: str, make: Any) -> None:
    with pytest.raises(InputError) as error:
        simulation(make(), population(*SIZES), vecfl.everyone())
    assert str(error.value) == name + LOSSES


@pytest.mark.parametrize("backend", ["loop", "vmap", "stacked", "auto"])
def test_modules_with_changing_buffers_are_refused(backend: str) -> None:
    from ..oracles.bridge import dataset

    p = PROBLEMS["buffers"]
    data = dataset(p.clients())
    task = Task(p.build(), vecfl.cross_entropy, example=data.examples(2))
    with pytest.raises(InputError) as error:
        Simulation(task, data, noisy(), vecfl.everyone(), backend=backend, dtype=torch.float64)
    assert str(error.value) == (
        "dp_sgd: buffer 'calls' changes in training, and nothing bounds what an example does to "
        "it; use a module without such buffers"
    )


def test_without_the_accountants_library_no_round_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a delta that nothing has been accounted at before."""
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    dp_accounting.cache_clear()
    with pytest.raises(InputError, match=r'pip install "vecfl\[privacy\]"$'):
        simulation(noisy(delta=1.2345e-5), population(*SIZES), vecfl.everyone())


def test_arrangements_that_cannot_do_it_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = population(*SIZES)
    with pytest.raises(InputError, match="backend 'stacked' has no gradients of single examples"):
        simulation(noisy(), data, vecfl.everyone(), backend="stacked")
    with pytest.raises(InputError, match="fedavg, dp_sgd keeps rows of clients"):
        simulation(noisy(), data, vecfl.everyone(), workers=2, processes=2)
    with pytest.raises(InputError, match=r"^graphs: steps of dp_sgd are not captured"):
        graphs.make_graphs(None, noisy().rule, "vmap")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="draw without replacement"):
        sim = simulation(noisy(), data, lambda *_: torch.tensor([3, 3]))
        sim.round(sim.start())
    with pytest.raises(InputError, match="fedavg: promises nothing about examples; use dp_sgd"):
        vecfl.example_epsilon(fedavg(), sim.start())


def test_a_rule_without_the_noise_is_refused() -> None:
    made = noisy(clip=5.0, noise_multiplier=1.0)
    for change in ({"examples": None}, {"batches": vecfl.Batches(4, last="wrap")}):
        changed = replace(made, rule=replace(made.rule, **change))
        with pytest.raises(InputError, match="without the noise of dp_sgd|wrapped around"):
            line([1.0, 2.0, 3.0], algorithm=changed, backend="loop")


def test_passes_at_another_noise_are_not_gone_on_with(caplog: pytest.LogCaptureFixture) -> None:
    """Not even as a changed run, for the passes would be told at the new noise."""
    before = line([1.0, 2.0, 3.0], algorithm=noisy(clip=5.0, noise_multiplier=0.3), backend="loop")
    content = before.save(before.round(before.start())[0])
    after = line([1.0, 2.0, 3.0], algorithm=noisy(clip=5.0, noise_multiplier=9.0), backend="loop")
    with pytest.raises(InputError, match="passes are counted at one noise; begin anew"):
        after.load(content, changed=True)


def test_who_follows_metrics_is_told(caplog: pytest.LogCaptureFixture) -> None:
    made = vecfl.fedprox_adaptive(lr=0.1, batches=vecfl.Batches(4))
    made = vecfl.dp_sgd(made, clip=1.0, noise_multiplier=1.0, delta=1e-3)
    line([1.0, 2.0], algorithm=made, backend="loop")
    assert "it follows metrics; where they come from clients they have no noise" in caplog.text
