"""Server optimizers: against numbers by hand, the printed algorithm, and torch.optim."""

import math

import pytest
import torch

import vecfl
from vecfl.errors import InputError
from vecfl.layout import Entry, Layout
from vecfl.server_optim import (
    ServerOptimizer,
    clipped,
    fedopt_adagrad,
    fedopt_adam,
    fedopt_yogi,
    norm,
    scheduled,
    server_adam,
    server_adamax,
    server_adamw,
    server_lamb,
    server_lars,
    server_momentum,
    server_sgd,
)

from .oracles.bridge import dataset
from .oracles.tasks import PROBLEMS

UPDATES = torch.tensor([[1.0, -2.0, 0.0], [0.5, 4.0, 0.0], [-1.5, 0.1, 3.0]], dtype=torch.float64)
# Two tensors, [2] and [1]; the second begins at 2, and its first two updates are 0.
LAYOUT = Layout((Entry("a", (2,), 0, torch.float64), Entry("b", (1,), 2, torch.float64)))
START = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def run(optimizer: ServerOptimizer, updates: torch.Tensor = UPDATES) -> list[torch.Tensor]:
    w, models = START.clone(), []
    state = optimizer.init(w)
    for update in updates:
        w, state = optimizer.step(w, update, state, LAYOUT, 0)
        models.append(w)
    return models


def test_server_sgd() -> None:
    w, update = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])
    assert server_sgd().init(w) == {}
    new, state = server_sgd(0.5).step(w, update, {}, LAYOUT, 0)
    assert new.tolist() == [0.75, 2.5] and state == {}
    assert server_sgd().step(w, update, {}, LAYOUT, 0)[0].tolist() == [0.5, 3.0]
    assert w.tolist() == [1, 2]


