"""Loop and vmap on hand-made blocks: numbers on paper, equal rows, and rows that stay apart."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vecfl import InputError, Task, cross_entropy
from vecfl.engine import Backend, LocalRule, Slots, make_backend, make_update
from vecfl.engine.backend import gather
from vecfl.engine.loop import cut
from vecfl.engine.vmap import VmapBackend
from vecfl.losses import Batch, Pair, Score
from vecfl.optim import ClientOptimizer, adam, momentum, sgd
from vecfl.random import Kind, stream
from vecfl.schedule import Batches
from vecfl.tape import Block

from ..oracles import tasks, tiny
from ..oracles.bridge import run_vecfl
from ..oracles.loop import Setting

BACKENDS = ("loop", "vmap")
NOBODY = (np.array([], np.int64), np.array([], np.int64))
Columns = dict[str, Tensor]


def block(
    index: list | Tensor, valid: list, apply: list | None = None, full: bool = False
) -> Block:
    """A block of index [L, S, B]; slots without valid examples are idle."""
    index, counts = torch.as_tensor(index), torch.tensor(valid)
    steps, slots, _ = index.shape
    clients, step = torch.arange(slots) + 10, torch.arange(steps)[:, None]
    return Block(
        starts=NOBODY,
        finishes=NOBODY,
        active=int(counts.any(0).nonzero().max()) + 1,
        index=index,
        valid=counts,
        apply=None if apply is None else torch.tensor(apply),
        streams=stream(Kind.DROPOUT, client=clients, round=2, step=step),
        full=full,
    )


def part(b: Block, steps: slice) -> Block:
    """Some steps of a block."""
    apply, streams = b.apply, b.streams
    assert streams is not None
    return replace(
        b,
        index=b.index[steps],
        valid=b.valid[steps],
        apply=None if apply is None else apply[steps],
        streams=streams[steps],
    )


class World:
    """A backend, its slots and a rule; rows start from the module, each a little elsewhere."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        loss: Score,
        columns: Columns,
        slots: int,
        apart: float = 0.1,
        optimizer: ClientOptimizer | None = None,
        **rule: Any,
    ) -> None:
        full = bool(rule.pop("full", False))
        self.rule = LocalRule(optimizer or sgd(), Batches(3, full=full), **({"lr": 0.1} | rule))
        example = {name: column[:2] for name, column in columns.items()}
        self.task = Task(module, loss, example=example).to("cpu", torch.float64)
        self.task.draws.seed = 77
        self.backend: Backend = make_backend(name, self.task, example)
        assert self.backend.name == name
        self.columns, layout = columns, self.task.layout
        self.slots = Slots(layout, self.rule, slots, torch.device("cpu"), torch.float64)
        w = layout.flatten(self.task.module)
        away = torch.linspace(-apart, apart, slots * layout.trainable).double().view(slots, -1)
        start = w.repeat(slots, 1)
        start[:, : layout.trainable] += away.flip(0)
        bias = 0.01 * away if self.rule.bias else None
        self.slots.start_(torch.arange(slots), start, bias)
        self.update = make_update(self.rule, layout.param_views(w), round=0)

    def play(self, *blocks: Block) -> int:
        with torch.no_grad():
            return sum(self.backend.run_(self.slots, b, self.columns, self.update) for b in blocks)


# ------------------------------------------------------------------ on paper

