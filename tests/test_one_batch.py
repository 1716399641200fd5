"""Clients of one plain step, whose gradients are added up in one batch: the same as with rows."""

from collections.abc import Callable
from dataclasses import replace
from threading import Event
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vecfl
from vecfl import Batches, FederatedDataset, InputError, Simulation, Task
from vecfl.engine.ghost import Ghost
from vecfl.job import Fold, Job
from vecfl.one_batch import OneBatch, check_norms, one_batch

SIZES = [3, 0, 1, 4, 9, 2, 4]


class Sentences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(7, 6, padding_idx=0), nn.LayerNorm(6, eps=0.1)
        self.out = nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.words(x)))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, stride=2),
        nn.GroupNorm(2, 4, eps=0.1),
        nn.ReLU(inplace=True),  # of a layer whose output a norm needs
        nn.Dropout(0.25),
        nn.Conv2d(4, 5, 2, dilation=2, bias=False),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def of(shape: tuple[int, ...], words: int = 0) -> FederatedDataset:
    g, n = torch.Generator().manual_seed(4), sum(SIZES)
    if words:
        x = torch.randint(words, (n, *shape), generator=g)
        y = torch.randint(words, (n, *shape), generator=g).where(torch.rand(n, *shape) < 0.7, -100)
        y[:, 0] = 1
    else:
        x = torch.randn(n, *shape, generator=g, dtype=torch.float64)
        y = torch.randint(3, (n,), generator=g)
    return FederatedDataset({"x": x, "y": y}, torch.tensor([0, *SIZES]).cumsum(0))


MODELS: dict[str, tuple[Callable[[], nn.Module], FederatedDataset]] = {
    "mlp": (mlp, of((5,))),
    "cnn": (cnn, of((1, 6, 6))),
    "sentences": (Sentences, of((6,), words=7)),
}
FEDAVG = vecfl.fedavg(lr=0.3, batches=Batches(4))
ALGORITHMS = {
    "fedavg": FEDAVG,
    "fedsgd": vecfl.fedsgd(lr=0.5, size=4),
    "fedprox": vecfl.fedprox(lr=0.2, mu=0.3, batches=Batches(4), weights=vecfl.uniform_weights),
    "steps": vecfl.fedadam(lr=0.3, server_lr=0.1, batches=Batches(4, steps=1)),
    "clip": vecfl.chain(FEDAVG, vecfl.clip_by_norm(0.05)),
    "clips": vecfl.chain(
        vecfl.fedsgd(lr=1.0, size=9, weights=vecfl.by_tokens),
        *(vecfl.clip_by_norm(c) for c in (0.5, 1.0, 0.1)),
    ),
}