# One parameter, tau = 0.5, lr = 1, updates 1 and then 2. v starts at tau^2 = 1/4.
# Adagrad, beta1 = 0: m = 1, v = 1/4 + 1 = 5/4; then m = 2, v = 5/4 + 4 = 21/4.
# Adam, betas (1/2, 3/4): m = 1/2, v = 3/16 + 1/4 = 7/16; then m = 5/4, v = 21/64 + 1 = 85/64.
# Yogi, betas (1/2, 3/4): v = 1/4 - 1/4 * 1 * sign(1/4 - 1) = 1/2; then v = 1/2 + 1/4 * 4 = 3/2.
BY_HAND = {
    "adagrad": (fedopt_adagrad(1.0, 0.0, 0.5), [(1, 5 / 4), (2, 21 / 4)]),
    "adam": (fedopt_adam(1.0, (0.5, 0.75), 0.5), [(1 / 2, 7 / 16), (5 / 4, 85 / 64)]),
    "yogi": (fedopt_yogi(1.0, (0.5, 0.75), 0.5), [(1 / 2, 1 / 2), (5 / 4, 3 / 2)]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_adaptive_optimizers_by_hand(name: str) -> None:
    optimizer, moments = BY_HAND[name]
    w, state = torch.zeros(1, dtype=torch.float64), None
    state = optimizer.init(w)
    expected = 0.0
    for update, (m, v) in zip((1.0, 2.0), moments, strict=True):
        one = torch.tensor([update], dtype=torch.float64)
        w, state = optimizer.step(w, one, state, LAYOUT, 0)
        expected -= m / (math.sqrt(v) + 0.5)
        assert state["m"].item() == pytest.approx(m)
        assert state["v"].item() == pytest.approx(v)
        assert w.item() == pytest.approx(expected)


def test_yogi_lets_its_accumulator_fall_by_the_square_alone() -> None:
    # v = 4 and update 1: v - (1/4) * 1 * sign(4 - 1) = 3.75, where Adam's would be 3.25.
    optimizer = fedopt_yogi(1.0, (0.5, 0.75), 0.5, start=4.0)
    w = torch.zeros(1, dtype=torch.float64)
    _, state = optimizer.step(w, torch.ones_like(w), optimizer.init(w), LAYOUT, 0)
    assert state["v"].item() == 3.75


@pytest.mark.parametrize("make", [fedopt_adagrad, fedopt_adam, fedopt_yogi])
def test_first_accumulator_is_tau_squared_or_as_given(make) -> None:
    w = torch.zeros(2, dtype=torch.float64)
    assert make(1.0, tau=0.25).init(w)["v"].tolist() == [0.0625, 0.0625]
    assert make(1.0, tau=0.25, start=0.0).init(w)["v"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "ours,theirs",
    [
        (server_sgd(0.3), lambda p: torch.optim.SGD(p, 0.3)),
        (server_momentum(0.3, 0.8), lambda p: torch.optim.SGD(p, 0.3, 0.8)),
        (
            server_adam(0.3, (0.7, 0.95), 1e-4),
            lambda p: torch.optim.Adam(p, 0.3, (0.7, 0.95), 1e-4),
        ),
        (
            server_adamw(0.3, (0.7, 0.95), 1e-4, 0.2),
            lambda p: torch.optim.AdamW(p, 0.3, (0.7, 0.95), 1e-4, 0.2),
        ),
        (
            server_adamax(0.3, (0.7, 0.95), 1e-4),
            lambda p: torch.optim.Adamax(p, 0.3, (0.7, 0.95), 1e-4),
        ),
    ],
    ids=["sgd", "momentum", "adam", "adamw", "adamax"],
)
def test_as_torch_optim(ours: ServerOptimizer, theirs) -> None:
    p = torch.nn.Parameter(START.clone())
    optimizer = theirs([p])
    for update, w in zip(UPDATES, run(ours), strict=True):
        p.grad = update.clone()
        optimizer.step()
        torch.testing.assert_close(w, p.detach(), rtol=1e-12, atol=1e-12)


# One parameter at 1, lr = 1/2, betas (1/2, 1/2), eps 0, updates 1 and then 2.
# AdamW, decay 1/2: both moments without bias are 1; w = 1 - 1/2 (1/2 * 1 + 1) = 1/4.
#   Then m = 1/4 + 1 = 5/4 and v = 1/4 + 2 = 9/4, without bias 5/3 and 3:
#   w = 1/4 - 1/2 (1/8 + 5/3 / sqrt(3)).
# Adamax: m = 1/2, v = 1; w = 1 - 1/2 / (1/2) * 1/2 / 1 = 1/2. Then m = 5/4, v = max(1/2, 2):
#   w = 1/2 - 1/2 / (3/4) * 5/4 / 2 = 1/12.
@pytest.mark.parametrize(
    "optimizer,expected",
    [
        (server_adamw(0.5, (0.5, 0.5), 0.0, 0.5), [0.25, 0.25 - 0.5 * (0.125 + 5 / 3 / 3**0.5)]),
        (server_adamax(0.5, (0.5, 0.5), 0.0), [0.5, 1 / 12]),
    ],
    ids=["adamw", "adamax"],
)
def test_relatives_of_adam_by_hand(optimizer: ServerOptimizer, expected: list[float]) -> None:
    w = torch.ones(1, dtype=torch.float64)
    state = optimizer.init(w)
    for t, value in enumerate(expected):
        w, state = optimizer.step(w, torch.full_like(w, t + 1), state, LAYOUT, t)
        assert w.item() == pytest.approx(value, rel=1e-14)


def by_tensor(name: str, updates: torch.Tensor) -> list[torch.Tensor]:
    """LARS and LAMB as the papers print them, one tensor after the other."""
    models, parts = [], [START[:2].clone(), START[2:].clone()]
    kept = [[torch.zeros_like(w), torch.zeros_like(w)] for w in parts]
    for t, update in enumerate(updates, start=1):
        for w, (m, v), g in zip(parts, kept, (update[:2], update[2:]), strict=True):
            if name == "lars":
                rate = 0.1 * w.norm() / (g.norm() + 0.2 * w.norm())
                m.copy_(0.8 * m + 0.5 * rate * (g + 0.2 * w))
                w -= m
            else:
                m.copy_(0.7 * m + 0.3 * g)
                v.copy_(0.95 * v + 0.05 * g * g)
                r = (m / (1 - 0.7**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-4) + 0.2 * w
                w -= 0.5 * w.norm() / r.norm() * r
        models.append(torch.cat(parts))
    return models


LAYERWISE = {
    "lars": server_lars(0.5, 0.8, 0.2, trust=0.1),
    "lamb": server_lamb(0.5, (0.7, 0.95), 1e-4, 0.2),
}


@pytest.mark.parametrize("name", LAYERWISE)
def test_layers_have_rates_of_their_own(name: str) -> None:
    found, right = run(LAYERWISE[name]), by_tensor(name, UPDATES)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


# Two tensors, w = (3, 4) and (2), updates (0, 5) and (1), lr = 1/2.
# LARS, beta 1/2, decay 0, trust 1: |w| / |update| is 5 / 5 and 2 / 1, so that m = (0, 5/2) and (1),
#   w = (3, 3/2) and (1). Again with update 0: m = (0, 5/4) and (1/2), w = (3, 1/4) and (1/2).
# LAMB, betas (1/2, 1/2), eps 0, decay 0: Adam's first step is the sign, (0, 1) and (1), where 0 / 0
#   stands for a parameter that never had a gradient; eps makes it 0. |w| / |u| is 5 and 2:
#   w = (3, 4 - 5/2) and (2 - 1).
def test_rates_of_layers_by_hand() -> None:
    w = torch.tensor([3.0, 4.0, 2.0], dtype=torch.float64)
    update = torch.tensor([0.0, 5.0, 1.0], dtype=torch.float64)
    lars, lamb = server_lars(0.5, 0.5, trust=1.0), server_lamb(0.5, (0.5, 0.5), 1e-300)
    once, state = lars.step(w, update, lars.init(w), LAYOUT, 0)
    assert once.tolist() == [3, 1.5, 1]
    assert lars.step(once, 0 * update, state, LAYOUT, 1)[0].tolist() == [3, 0.25, 0.5]
    assert lamb.step(w, update, lamb.init(w), LAYOUT, 0)[0].tolist() == [3, 1.5, 1]


# A tensor at zero takes the plain step: LARS 0.5 * (0, 4), LAMB 0.5 * (0, 1); without an update it
# stays, where LARS' decay 1/4 has the paper's ratio 1/16 * 2 / (0 + 1/4 * 2) = 1/4:
# 2 - 1/2 * 1/4 * 1/4 * 2.
@pytest.mark.parametrize(
    "optimizer,expected",
    [
        (server_lars(0.5, 0.5, 0.25, trust=0.0625), [0, -2, 2 - 1 / 16]),
        (server_lars(0.5, 0.5), [0, -2, 2]),
        (server_lamb(0.5, (0.5, 0.5), 1e-300), [0, -0.5, 2]),
    ],
)
def test_tensors_at_zero_move(optimizer: ServerOptimizer, expected: list[float]) -> None:
    w = torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)
    update = torch.tensor([0.0, 4.0, 0.0], dtype=torch.float64)
    assert optimizer.step(w, update, optimizer.init(w), LAYOUT, 0)[0].tolist() == expected


@pytest.mark.parametrize("make", [server_adam, server_adamw, server_adamax, server_lamb])
def test_a_number_without_gradient_stays_where_eps_is_0(make) -> None:
    """0 / 0 is 0; the third number moves in round 3, when its first update comes."""
    more = () if make in (server_adam, server_adamax) else (0.0,)
    w = run(make(0.1, (0.9, 0.999), 0.0, *more))
    assert [m[2].item() for m in w[:2]] == [2, 2] and w[2][2] < 2
    assert all(m.isfinite().all() for m in w) and (w[0][:2] != START[:2]).all()


def test_clipping_takes_the_norm_over_all_tensors() -> None:
    # |(2, -1, 2)| = 3: a limit of 1.5 halves it, one of 3 or more leaves its bits.
    w, update = torch.zeros(3, dtype=torch.float64), torch.tensor([2.0, -1.0, 2.0]).double()
    for limit, scale in ((1.5, 0.5), (3.0, 1), (math.inf, 1)):
        optimizer = clipped(server_sgd(), limit)
        moved, _ = optimizer.step(w, update, {}, LAYOUT, 0)
        assert moved.tolist() == (-scale * update).tolist()
        assert optimizer.step(w, 0 * update, {}, LAYOUT, 0)[0].tolist() == [0, 0, 0]
    assert clipped(server_sgd(), 1.5).name == "sgd(1.0), clipped to 1.5"


def test_norms_have_the_same_bits_for_any_number_of_threads() -> None:
    x, before = torch.linspace(-1, 2, 10**6, dtype=torch.float64), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(norm(x).item())
    finally:
        torch.set_num_threads(before)
    assert found == [found[0]] * 3
    assert found[0] == pytest.approx(1e3, rel=1e-5)  # the mean of x^2 is (8 + 1) / 9
    assert norm(torch.zeros(0)).item() == 0


# What torch's schedulers make of the same optimizers, eight rounds.
SCHEDULES = {
    "step": (vecfl.step_decay(3, 0.5), lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5)),
    "multi-step": (
        vecfl.multi_step([1, 2, 6], 0.3),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 2, 6], 0.3),
    ),
    "cosine": (
        vecfl.cosine(8, 0.1),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8, 0.1 * 0.3),
    ),
    "warm-up": (
        vecfl.linear_warmup(4),
        lambda o: torch.optim.lr_scheduler.LinearLR(o, 1 / 4, total_iters=3),
    ),
}
TORCH = {
    "sgd": (server_sgd(0.3), lambda p: torch.optim.SGD(p, 0.3)),
    "momentum": (server_momentum(0.3, 0.8), lambda p: torch.optim.SGD(p, 0.3, 0.8)),
    "adam": (server_adam(0.3), lambda p: torch.optim.Adam(p, 0.3)),
    "adamw": (
        server_adamw(0.3, weight_decay=0.2),
        lambda p: torch.optim.AdamW(p, 0.3, weight_decay=0.2),
    ),
    "adamax": (server_adamax(0.3), lambda p: torch.optim.Adamax(p, 0.3)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", TORCH)
def test_schedules_as_in_torch(name: str, schedule: str) -> None:
    (ours, theirs), (factor, scheduler) = TORCH[name], SCHEDULES[schedule]
    p = torch.nn.Parameter(START.clone())
    optimizer = theirs([p])
    steps, ours = scheduler(optimizer), scheduled(ours, factor)
    w, state = START.clone(), ours.init(START)
    for t in range(8):
        update = UPDATES[t % 3] / (1 + t)
        assert ours.lr(t) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        p.grad = update.clone()
        optimizer.step()
        steps.step()
        w, state = ours.step(w, update, state, LAYOUT, t)
        torch.testing.assert_close(w, p.detach(), rtol=1e-12, atol=1e-12)


def test_a_constant_schedule_has_the_same_bits() -> None:
    for optimizer in (server_adam(0.3), *LAYERWISE.values()):
        plain, around = run(optimizer), run(scheduled(optimizer, lambda round: 1.0))
        assert all(torch.equal(a, b) for a, b in zip(plain, around, strict=True))


def test_corrected_adam_differs_from_fedadam() -> None:
    plain = fedopt_adam(0.3, (0.7, 0.95), 1e-4, start=0.0)
    assert not torch.allclose(run(plain)[0], run(server_adam(0.3, (0.7, 0.95), 1e-4))[0])


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: server_sgd(-1), "server_sgd(lr) must be at least 0 and finite, not -1"),
        (lambda: server_momentum(1, 1.0), "server_momentum(beta) must be in [0, 1), not 1.0"),
        (lambda: server_adam(1, (0.9, 1.5)), "server_adam(betas) must be in [0, 1), not 1.5"),
        (lambda: fedopt_adam(1, tau=0), "fedadam(tau) must be positive, not 0"),
        (lambda: fedopt_yogi(1, start=-1), "fedyogi(start) must be at least 0 and finite, not -1"),
        (lambda: fedopt_yogi(1, (0.9, 1)), "fedyogi(betas) must be in [0, 1), not 1"),
        (
            lambda: server_adamw(weight_decay=-1),
            "server_adamw(weight_decay) must be at least 0 and finite, not -1",
        ),
        (lambda: server_adamax(1, (1, 0)), "server_adamax(betas) must be in [0, 1), not 1"),
        (lambda: server_lars(trust=0), "server_lars(trust) must be positive, not 0"),
        (lambda: server_lars(-1), "server_lars(lr) must be at least 0 and finite, not -1"),
        (lambda: server_lamb(1, (0.9, -0.1)), "server_lamb(betas) must be in [0, 1), not -0.1"),
        (lambda: clipped(server_sgd(), 0.0), "clipped(limit) must be positive, not 0.0"),
        (
            lambda: scheduled(server_sgd(), lambda round: -2.0).step(START, START, {}, LAYOUT, 4),
            "the schedule of the server gives -2.0 in round 5: at least 0 and finite",
        ),
        (
            lambda: server_adam(eps=-1e-8),
            "server_adam(eps) must be at least 0 and finite, not -1e-08",
        ),
        (lambda: server_lamb(eps=-1.0), "server_lamb(eps) must be at least 0 and finite, not -1.0"),
        (lambda: server_sgd(math.inf), "server_sgd(lr) must be at least 0 and finite, not inf"),
        (
            lambda: server_adamw(weight_decay=math.inf),
            "server_adamw(weight_decay) must be at least 0 and finite, not inf",
        ),
        (
            lambda: server_lars(trust=math.inf),
            "server_lars(trust) must be at least 0 and finite, not inf",
        ),
        (lambda: vecfl.adam(eps=-1.0), "adam(eps) must be at least 0 and finite, not -1.0"),
        (lambda: vecfl.adamw(eps=math.nan), "adamw(eps) must be at least 0 and finite, not nan"),
        (lambda: fedopt_adagrad(math.nan), "fedadagrad(lr) must be at least 0 and finite, not nan"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value) == message


ALGORITHMS = {
    "fedavgm": (vecfl.fedavgm, server_momentum(0.5, 0.9), {"server_lr": 0.5}),
    "fedadagrad": (vecfl.fedadagrad, fedopt_adagrad(0.1), {"server_lr": 0.1}),
    "fedadam": (vecfl.fedadam, fedopt_adam(0.1), {"server_lr": 0.1}),
    "fedyogi": (vecfl.fedyogi, fedopt_yogi(0.1), {"server_lr": 0.1}),
}


@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize("task", ["mlp", "buffers"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_step_the_server_by_the_mean_update(name: str, task: str, backend: str) -> None:
    """Three rounds: each model follows from the last one and FedAvg's from there."""
    make, optimizer, server = ALGORITHMS[name]
    problem = PROBLEMS[task]
    data = dataset(problem.clients())
    parts = vecfl.Task(problem.build(), problem.loss, example=data.examples(2)), data
    clients = {"lr": 0.1, "batches": vecfl.Batches(4)}

    def simulate(algorithm: vecfl.Algorithm) -> vecfl.Simulation:
        everyone = vecfl.everyone()
        return vecfl.Simulation(*parts, algorithm, everyone, backend=backend, dtype=torch.float64)

    sim, plain = simulate(make(**server, **clients)), simulate(vecfl.fedavg(**clients))
    assert sim.algorithm.name == name
    state, trainable = sim.start(), sim.task.layout.trainable
    memory = optimizer.init(state.server["w"][:trainable])
    for t in range(3):
        w = state.server["w"]
        mean, _ = plain.round(vecfl.State(t, plain.algorithm.init(w, sim.task.layout)))
        state, _ = sim.round(state)
        update = w - mean.server["w"]
        expected, memory = optimizer.step(
            w[:trainable], update[:trainable], memory, sim.task.layout, t
        )
        torch.testing.assert_close(state.server["w"][:trainable], expected, rtol=1e-9, atol=1e-12)
        buffers = mean.server["w"][trainable:]
        torch.testing.assert_close(state.server["w"][trainable:], buffers, rtol=1e-9, atol=1e-12)