TINY = tiny.client(tiny.FAR, tiny.STEEP, tiny.PLAIN, tiny.SETTLED)
# Slot 2 is idle; what it copies is slot 0. Entries behind `valid` are padding.
PAPER = block([[[0, 1], [1, 1], [0, 1]], [[2, 2], [0, 2], [2, 2]]], [[2, 1, 0], [1, 2, 0]])


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_and_sums_by_hand(name: str) -> None:
    """lr 0.1. Slot 0 at 1: FAR and STEEP have gradients -1, 4 and losses 0.5, 2: w = 0.85. PLAIN:
    gradient 0.85, loss 0.85^2 / 2 = 0.36125: w = 0.765.
    Slot 1 at 2: STEEP has 8 and 8: w = 1.2. FAR and PLAIN have -0.8, 1.2 and 0.32, 0.72: w = 1.18.
    """
    world = World(name, tiny.Line(), tiny.squared, TINY, 3)
    world.slots.flat[:] = doubles(1, 2, 5)[:, None]
    executed = world.play(PAPER)
    assert executed == 2 * 2
    torch.testing.assert_close(world.slots.flat[:2, 0], doubles(0.765, 1.18))
    sums = torch.stack((doubles(2.86125, 3), doubles(9.04, 3)))
    torch.testing.assert_close(world.slots.sums[:2], sums)
    assert world.slots.seen.tolist() == [3, 3, 0]


@pytest.mark.parametrize("name", BACKENDS)
def test_weights_by_hand(name: str) -> None:
    """Weights m are (1, 3, 0, 0). Slot 0 at 1: gradients -1 and 3 * 4 over 4 are 2.75: w = 0.725;
    then PLAIN counts nothing. Slot 1 at 2: 24 / 3 = 8: w = 1.2; FAR alone has -0.8: w = 1.28.
    """
    world = World(name, tiny.Line(), tiny.masked, TINY | {"m": torch.tensor([1.0, 3, 0, 0])}, 3)
    world.slots.flat[:] = doubles(1, 2, 5)[:, None]
    world.play(PAPER)
    torch.testing.assert_close(world.slots.flat[:2, 0], doubles(0.725, 1.28))
    # Losses: 0.5 + 3 * 2 and weights 1 + 3; 3 * 8 + 0.32 and weights 3 + 1.
    sums = torch.stack((doubles(6.5, 4), doubles(24.32, 4)))
    torch.testing.assert_close(world.slots.sums[:2], sums)
    assert world.slots.seen.tolist() == [3, 3, 0]


@pytest.mark.parametrize("name", BACKENDS)
def test_accumulation_by_hand(name: str) -> None:
    """Slot 0 at 1 applies at the second step: gradients -1, 4, 1 over 3: w = 1 - 0.4 / 3.

    Slot 1 at 2 applies at the first: 8: w = 1.2; then -0.8 + 1.2 = 0.4 with weight 2 waits.
    """
    world = World(name, tiny.Line(), tiny.squared, TINY, 3, full=True)
    world.slots.flat[:] = doubles(1, 2, 5)[:, None]
    apply = torch.tensor([[False, True, False], [True, False, False]])
    world.play(replace(PAPER, apply=apply))
    torch.testing.assert_close(world.slots.flat[:2, 0], doubles(1 - 0.4 / 3, 1.2))
    assert world.slots.total is not None and world.slots.count is not None
    torch.testing.assert_close(world.slots.total[:2, 0], doubles(0, 0.4))
    torch.testing.assert_close(world.slots.count[:2], doubles(0, 2))
    # Slot 0 stays at 1 for PLAIN: loss 0.5 + 2 + 0.5; slot 1 has 8, and at 1.2 0.32 + 0.72.
    torch.testing.assert_close(world.slots.sums[:2, 0], doubles(3, 9.04))


