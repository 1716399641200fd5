"""Sequences of simple layers, whose forward and backward pass is written by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vecfl
from vecfl import InputError, Task
from vecfl.engine.sequence import Sequence
from vecfl.engine.stacked import Stack, plain_gradients, stacked
from vecfl.random import Kind, stream

S, B = 3, 4


def examples(*shape: int, labels: tuple[int, ...] = ()) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(S * B, *shape, generator=g, dtype=torch.float64)
    return {"x": x, "y": torch.randint(3, (S * B, *labels), generator=g)}


def layers(*some: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), *some, nn.Linear(6, 3))


IMAGES, ROWS, TOKENS = examples(2, 3), examples(5), examples(7, 5, labels=(7,))
SEQUENCES: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "one layer": (lambda: nn.Linear(5, 3), ROWS),
    "no bias": (lambda: nn.Linear(5, 3, bias=False), ROWS),
    "relu": (lambda: layers(nn.ReLU()), ROWS),
    "tanh": (lambda: layers(nn.Tanh()), ROWS),
    "sigmoid": (lambda: layers(nn.Sigmoid(), nn.Identity()), ROWS),
    "dropout": (lambda: layers(nn.Dropout(0.25), nn.Tanh(), nn.Dropout(0.3)), ROWS),
    "first": (lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)), ROWS),
    "last": (lambda: layers(nn.Linear(6, 6), nn.Sequential(nn.ReLU())).append(nn.Tanh()), ROWS),
    "images": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Linear(4, 3)), IMAGES),
    "positions": (lambda: layers(nn.Tanh()), TOKENS),
}


def steps(
    module: nn.Module, loss: vecfl.losses.Score, batch: dict[str, Tensor]
) -> tuple[Sequence, list[Tensor], list[list[Tensor]]]:
    """A sequence, rows of S clients, and the gradients of each by a plain module."""
    task = Task(module, loss, example=batch).to("cpu", torch.float64)
    sequence, layout = stacked(task), task.layout
    assert isinstance(sequence, Sequence)
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(S, layout.size, generator=g, dtype=torch.float64)
    streams = stream(Kind.DROPOUT, client=torch.arange(S))
    right = [
        plain_gradients(task, rows[s], {k: c[s * B : (s + 1) * B] for k, c in batch.items()}, key)
        for s, key in enumerate(streams)
    ]
    return sequence, layout.param_views(rows), right


def together(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: c.unflatten(0, (S, B)) for k, c in batch.items()}


@pytest.mark.parametrize("module, batch", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("loss", ["cross_entropy", "squares", "sums"])
def test_gradients_and_steps_are_those_of_a_plain_module(
    module: Callable[[], nn.Module], batch: dict[str, Tensor], loss: str
) -> None:
    def squares(output: Tensor, batch: vecfl.losses.Batch) -> vecfl.losses.Pair:
        return output.flatten(1).square().sum(1), 1.0 + batch["x"].flatten(1)[:, 0].abs()

    def sums(output: Tensor, batch: vecfl.losses.Batch) -> vecfl.losses.Pair:
        return output.flatten(1).sum(1), None  # its gradient is one number, written once

    score = {"squares": squares, "sums": sums}.get(loss, vecfl.cross_entropy)
    sequence, w, right = steps(module(), score, batch)
    streams = stream(Kind.DROPOUT, client=torch.arange(S))
    before = [t.clone() for t in w]
    for _ in range(2):  # the second time in the memory of the first
        grads, total, _ = sequence.step(w, together(batch), None, streams, True, None)
        assert grads is not None
        for s, plain in enumerate(right):
            torch.testing.assert_close([g[s] for g in grads], plain, rtol=1e-9, atol=1e-12)
    moved, again, _ = sequence.step(w, together(batch), None, streams, True, 0.5)
    assert moved is None and torch.equal(total, again)
    expected = [t - 0.5 * g for t, g in zip(before, grads, strict=True)]
    torch.testing.assert_close(w, expected, rtol=1e-9, atol=1e-12)
    elsewhere, _, _ = sequence.step(before, together(batch), None, streams, True, None)
    assert elsewhere is not None
    for s, plain in enumerate(right):
        torch.testing.assert_close([g[s] for g in elsewhere], plain, rtol=1e-9, atol=1e-12)


def test_masked_and_ignored_examples_have_no_gradient_and_no_loss() -> None:
    """An example that is masked, or whose label is -100, may as well be another."""
    batch = {k: c.clone() for k, c in ROWS.items()}
    batch["y"][1] = -100
    sequence, w, right = steps(nn.Linear(5, 3), vecfl.cross_entropy, batch)
    mask = torch.ones(S, B, dtype=torch.float64)
    mask[2, 3] = 0
    found = []
    for value in (1.0, -2.0):
        other = {k: c.clone() for k, c in together(batch).items()}
        other["x"][0, 1] = other["x"][2, 3] = value
        grads, total, count = sequence.step(w, other, mask, None, True, None)
        assert grads is not None and count is None
        found.append([*(g.clone() for g in grads), total])
    assert all(map(torch.equal, *found))
    mask[:] = 1
    mask[0, 1] = 0
    sums, _, _ = sequence.step(w, together(batch), mask, None, False, None)
    assert sums is not None
    for s, count in ((0, B), (1, B)):  # an ignored example has weight 1, and its sum is zero
        means = [g[s] / count for g in sums]
        torch.testing.assert_close(means, right[s], rtol=1e-9, atol=1e-12)
    means, _, _ = sequence.step(w, together(batch), mask, None, True, None)
    assert means is not None  # three examples are left of the first client, one of them ignored
    torch.testing.assert_close([g[0] * 3 / B for g in means], right[0], rtol=1e-9, atol=1e-12)


def test_a_large_logit_does_not_overflow() -> None:
    """-log softmax([1000, 0, 0])[1] is 1000, its gradient (1, -1, 0)."""
    sequence, w, _ = steps(nn.Linear(5, 3), vecfl.cross_entropy, ROWS)
    w[0].zero_()
    w[1][:] = torch.tensor([1000.0, 0.0, 0.0])
    batch = together(ROWS) | {"y": torch.ones(S, B, dtype=torch.int64)}
    grads, total, _ = sequence.step(w, batch, None, None, True, None)
    assert grads is not None
    torch.testing.assert_close(total, torch.full((S,), 1000.0 * B, dtype=torch.float64))
    torch.testing.assert_close(grads[1][0], torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))


def test_a_step_makes_no_memory_of_the_size_of_a_layer() -> None:
    sequence, w, _ = steps(layers(nn.ReLU()), vecfl.cross_entropy, ROWS)
    seen = []
    for _ in range(2):
        sequence.step(w, together(ROWS), None, None, True, 0.1)
        kept = [layer.memory.kept for layer in (*sequence.layers, sequence.loss)]
        seen.append([t.data_ptr() for memory in kept for t in memory.values()])
    assert seen[0] == seen[1] and len(seen[0]) == 5  # out and below of two layers, relu, powers


def shared() -> nn.Module:
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(5, 3))


def frozen() -> nn.Module:
    module = layers()
    module[0].requires_grad_(False)
    return module


def hooked() -> nn.Module:
    module = layers(nn.ReLU())
    module[1].register_forward_hook(lambda m, x, y: y * 2)
    return module


def hooked_around() -> nn.Module:
    module = layers(nn.ReLU())
    module.register_forward_hook(lambda m, x, y: y * 2)
    return module


class Counts(nn.Flatten):
    """Another forward: it keeps a count."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.calls)