def rounds(
    module: nn.Module, data: FederatedDataset, algorithm: vecfl.Algorithm, **kind: Any
) -> tuple[Tensor, list[dict[str, Any]]]:
    task = Task(module, vecfl.cross_entropy, example=data.examples(4))
    sim = Simulation(
        task, data, algorithm, vecfl.everyone(), seed=3, dtype=torch.float64, threads=1, **kind
    )
    state, told = sim.start(), []
    for _ in range(3):
        state, metrics = sim.round(state)
        told.append(metrics)
    return state.server["w"], told


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many clients each batch held."""
    right, seen = OneBatch._fold, []

    def fold(self: OneBatch, job, block, lr, fold) -> bool:
        seen.append(len(block.starts[1]))
        return right(self, job, block, lr, fold)

    monkeypatch.setattr(OneBatch, "_fold", fold)
    return seen


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_is_what_the_loop_computes(model: str, name: str, folded: list[int]) -> None:
    """Of the 7 clients 5 have one batch of 4; with steps=1 6, and fedsgd of size 9 has 6."""
    make, data = MODELS[model]
    torch.manual_seed(1)
    module, algorithm = make().double(), ALGORITHMS[name]
    w, told = rounds(module, data, algorithm, backend="stacked", slots=3)
    one = 6 if name in ("steps", "clips") else 5
    assert folded == ([3, 3] if one == 6 else [3, 2]) * 3
    right, said = rounds(module, data, algorithm, backend="loop")
    assert sum(folded) == 3 * one  # the loop folds none
    torch.testing.assert_close(w, right, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(told, said, strict=True):
        names = [n for n in theirs if n.startswith(("train/", "server/", "comm/"))]
        assert {"train/loss", "train/clients"} < set(names)
        for n in names:
            assert ours[n] == pytest.approx(theirs[n], rel=1e-9), n
    if name == "clip":
        assert told[0]["train/clipped"] > 0.5
    if one == 6:  # all who have examples
        assert [t["system/slot_efficiency"] for t in told] == [1, 1, 1]


def test_a_client_that_is_not_finite_is_dropped_by_rows(folded: list[int]) -> None:
    data = of((5,))
    data.columns["x"][0] = torch.nan  # of the first client
    module = mlp().double()
    w, told = rounds(module, data, FEDAVG, backend="stacked", slots=3)
    right, said = rounds(module, data, FEDAVG, backend="loop")
    torch.testing.assert_close(w, right, rtol=1e-9, atol=1e-12)
    assert told[0]["train/dropped_clients"] == said[0]["train/dropped_clients"] == 1
    assert folded and told[0]["train/clients"] == 5


@pytest.mark.parametrize("statistics, exact", [(2, False), (0, True)])
def test_where_rows_are_asked_for_there_are_rows(
    statistics: int, exact: bool, folded: list[int]
) -> None:
    module, kind = mlp().double(), {"statistics": statistics, "exact_sums": exact}
    w, _ = rounds(module, of((5,)), FEDAVG, backend="stacked", slots=3, **kind)
    right, _ = rounds(module, of((5,)), FEDAVG, backend="loop", **kind)
    torch.testing.assert_close(w, right, rtol=1e-9, atol=1e-12)
    assert folded == []


def test_it_ends_between_two_blocks(folded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    stop, train = Event(), OneBatch.train

    def stopped(self: OneBatch, job: Job, lr: float, fold: Fold, stop_: object) -> Any:
        fold.tell = lambda ended: stop.set()
        return train(self, job, lr, fold, stop)

    monkeypatch.setattr(OneBatch, "train", stopped)
    rounds(mlp().double(), of((5,)), FEDAVG, backend="stacked", slots=2)
    assert folded == [2]  # of 5


def test_a_clipped_message_is_within_its_bound_in_float32() -> None:
    """One client a round, and a model of zeros: the next model is its message.

    The examples are much alike and have all three labels, so that their gradients, 2000 numbers
    for each class, nearly cancel: the sum of their products would be off in float32.
    """
    g, n, bound = torch.Generator().manual_seed(5), 24, 0.3
    x = 8 + torch.randn(3 * n, 2000, generator=g)
    data = FederatedDataset({"x": x, "y": torch.arange(3 * n) % 3}, torch.arange(n + 1) * 3)
    module = nn.Linear(2000, 3)
    for p in module.parameters():
        nn.init.zeros_(p)
    task = Task(module, vecfl.cross_entropy, example=data.examples(4))
    algorithm = vecfl.chain(vecfl.fedsgd(lr=1.0, size=3), vecfl.clip_by_norm(bound))
    sim = Simulation(task, data, algorithm, vecfl.uniform(1), backend="stacked", slots=1, threads=1)
    lengths = []
    for t in range(n):
        state, told = sim.round(replace(sim.start(), round=t))
        assert told["train/clipped"] == 1
        lengths.append(float(state.server["w"].double().norm()))
    assert bound * (1 - 1e-6) < min(lengths) and max(lengths) <= bound


def by_norm(done: vecfl.algorithms.Finished) -> Tensor:
    return 1 / (1 + done.model.norm(dim=1)).double()


def noisy() -> vecfl.transforms.Transform:
    """A transform of the sums alone."""
    return vecfl.Transform("noisy", server=lambda own, sums, round: (sums, own))


@pytest.mark.parametrize("around", [lambda a: vecfl.ema(a, 0.9), lambda a: vecfl.chain(a, noisy())])
def test_what_leaves_messages_as_they_are_leaves_the_batch(around, folded: list[int]) -> None:
    module, data = mlp().double(), of((5,))
    w, _ = rounds(module, data, around(FEDAVG), backend="stacked", slots=3)
    right, _ = rounds(module, data, around(FEDAVG), backend="loop")
    torch.testing.assert_close(w, right, rtol=1e-9, atol=1e-12)
    assert folded == [3, 2] * 3


@pytest.mark.parametrize(
    "algorithm",
    [
        replace(FEDAVG, upload=lambda server, done: FEDAVG.upload(server, done)),
        replace(FEDAVG, begin=lambda server, starting: FEDAVG.begin(server, starting)),
        replace(FEDAVG, rule=replace(FEDAVG.rule, clip=1.0)),
        vecfl.fedavg(lr=0.1, batches=Batches(4), weights=by_norm),
        vecfl.fedavg(lr=0.1, batches=Batches(4), clip=1.0),
        vecfl.fedavg(lr=0.1, batches=Batches(4), optimizer=vecfl.adam()),
        vecfl.dga(lr=0.1, batches=Batches(4)),
        vecfl.scaffold(lr=0.1, batches=Batches(4)),
        vecfl.chain(FEDAVG, vecfl.clip_by_layer(1.0)),
        vecfl.chain(FEDAVG, vecfl.clip_by_norm(1.0), vecfl.top_k(0.5)),
        vecfl.delayed(FEDAVG, vecfl.drawn_delay([0.5, 0.5])),
        vecfl.aggregated_by(FEDAVG, vecfl.coordinate_median()),
    ],
    ids=lambda a: a.name,
)
def test_other_messages_need_rows(algorithm: vecfl.Algorithm) -> None:
    data = of((5,))
    task = Task(mlp(), vecfl.cross_entropy, example=data.examples(4))
    assert one_batch(task, data.examples(12), algorithm, 3, 0, 7) is None
    assert one_batch(task, data.examples(12), FEDAVG, 3, 0, 7) is not None


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Reads(nn.Module):
    """Uses a weight beside its layer's call."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) + F.linear(x, self.out.weight)