def confident(output: Tensor, batch: Batch) -> Pair:
    """A weight that depends on the model, (w x)^2."""
    return 0.5 * (output - batch["y"]) ** 2, output**2


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_is_differentiated_through_weights(name: str) -> None:
    """Slot 0 at 1: gradients -1 and 4, weights 1 and 4: w = 1 - 0.3 / 5 = 0.94. PLAIN has gradient
    0.94, loss 0.4418 and weight 0.94^2 = 0.8836: w = 0.94 - 0.1 / 0.94.
    Slot 1 at 2: STEEP has 8 over 16: w = 1.95. FAR and PLAIN have gradients -0.05 and 1.95, losses
    0.00125 and 1.90125, and each weight 1.95^2 = 3.8025: w = 1.95 - 0.19 / 7.605.
    """
    world = World(name, tiny.Line(), confident, TINY, 3)
    world.slots.flat[:] = doubles(1, 2, 5)[:, None]
    world.play(PAPER)
    torch.testing.assert_close(
        world.slots.flat[:2, 0], doubles(0.94 - 0.1 / 0.94, 1.95 - 0.19 / 7.605)
    )
    sums = torch.stack((doubles(2.9418, 5.8836), doubles(9.9025, 23.605)))
    torch.testing.assert_close(world.slots.sums[:2], sums)
    assert not world.slots.sums.requires_grad


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_is_differentiated_through_accumulated_weights(name: str) -> None:
    """Slot 0 stays at 1 to the end: gradients -1, 4, 1 and weights 1, 4, 1: w = 1 - 0.4 / 6.

    Slot 1 goes to 1.95, as above; then -0.05 + 1.95 = 1.9 with weight 7.605 waits.
    """
    world = World(name, tiny.Line(), confident, TINY, 3, full=True)
    world.slots.flat[:] = doubles(1, 2, 5)[:, None]
    apply = torch.tensor([[False, True, False], [True, False, False]])
    world.play(replace(PAPER, apply=apply))
    torch.testing.assert_close(world.slots.flat[:2, 0], doubles(1 - 0.4 / 6, 1.95))
    assert world.slots.total is not None and world.slots.count is not None
    torch.testing.assert_close(world.slots.total[:2, 0], doubles(0, 1.9))
    torch.testing.assert_close(world.slots.count[:2], doubles(0, 7.605))
    assert not world.slots.count.requires_grad and not world.slots.total.requires_grad


@pytest.mark.parametrize("name", BACKENDS)
def test_a_batch_without_weight_moves_nothing(name: str) -> None:
    """FAR and STEEP weigh nothing, though their losses do not say so; PLAIN weighs 2: w = 0.95."""

    def careless(output: Tensor, batch: Batch) -> Pair:
        return 0.5 * (output - batch["y"]) ** 2, batch["m"]

    world = World(name, tiny.Line(), careless, TINY | {"m": torch.tensor([0.0, 0, 2, 1])}, 3)
    world.slots.flat[:] = doubles(1, 1, 1)[:, None]
    world.play(part(PAPER, slice(0, 1)))
    assert world.slots.flat[:2, 0].tolist() == [1, 1]
    world.play(part(PAPER, slice(1, 2)))
    torch.testing.assert_close(world.slots.flat[0, 0], torch.tensor(0.95).double())