def left_over() -> nn.Module:
    inner = nn.Sequential(nn.Linear(5, 6))
    inner.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return nn.Sequential(inner, nn.Linear(6, 3))


@pytest.mark.parametrize(
    "module",
    [
        shared,
        frozen,
        hooked,
        hooked_around,
        left_over,
        lambda: layers(nn.GELU()),
        lambda: layers(nn.Dropout(0)),
        lambda: layers(nn.Flatten(1, 1)),
        lambda: layers(nn.Flatten(-1)),
        lambda: layers(Counts()),
    ],
)
def test_all_else_is_no_sequence(module: Callable[[], nn.Module]) -> None:
    task = Task(module(), vecfl.cross_entropy, example=ROWS)
    with pytest.raises(InputError, match="in no sequence"):
        Sequence(task)
    if module is not hooked:  # refused there, too
        assert isinstance(stacked(task), Stack)


def test_another_loss_of_the_same_name_is_another() -> None:
    def cross_entropy(output: Tensor, batch: vecfl.losses.Batch) -> vecfl.losses.Pair:
        value, weight = vecfl.cross_entropy(output, batch)
        return 2 * value, weight

    (plain, w, _), (twice, _, right) = (
        steps(nn.Linear(5, 3), loss, ROWS) for loss in (vecfl.cross_entropy, cross_entropy)
    )
    (_, once, _), (grads, total, _) = (
        sequence.step(w, together(ROWS), None, None, True, None) for sequence in (plain, twice)
    )
    torch.testing.assert_close(total, 2 * once, rtol=1e-9, atol=0)
    for s in range(S):
        torch.testing.assert_close([g[s] for g in grads or []], right[s], rtol=1e-9, atol=1e-12)
