"""Optimizers on rows: every row moves as torch.optim moves that client's model by itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vecfl.errors import InputError
from vecfl.layout import Entry, Layout
from vecfl.optim import (
    ClientOptimizer,
    Rows,
    adagrad,
    adam,
    adamw,
    keep_gradient,
    momentum,
    rmsprop,
    sgd,
)
from vecfl.within_round import within_round

R, LR, P = 3, 0.05, 15
SHAPES = ((2, 3), (4,), (), (2, 1, 2))  # 6 + 4 + 1 + 4 = 15 numbers
OFFSETS = (0, 6, 10, 11)
LAYOUT = Layout(
    tuple(Entry(str(o), s, o, torch.float64) for s, o in zip(SHAPES, OFFSETS, strict=True))
)
Params = list[Tensor]
CASES: dict[str, tuple[ClientOptimizer, Callable[[Params], torch.optim.Optimizer]]] = {
    "sgd": (sgd(), lambda p: torch.optim.SGD(p, LR)),
    "momentum": (momentum(0.8), lambda p: torch.optim.SGD(p, LR, 0.8)),
    "nesterov": (
        momentum(0.8, nesterov=True),
        lambda p: torch.optim.SGD(p, LR, 0.8, nesterov=True),
    ),
    "adam": (adam((0.8, 0.95), 1e-3), lambda p: torch.optim.Adam(p, LR, (0.8, 0.95), 1e-3)),
    "adam, default": (adam(), lambda p: torch.optim.Adam(p, LR)),
    "adamw": (
        adamw((0.8, 0.95), 1e-3, 0.3),
        lambda p: torch.optim.AdamW(p, LR, (0.8, 0.95), 1e-3, 0.3),
    ),
    "adamw, default": (adamw(), lambda p: torch.optim.AdamW(p, LR)),
    "rmsprop": (rmsprop(0.8, 1e-3), lambda p: torch.optim.RMSprop(p, LR, 0.8, 1e-3)),
    "rmsprop, default": (rmsprop(), lambda p: torch.optim.RMSprop(p, LR)),
    "rmsprop, momentum": (
        rmsprop(0.8, 1e-3, 0.7),
        lambda p: torch.optim.RMSprop(p, LR, 0.8, 1e-3, momentum=0.7),
    ),
    "rmsprop, centered": (
        rmsprop(0.8, 1e-3, centered=True),
        lambda p: torch.optim.RMSprop(p, LR, 0.8, 1e-3, centered=True),
    ),
    "rmsprop, all": (
        rmsprop(0.8, 1e-3, 0.7, True, 0.3),
        lambda p: torch.optim.RMSprop(p, LR, 0.8, 1e-3, 0.3, 0.7, True),
    ),
    "adagrad": (adagrad(1e-3), lambda p: torch.optim.Adagrad(p, LR, eps=1e-3)),
    "adagrad, default": (adagrad(), lambda p: torch.optim.Adagrad(p, LR)),
    "sgd, decay": (sgd(0.3), lambda p: torch.optim.SGD(p, LR, weight_decay=0.3)),
    "momentum, decay": (
        momentum(0.8, weight_decay=0.3),
        lambda p: torch.optim.SGD(p, LR, 0.8, weight_decay=0.3),
    ),
    "nesterov, decay": (
        momentum(0.8, True, 0.3),
        lambda p: torch.optim.SGD(p, LR, 0.8, weight_decay=0.3, nesterov=True),
    ),
    "adam, decay": (
        adam(weight_decay=0.3),
        lambda p: torch.optim.Adam(p, LR, weight_decay=0.3),
    ),
    "adagrad, decay": (
        adagrad(weight_decay=0.3),
        lambda p: torch.optim.Adagrad(p, LR, weight_decay=0.3),
    ),
}


def halved(step):  # of a tensor of steps, or of a number
    return 1 / (1 + step)


SCHEDULED = {
    f"scheduled {name}": (within_round(optimizer, halved), make)
    for name, (optimizer, make) in CASES.items()
}


class Clients:
    """R rows on flat buffers [R, 15], as slots keep them."""

    def __init__(self, optimizer: ClientOptimizer, w: Tensor) -> None:
        self.w, self.step_ = w.clone(), optimizer.step_
        self.state = [torch.zeros_like(w) for _ in range(optimizer.states)]
        self.steps = torch.zeros(len(w)) if optimizer.counts else None

    def rows(self, which: slice = slice(None)) -> Rows:
        return Rows(
            w=LAYOUT.param_views(self.w[which]),
            state=[LAYOUT.param_views(t[which]) for t in self.state],
            bias=None,
            total=None,
            count=None,
            steps=None if self.steps is None else self.steps[which],
        )

    def refill_(self, row: int, w: Tensor) -> None:
        self.w[row] = w
        for t in self.state:
            t[row] = 0
        if self.steps is not None:
            self.steps[row] = 0


def trained_alone(
    make: Callable, w: Tensor, grads: list[Tensor], factor: Callable = lambda step: 1.0
) -> Tensor:
    """The row [15] after steps of torch.optim with these gradients [15]."""
    params = [p.clone().requires_grad_() for p in LAYOUT.param_views(w)]
    optimizer = make(params)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for grad in grads:
        for p, g in zip(params, LAYOUT.param_views(grad), strict=True):
            p.grad = g.clone()
        optimizer.step()
        schedule.step()
    return torch.cat([p.detach().reshape(-1) for p in params])


def numbers(seed: int, *shape: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES | SCHEDULED)
@pytest.mark.parametrize("together", [True, False])
def test_rows_move_as_torch_optim_moves_each(name: str, together: bool) -> None:
    """Row 1 is refilled after three of seven steps: it starts anew and the others go on."""
    optimizer, make = (CASES | SCHEDULED)[name]
    factor = halved if name in SCHEDULED else lambda step: 1.0
    w, fresh, grads = numbers(1, R, P), numbers(2, P), numbers(3, 7, R, P)
    clients = Clients(optimizer, w)
    everyone = [clients.rows()] if together else [clients.rows(slice(r, r + 1)) for r in range(R)]
    for step in range(7):
        if step == 3:
            middle = trained_alone(make, w[1], list(grads[:3, 1]), factor)
            torch.testing.assert_close(clients.w[1], middle, rtol=1e-12, atol=1e-12)
            clients.refill_(1, fresh)
        for i, rows in enumerate(everyone):
            part = grads[step] if together else grads[step, i : i + 1]
            optimizer.step_(rows, LAYOUT.param_views(part), LR)
    expected = [
        trained_alone(make, w[0], list(grads[:, 0]), factor),
        trained_alone(make, fresh, list(grads[3:, 1]), factor),
        trained_alone(make, w[2], list(grads[:, 2]), factor),
    ]
    torch.testing.assert_close(clients.w, torch.stack(expected), rtol=1e-12, atol=1e-12)
    if clients.steps is not None:
        assert clients.steps.tolist() == [7, 4, 7]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda g: g.transpose(-1, -2).contiguous().transpose(-1, -2),
    "rows last": lambda g: g.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda g: g[..., :1].expand_as(g),
}
ANY_LAYOUT = [sgd(), momentum(), momentum(nesterov=True), keep_gradient(), adam(), adamw()]
ANY_LAYOUT += [rmsprop(momentum=0.5, centered=True, weight_decay=0.1), adagrad()]
ANY_LAYOUT += [within_round(sgd(0.1), halved)]


@pytest.mark.parametrize("arrange", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("optimizer", ANY_LAYOUT, ids=lambda o: o.name)
def test_the_memory_layout_of_gradients_does_not_matter(
    optimizer: ClientOptimizer, arrange: Callable[[Tensor], Tensor]
) -> None:
    odd = arrange(numbers(5, R, 4, 5))
    assert not odd.is_contiguous()
    results = []
    for grad in (odd, odd.contiguous()):
        w = numbers(4, R, 4, 5)
        state = [[numbers(6 + i, R, 4, 5).abs()] for i in range(optimizer.states)]
        steps = torch.zeros(R) if optimizer.counts else None
        optimizer.step_(Rows([w], state, None, None, None, steps), [grad], LR)
        results.append((w, state))
    torch.testing.assert_close(results[0], results[1], rtol=1e-14, atol=1e-14)


def test_keep_gradient_keeps_the_last_one_and_the_model() -> None:
    w = numbers(1, R, P)
    clients = Clients(keep_gradient(), w)
    for seed in (7, 8):
        keep_gradient().step_(clients.rows(), LAYOUT.param_views(numbers(seed, R, P)), LR)
    assert torch.equal(clients.w, w) and torch.equal(clients.state[0], numbers(8, R, P))


def test_first_steps_by_hand() -> None:
    """w = 1, g = 2, lr = 0.05. Momentum 0.5: v = 2, w = 0.9; then v = 3, w = 0.75.

    Nesterov: w = 1 - 0.05 (2 + 0.5 * 2) = 0.85. Adam's first step is lr g / |g|.
    """
    assert moved(sgd(), 1) == pytest.approx(0.9)
    assert moved(momentum(0.5), 2) == pytest.approx(0.75)
    assert moved(momentum(0.5, nesterov=True), 1) == pytest.approx(0.85)
    assert moved(adam(eps=0), 1) == pytest.approx(0.95)
    assert moved(adamw(eps=0, weight_decay=0.2), 1) == pytest.approx(0.99 - 0.05)


def test_one_step_of_the_others_by_hand() -> None:
    """w = 1, g = 2, lr = 0.05. Decay 3 makes g = 5: w = 0.75. RMSprop from v = 0, alpha 3/4:
    v = 1, w = 1 - 0.05 * 2 / 1; Adagrad: v = 4, w = 1 - 0.05 * 2 / 2."""
    assert moved(sgd(3.0), 1) == pytest.approx(0.75)
    assert moved(rmsprop(0.75, eps=0), 1) == pytest.approx(0.9)
    assert moved(adagrad(eps=0), 1) == pytest.approx(0.95)


def test_rounding_does_not_spoil_a_centered_variance() -> None:
    """Equal gradients have v = mean^2 in the end, in float32 a little less or more."""
    for g in (0.1, 0.3, 0.7, 1.1, 1e3):
        w, state = torch.zeros(1), [[torch.zeros(1)] for _ in range(2)]
        for _ in range(300):
            step_ = rmsprop(0.5, centered=True).step_
            step_(Rows([w], state, None, None, None, None), [torch.full((1,), g)], 1e-9)
        assert w.isfinite().all(), g


def test_a_schedule_counts_the_steps_of_each_row() -> None:
    """lr 1, g = 1, factors 1, 1/2, 1/4: row 0, at its first step, moves by 1, row 1 by 1/4."""
    w, steps = torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, 2.0])
    seen = []

    def factor(step: Tensor) -> Tensor:
        seen.append(step.clone())
        return 0.5**step

    optimizer = within_round(sgd(), factor)
    optimizer.step_(Rows([w], [], None, None, None, steps), [torch.ones_like(w)], 1.0)
    assert w.tolist() == [-1, -0.25] and steps.tolist() == [1, 3]
    assert seen[-1].tolist() == [0, 2] and seen[-1].dtype == torch.float64


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (lambda step: 0.5, "must give a tensor [3], not 0.5; compute with"),
        (lambda step: step[:2], "must give a tensor [3], not a tensor [2]; compute with"),
        (lambda step: 1 - step, "must be at least 0 and finite, not [1.0, 0.0, -1.0] for"),
        (lambda step: 1 / step, "must be at least 0 and finite, not [inf, 1.0, 0.5] for"),
    ],
)
def test_factors_that_make_no_sense_are_refused(factor: Callable, message: str) -> None:
    with pytest.raises(InputError) as error:
        within_round(sgd(), factor)
    assert message in str(error.value) and "\n" not in str(error.value)


def moved(optimizer: ClientOptimizer, steps: int) -> float:
    """Where w = 1 is after steps with gradient 2."""
    w = torch.ones(1, dtype=torch.float64)
    state = [[torch.zeros_like(w)] for _ in range(optimizer.states)]
    rows = Rows([w], state, None, None, None, torch.zeros(1))
    for _ in range(steps):
        optimizer.step_(rows, [torch.full_like(w, 2)], LR)
    return w.item()


def test_what_optimizers_keep() -> None:
    kept = {o.name: (o.states, o.counts) for o, _ in CASES.values()}
    assert kept == {
        "sgd": (0, False),
        "momentum": (1, False),
        "nesterov": (1, False),
        "adam": (2, True),
        "adamw": (2, True),
        "rmsprop": (3, False),  # the last of its name: centered, with momentum
        "adagrad": (1, False),
    }
    assert [rmsprop().states, rmsprop(momentum=0.1).states, rmsprop(centered=True).states] == [
        *(1, 2, 2)
    ]
    assert {name: o.counts for name, (o, _) in SCHEDULED.items()} == dict.fromkeys(SCHEDULED, True)
    plain = {name for name, (o, _) in (CASES | SCHEDULED).items() if o.plain}
    assert plain == {"sgd"}
    assert (keep_gradient().states, keep_gradient().counts) == (1, False)


@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5, float("nan")])
def test_betas_out_of_range_are_refused(beta: float) -> None:
    for build, name in (
        (lambda: momentum(beta), r"momentum\(beta\)"),
        (lambda: adam((beta, 0.9)), r"adam\(betas\)"),
        (lambda: adam((0.9, beta)), r"adam\(betas\)"),
        (lambda: adamw((0.9, beta)), r"adamw\(betas\)"),
        (lambda: rmsprop(beta), r"rmsprop\(alpha\)"),
        (lambda: rmsprop(momentum=beta), r"rmsprop\(momentum\)"),
    ):
        with pytest.raises(InputError, match=rf"^{name} must be in \[0, 1\), not {beta}$"):
            build()


DECAYED = {"sgd": sgd, "momentum": momentum, "adam": adam, "adamw": adamw}
DECAYED |= {"rmsprop": rmsprop, "adagrad": adagrad}


@pytest.mark.parametrize("build", DECAYED.values(), ids=DECAYED)
@pytest.mark.parametrize("decay", [-0.1, float("inf"), float("nan")])
def test_decays_out_of_range_are_refused(build: Callable, decay: float) -> None:
    said = rf"^{build.__name__}\(weight_decay\) must be at least 0 and finite, not {decay}$"
    with pytest.raises(InputError, match=said):
        build(weight_decay=decay)