@pytest.mark.parametrize("name", BACKENDS)
def test_buffers_changed_in_place_by_hand(name: str) -> None:
    """The trace halves and takes half of w. Slot 0 is at 1 and 0.85, slot 1 at 2 and 1.2, as above:
    0.5 * 0.5 + 0.5 * 0.85 = 0.675 and 0.5 * 1 + 0.5 * 1.2 = 1.1."""
    world = World(name, tiny.Tracked(), tiny.squared, TINY, 3)
    world.slots.flat[:] = torch.tensor([[1.0, 0, 0], [2, 0, 0], [5, 0, 0]]).double()
    world.play(PAPER)
    expected = torch.tensor([[0.765, 2, 0.675], [1.18, 2, 1.1]], dtype=torch.float64)
    torch.testing.assert_close(world.slots.flat[:2], expected)
    constant, calls, trace = world.task.module.buffers()
    assert (constant.item(), calls.item(), trace.item()) == (7, 0, 0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("optimizer", [sgd(), momentum(), adam()], ids=lambda o: o.name)
def test_an_unused_parameter_has_gradient_zero(name: str, optimizer: ClientOptimizer) -> None:
    """y = w x + 1 with a frozen 1; a third parameter reaches nothing and stays at 1."""
    world = World(name, tiny.Offset(), tiny.squared, TINY, 3, apart=0, optimizer=optimizer)
    assert [e.name for e in world.task.layout.params] == ["w", "idle"]
    world.play(PAPER)
    assert (world.slots.flat[:, 1] == 1).all() and (world.slots.flat[:2, 0] != 1).all()
    if optimizer.name == "sgd":  # FAR: 1 + 1 - 2 = 0, STEEP: (2 + 1) 2 = 6, half of both 3: w = 0.7
        torch.testing.assert_close(world.slots.flat[0, 0], doubles(0.7 - 0.1 * 1.7)[0])


class Einsum(nn.Module):
    """A linear layer without bias; the gradient of its weight lies transposed in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,oi->bo", x, self.w)


@pytest.mark.parametrize("name", BACKENDS)
def test_adam_takes_gradients_as_autograd_lays_them_out(name: str) -> None:
    x = torch.linspace(-2, 1, 12, dtype=torch.float64).view(3, 4).square()
    columns = {"x": x, "y": torch.tensor([0, 2, 1])}
    world = World(name, Einsum(), cross_entropy, columns, 1, apart=0, optimizer=adam())
    alone = Einsum().double()
    optimizer = torch.optim.Adam(alone.parameters(), lr=0.1)
    for _ in range(2):
        world.play(block([[[0, 1, 2]]], [[3]]))
        loss = nn.functional.cross_entropy(alone(x), columns["y"])
        (grad,) = torch.autograd.grad(loss, [alone.w])
        assert not grad.is_contiguous()
        alone.w.grad = grad.contiguous()
        optimizer.step()
    torch.testing.assert_close(world.slots.flat[0], alone.w.detach().flatten())


# ------------------------------------------------------------------ loop and vmap


class Recurrent(nn.Module):
    def __init__(self, rnn: type[nn.RNNBase] = nn.GRU) -> None:
        super().__init__()
        self.rnn, self.head = rnn(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend, self.norm = nn.MultiheadAttention(2, 2, batch_first=True), nn.LayerNorm(2)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.attend(x, x, x)[0]).mean(1))


SEQUENCES = (tasks.floats(5, 2), tasks.integers(3))
CNN = tasks.PROBLEMS["cnn"]
PROBLEMS = tasks.PROBLEMS | {
    "gru": tasks.Problem(Recurrent, tasks.classes, *SEQUENCES),
    "attention": tasks.Problem(Attention, tasks.classes, *SEQUENCES),
    "float cnn": replace(CNN, x=tasks.floats(1, 6, 6)),
}
# Three slots own five examples each; slot 3 is idle, as the last ones are, and copies slot 0.
LONG = block(
    [
        [[0, 1, 2], [5, 6, 7], [17, 19, 15], [0, 1, 2]],
        [[3, 4, 3], [8, 8, 8], [16, 18, 16], [0, 1, 2]],
        [[2, 0, 4], [9, 5, 9], [15, 15, 15], [0, 1, 2]],
    ],
    [[3, 3, 3, 0], [2, 1, 2, 0], [3, 2, 1, 0]],
)
APPLY = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
BUSY = [0, 1, 2]
RULES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "all corrections": {"clip": 0.2, "mu": 0.3, "bias": True, "optimizer": momentum(nesterov=True)},
    "adam": {"optimizer": adam(), "lr": 0.01},
    "full": {"full": True, "clip": 0.2, "optimizer": momentum()},
}


def world_of(name: str, problem: tasks.Problem, **rule: Any) -> World:
    (columns,) = problem.clients((20,))
    return World(name, problem.build(), problem.loss, columns, 4, **rule)


def state_of(slots: Slots, which: list[int]) -> list[Tensor]:
    """All that clients of these slots have, copied."""
    kept = [slots.flat, *slots.state, slots.sums, slots.seen, slots.total, slots.count, slots.steps]
    return [t[which].clone() for t in kept if t is not None]


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("problem", "rule"), [*product(PROBLEMS, ["sgd"]), *product(["mlp"], list(RULES)[1:])]
)
def test_backends_give_the_same_rows(problem: str, rule: str) -> None:
    b = replace(LONG, apply=APPLY) if rule == "full" else LONG
    worlds = [world_of(name, PROBLEMS[problem], **RULES[rule]) for name in BACKENDS]
    start = worlds[0].slots.flat.clone()
    for world in worlds:
        world.play(b)
    loop, vmap = (state_of(world.slots, BUSY) for world in worlds)
    torch.testing.assert_close(vmap, loop, rtol=1e-12, atol=1e-13)
    for world in worlds:  # an idle slot is left alone, and APPLY has no step for slot 2
        moved = (world.slots.flat != start).any(1)
        assert moved.tolist() == [True, True, rule != "full", False]
        assert world.slots.seen.tolist() == [8, 6, 6, 0]


@pytest.mark.parametrize("problem", ["mlp", "tokens"])
def test_whole_batches_take_the_short_cut_to_the_same_rows(problem: str) -> None:
    whole = replace(LONG, valid=torch.tensor([[3, 3, 3, 0]] * 3))
    results = []
    for name in BACKENDS:
        for full in (False, True):
            world = world_of(name, PROBLEMS[problem])
            world.play(replace(whole, full=full))
            results.append(state_of(world.slots, BUSY))
            assert world.slots.seen.tolist() == [9, 9, 9, 0]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("problem", ["cnn", "buffers"])
def test_a_block_may_be_cut_anywhere(name: str, problem: str) -> None:
    one, two = (world_of(name, PROBLEMS[problem], optimizer=momentum()) for _ in range(2))
    executed = one.play(LONG)
    assert executed == two.play(part(LONG, slice(0, 1)), part(LONG, slice(1, 3)))
    assert_same_bits([one.slots.flat[BUSY]], [two.slots.flat[BUSY]])
    ones, twos = state_of(one.slots, BUSY), state_of(two.slots, BUSY)
    torch.testing.assert_close(ones, twos, rtol=1e-14, atol=0)  # the order of a loss sum


def test_buffers_belong_to_rows() -> None:
    """Three steps each: the counter is 3 in every busy row, and a trace follows its own weights."""
    for name in BACKENDS:
        world = world_of(name, PROBLEMS["buffers"])
        before = world.slots.model[0][0].clone()
        world.play(part(LONG, slice(0, 1)))
        calls, trace = world.slots.buffers
        assert calls[BUSY].tolist() == [1, 1, 1]
        torch.testing.assert_close(trace[0], 0.1 * before, rtol=1e-12, atol=1e-15)
        world.play(part(LONG, slice(1, 3)))
        assert calls[BUSY].tolist() == [3, 3, 3] and not torch.equal(trace[0], trace[3])
        assert int(world.task.module.calls) == 0


@pytest.mark.parametrize("name", BACKENDS)
def test_the_task_given_is_not_trained(name: str) -> None:
    world = world_of(name, PROBLEMS["mlp"])
    before = world.task.layout.flatten(world.task.module)
    world.play(LONG)
    assert torch.equal(world.task.layout.flatten(world.task.module), before)


# ------------------------------------------------------------------ isolation


Spoil = Callable[[World], None]


@cache
def bits_of_rows(name: str, problem: str, full: bool, spoil: Spoil | None = None) -> list:
    """All that each slot has behind LONG, after `spoil` of the world before it."""
    world = world_of(name, PROBLEMS[problem], optimizer=momentum(), clip=0.5, full=full)
    if spoil is not None:
        spoil(world)
    world.play(replace(LONG, apply=APPLY) if full else LONG)
    return [state_of(world.slots, [s]) for s in range(4)]


def data_of_slot_1(value: float) -> Spoil:
    def spoil(world: World) -> None:
        world.columns["x"][5:10] = value

    return spoil


def model_of_slot(s: int) -> Spoil:
    def spoil(world: World) -> None:
        world.slots.flat[s] = torch.nan

    return spoil


SPOILED = {
    "nan data": (data_of_slot_1(torch.nan), 1),
    "inf data": (data_of_slot_1(torch.inf), 1),
    "huge data": (data_of_slot_1(1e200), 1),
    "nan model": (model_of_slot(1), 1),
    "nan in the idle slot": (model_of_slot(3), 3),
}


MODELS = ("nan model", "nan in the idle slot")
PAIRS = [*product(["mlp", "float cnn", "gru", "attention", "buffers"], SPOILED)]
PAIRS += product(["tokens", "cnn"], MODELS)  # their data are integers


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("problem", "case"), PAIRS)
def test_no_row_sees_what_another_row_computes(name: str, problem: str, case: str) -> None:
    spoil, spoiled = SPOILED[case]
    clean = bits_of_rows(name, problem, False)
    other = bits_of_rows(name, problem, False, spoil)
    for s in {0, 1, 2} - {spoiled}:
        assert all(t.isfinite().all() for t in clean[s])
        assert_same_bits(other[s], clean[s])
    assert not torch.equal(other[spoiled][0], clean[spoiled][0])


@pytest.mark.parametrize("name", BACKENDS)
def test_accumulated_rows_do_not_see_each_other_either(name: str) -> None:
    clean = bits_of_rows(name, "mlp", True)
    other = bits_of_rows(name, "mlp", True, data_of_slot_1(torch.nan))
    assert other[1][0].isnan().any()
    assert_same_bits(other[0], clean[0])
    assert_same_bits(other[2], clean[2])


# ------------------------------------------------------------------ what vmap cannot do


class Odd(nn.Module):
    """A linear layer whose use depends on a number that Python sees."""

    def __init__(self, scale: Callable[[Tensor], Tensor | float]) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(5, 3), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale(self.linear.weight)


def branch(weight: Tensor) -> float:
    return 2.0 if weight.sum() > 100 else 1.0


def item(weight: Tensor) -> float:
    return 1.0 + 0 * weight.sum().item()


@pytest.mark.parametrize("scale", [branch, item])
def test_what_cannot_be_vectorised_is_named_and_runs_on_the_loop(scale: Callable) -> None:
    linear = tasks.PROBLEMS["linear"]
    odd = replace(linear, module=lambda: nn.Sequential(nn.Identity(), Odd(scale)))
    with pytest.raises(InputError) as error:
        world_of("vmap", odd)
    message = str(error.value)
    assert message.startswith("module '1' cannot be vectorised: ") and "\n" not in message
    assert message.endswith("use the loop backend, or replace the module")
    worlds = [world_of("loop", problem) for problem in (odd, linear)]
    for world in worlds:
        world.play(LONG)
    assert_same_bits(*(state_of(world.slots, BUSY) for world in worlds))  # the scale is 1


def test_a_root_that_cannot_be_vectorised_is_called_the_module() -> None:
    with pytest.raises(InputError, match="^the module cannot be vectorised: "):
        world_of("vmap", replace(tasks.PROBLEMS["linear"], module=lambda: Odd(branch)))


def test_a_spectral_norm_is_refused_by_vmap_and_runs_on_the_loop() -> None:
    def module() -> nn.Module:
        return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3)))

    problem = replace(tasks.PROBLEMS["linear"], module=module)
    with pytest.raises(InputError, match="module '0.parametrizations.weight.0' cannot be vectoris"):
        world_of("vmap", problem)
    world = world_of("loop", problem)
    before = world.slots.buffers[0].clone()
    world.play(LONG)
    moved = (world.slots.buffers[0] != before).any(1)
    assert moved.tolist() == [True, True, True, False] and world.slots.flat.isfinite().all()


def test_an_operator_without_a_batching_rule_is_slow_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In float32 an LSTM on the CPU is one fused operator, which vmap calls once for each row."""
    x = torch.linspace(-1, 1, 20).view(2, 5, 2)
    example = {"x": x, "y": torch.tensor([0, 2])}
    with caplog.at_level(logging.WARNING, "vecfl"):
        make_backend("vmap", Task(Recurrent(), cross_entropy, example=example), example)
        assert caplog.messages == []
        make_backend("vmap", Task(Recurrent(nn.LSTM), cross_entropy, example=example), example)
    assert caplog.messages[0].startswith("the vmap backend will be slow: ")
    assert "batching rule" in caplog.messages[0]


def test_what_torch_says_of_an_operator_twice_is_said_once_without_its_request() -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Bilinear(5, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x)

    (columns,) = tasks.PROBLEMS["linear"].clients((2,))
    (said,) = VmapBackend(Task(Squares(), cross_entropy, example=columns), columns).slow
    assert said.endswith("the batching rule for aten::_trilinear")


def test_backends_by_name() -> None:
    (columns,) = tasks.PROBLEMS["linear"].clients((2,))
    task = Task(nn.Linear(5, 3), cross_entropy, example=columns)
    with pytest.raises(
        InputError, match="backend 'scan' is not known; choose from loop, vmap, stacked"
    ):
        make_backend("scan", task, columns)


def test_gather() -> None:
    columns = {"x": torch.arange(12).view(4, 3), "y": torch.tensor([10, 11, 12, 13])}
    batch = gather(columns, torch.tensor([[3, 0], [1, 1]]))
    assert batch["y"].tolist() == [[13, 10], [11, 11]] and batch["x"].shape == (2, 2, 3)
    assert batch["x"][0].tolist() == [[9, 10, 11], [0, 1, 2]]


def test_ctrl_c_inside_of_torch_stays_ctrl_c() -> None:
    def loss(output: Tensor, batch: Columns) -> tuple[Tensor, None]:
        if armed:
            try:
                raise KeyboardInterrupt
            finally:
                raise RuntimeError("INTERNAL ASSERT FAILED")  # as torch does
        return output.sum(1), None

    armed = False
    task = Task(nn.Linear(3, 2), loss, example={"x": torch.randn(4, 3)})
    backend = VmapBackend(task, {"x": torch.randn(2, 3)})
    flat = task.layout.flatten(task.module).expand(2, -1).contiguous()
    arguments = (task.layout.param_views(flat), [], {"x": torch.randn(2, 5, 3)}, None, None, True)
    backend.gradients(*arguments)
    armed = True
    with pytest.raises(KeyboardInterrupt):
        backend.gradients(*arguments)


@pytest.mark.parametrize("numbers, parts", [(0, 3), (1 << 30, 1), (100, 1), (40, 2), (39, 3)])
def test_a_loop_prepares_some_steps_at_a_time(
    numbers: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Batches of 4 examples of 4 + 1 numbers: 20 a step. 3 steps: by 100 / 20 = 5, by 2, by 1.
    monkeypatch.setattr("vecfl.engine.loop.AT_A_TIME", numbers)
    slices = cut(3, 20)
    assert len(slices) == parts and sum((list(range(3))[s] for s in slices), []) == [0, 1, 2]


@pytest.mark.parametrize("full", [False, True])
def test_parts_of_a_loop_change_no_bits(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    for numbers in (1 << 24, 1):
        monkeypatch.setattr("vecfl.engine.loop.AT_A_TIME", numbers)
        p, s = tasks.PROBLEMS["mlp"], Setting(rounds=1, epochs=3, full=full, seed=4)
        run = run_vecfl(p.build(), p.loss, p.clients(), s, backend="loop", slots=2)
        models.append((run.models, [m["train/loss"] for m in run.metrics]))
    torch.testing.assert_close(models[0][0], models[1][0], rtol=0, atol=0)
    assert models[0][1] == pytest.approx(models[1][1], rel=1e-12)