def padded(**how: Any) -> nn.Module:
    image = nn.Unflatten(1, (1, 1, 5)), nn.ZeroPad2d((0, 0, 1, 1))  # of 3 x 5 pixels
    return nn.Sequential(*image, nn.Conv2d(1, 1, 3, **how), nn.Flatten())


def hooked() -> nn.Module:
    module = nn.Linear(5, 3)
    module.register_forward_hook(lambda m, x, y: y * 2)
    return module


def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))
    module[2].weight = module[0].weight
    return module


class Signs(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(2, 3, **how), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.words((x > 0).long()).sum(1))


def grouped() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (5, 1, 1)), nn.Conv2d(5, 5, 1, groups=5), nn.Flatten())


@pytest.mark.parametrize(
    "module, said",
    [
        (Twice, "called twice"),
        (Reads, "the norm of a gradient comes out as"),
        (grouped, "module '1' .Conv2d.: no norm"),
        (hooked, "the module .Linear.: no norm"),
        (tied, "module '2' shares a parameter: no norm"),
        (lambda: padded(padding="same"), "module '2' .Conv2d.: no norm"),
        (lambda: padded(padding=1, padding_mode="reflect"), "module '2' .Conv2d.: no norm"),
        (lambda: Signs(max_norm=0.5), "module 'words' .Embedding.: no norm"),
        (lambda: nn.Sequential(nn.Linear(5, 3), nn.PReLU()), "module '1' .PReLU.: no norm"),
    ],
)
def test_norms_that_are_not_known_are_not_guessed(
    module: Callable[[], nn.Module], said: str
) -> None:
    data = of((5,))
    task = Task(module(), vecfl.cross_entropy, example=data.examples(4))
    with pytest.raises(InputError, match=said):
        check_norms(task, data.examples(12))
    clip = vecfl.chain(FEDAVG, vecfl.clip_by_norm(1.0))
    assert one_batch(task, data.examples(12), clip, 3, 0, 7) is None
    assert one_batch(task, data.examples(12), FEDAVG, 3, 0, 7) is not None  # needs no norms


def test_a_norm_by_hand() -> None:
    """One linear layer, one client of two examples (1, 0) and (0, 2) with output gradients 3, 4.

    The weight's gradient is 3 (1, 0) + 4 (0, 2) = (3, 8), the bias's is 7: 9 + 64 + 49 = 122.
    """
    task = Task(nn.Linear(2, 1), squares, example={"x": torch.randn(4, 2), "y": torch.zeros(4)})
    ghost = Ghost(task.to("cpu", torch.float64))
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    out = ghost.output({"x": x})
    norms = ghost.norms(out[:, 0], torch.tensor([3.0, 4.0], dtype=torch.float64), 1)
    torch.testing.assert_close(norms, torch.tensor([122.0], dtype=torch.float64).sqrt())


def squares(output: Tensor, batch: vecfl.losses.Batch) -> vecfl.losses.Pair:
    return output[:, 0].square(), None
