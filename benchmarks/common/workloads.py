"""What the benchmarks train: generated data, and the same rounds by a plain loop and by vecfl."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vecfl
from vecfl.data import FederatedDataset
from vecfl.models import CharLSTM, cifar_cnn, emnist_cnn, pfl_cnn, resnet18_gn, small_cnn

Batches = Iterable[tuple[Tensor, Tensor]]
AT_A_TIME = 500  # examples of an evaluation


@dataclass(frozen=True)
class Workload:
    """`clients` clients of `examples` examples each, one epoch in batches of `batch`.

    spread   standard deviation of the logarithm of their sizes, where these differ; `examples` is
             their mean then, but for rounding
    shape    of an example, an image or a text
    classes  of images, or characters of texts
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    clients: int = 1
    examples: int = 60
    batch: int = 10
    classes: int = 10
    lr: float = 0.05
    text: bool = False
    spread: float = 0.0

    @cached_property
    def sizes(self) -> Tensor:
        """Examples of each client, int64 [clients]: 1 to ten times the mean."""
        normal = torch.randn(self.clients, generator=torch.Generator().manual_seed(2))
        sizes = self.examples * (self.spread * normal - self.spread**2 / 2).exp()
        return sizes.round().long().clamp(1, 10 * self.examples)

    @cached_property
    def samples(self) -> int:
        """Examples of a round."""
        return int(self.sizes.sum())

    @cached_property
    def steps(self) -> int:
        """Client steps of a round."""
        return int((-(-self.sizes // self.batch)).sum())

    def module(self) -> nn.Module:
        """The first model, the same at each call."""
        torch.manual_seed(0)
        return self.make()

    def data(self) -> FederatedDataset:
        n, g = self.samples, torch.Generator().manual_seed(1)
        columns = self.texts(n, g) if self.text else self.images(n, g)
        return FederatedDataset(columns, torch.cat((torch.zeros(1).long(), self.sizes.cumsum(0))))

    def images(self, n: int, g: torch.Generator) -> dict[str, Tensor]:
        """The picture of a class, half covered by noise; pixels are in [0, 1]."""
        pictures = torch.rand(self.classes, *self.shape, generator=g)
        y = torch.randint(self.classes, (n,), generator=g)
        return {"x": torch.rand(n, *self.shape, generator=g).lerp_(pictures[y], 0.5), "y": y}

    def texts(self, n: int, g: torch.Generator) -> dict[str, Tensor]:
        """Each character is followed by one other, but in a tenth of all places by any."""
        after = torch.randperm(self.classes, generator=g)
        ids = torch.randint(self.classes, (n, self.shape[0] + 1), generator=g)
        follows = torch.rand(ids.shape, generator=g) < 0.9
        for t in range(1, ids.shape[1]):
            ids[:, t] = torch.where(follows[:, t], after[ids[:, t - 1]], ids[:, t])
        return {"x": ids[:, :-1].contiguous(), "y": ids[:, 1:].contiguous()}

    def task(self, data: FederatedDataset) -> vecfl.Task:
        return vecfl.Task(self.module(), vecfl.cross_entropy, example=data.examples(2))

    def algorithm(self) -> vecfl.Algorithm:
        return vecfl.fedavg(lr=self.lr, batches=vecfl.Batches(self.batch))


@dataclass(frozen=True)
class Player:
    """Plays a round when it is called; `loss` is the mean over all examples by the model now."""

    play: Callable[[], Mapping[str, float | int | str]]
    loss: Callable[[], float]

    def __call__(self) -> Mapping[str, float | int | str]:
        """What is told of the round."""
        return self.play()


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


COLOR = (3, 32, 32)
MODELS = {
    "logistic": Workload(lambda: nn.Linear(784, 10), (784,), 100),
    "ragged": Workload(lambda: nn.Linear(784, 10), (784,), 100, spread=1.0),
    "mlp": Workload(mlp, (784,), 100),
    "small_cnn": Workload(small_cnn, (1, 28, 28), 100),
    # That of EMNIST: with its dropouts, as are those of pfl.
    "cnn": Workload(lambda: emnist_cnn(62), (1, 28, 28), 10, 100, 20, classes=62),
    "cifar_cnn": Workload(cifar_cnn, COLOR, 10, 100, 20),
    "pfl_cnn": Workload(pfl_cnn, COLOR, 50, 50, 10),
    "lstm": Workload(CharLSTM, (80,), 10, 20, 4, classes=90, lr=1.0, text=True),
    "resnet": Workload(lambda: resnet18_gn(10), COLOR, 4, 20, 20),
}
# That a round is timed with.
COHORTS = {name: [work.clients] for name, work in MODELS.items()} | {"logistic": [100, 1000]}


def loss_of(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy over examples, or over all places of texts."""
    return F.cross_entropy(module(x).flatten(0, -2), y.flatten())


def train_tuned(module: nn.Module, params: list[Tensor], lr: float, batches: Batches) -> None:
    """A client's steps by `autograd.grad` and one foreach update."""
    for x, y in batches:
        grads = torch.autograd.grad(loss_of(module, x, y), params)
        with torch.no_grad():
            torch._foreach_add_(params, grads, alpha=-lr)


def train_written(module: nn.Module, params: list[Tensor], lr: float, batches: Batches) -> None:
    """A client's steps as most would write them."""
    optimizer = torch.optim.SGD(params, lr=lr)
    for x, y in batches:
        optimizer.zero_grad()
        loss_of(module, x, y).backward()
        optimizer.step()


def plain_round(work: Workload, tuned: bool, device: str = "cpu", processes: int = 1) -> Player:
    """Rounds by a plain loop: shuffle, local steps, float32 mean of the models.

    processes  forks that share the clients; each sends its part of the mean
    """
    data, module = work.data().to(device), work.module().to(device).train()
    params: list[Tensor] = list(module.parameters())
    clients = [data.client(k) for k in range(data.num_clients)]
    shares = (work.sizes / work.samples).tolist()
    train = train_tuned if tuned else train_written

    def part(start: list[Tensor], first: int) -> list[Tensor]:
        """The sum over each `processes`-th client from the `first` one."""
        total = [torch.zeros_like(p) for p in params]
        for client, share in list(zip(clients, shares, strict=True))[first::processes]:
            with torch.no_grad():
                torch._foreach_copy_(params, start)
            order = torch.randperm(len(client["x"]), device=device)
            parts = (client[name][order].split(work.batch) for name in "xy")
            train(module, params, work.lr, zip(*parts, strict=True))
            with torch.no_grad():
                torch._foreach_add_(total, params, alpha=share)
        return total

    others = [forked(partial(part, first=i)) for i in range(1, processes)]

    def play() -> dict[str, float | int | str]:
        start = [p.detach().clone() for p in params]
        for other in others:
            other.send([t.numpy() for t in start])
        total = part(start, 0)
        for other in others:
            torch._foreach_add_(total, [torch.from_numpy(array) for array in other.recv()])
        with torch.no_grad():
            torch._foreach_copy_(params, total)
        return {}

    @torch.no_grad()
    def loss() -> float:
        module.eval()
        parts = zip(*(data.columns[name].split(AT_A_TIME) for name in "xy"), strict=True)
        total = sum(float(loss_of(module, x, y)) * len(x) for x, y in parts)
        module.train()
        return total / len(data.columns["x"])

    return Player(play, loss)


def forked(part: Callable[[list[Tensor]], list[Tensor]]) -> Connection:
    """A process that answers parameters with `part` of them, until this one ends."""
    ours, theirs = Pipe()

    def serve() -> None:
        ours.close()
        torch.set_num_threads(1)
        with suppress(EOFError):
            while True:
                start = [torch.from_numpy(array) for array in theirs.recv()]
                theirs.send([t.numpy() for t in part(start)])

    get_context("fork").Process(target=serve, daemon=True).start()
    return ours


def simulation(work: Workload, **arguments: Any) -> vecfl.Simulation:
    """The rounds of a workload by vecfl; further `arguments` of `vecfl.Simulation`."""
    data = work.data()
    return vecfl.Simulation(work.task(data), data, work.algorithm(), vecfl.everyone(), **arguments)


def vecfl_round(work: Workload, **arguments: Any) -> Player:
    """The same rounds by vecfl."""
    sim = simulation(work, **arguments)
    state = sim.start()

    def play() -> dict[str, float | int | str]:
        nonlocal state
        state, metrics = sim.round(state)
        assert metrics["system/client_steps"] == work.steps
        assert metrics["train/dropped_clients"] == 0
        return metrics

    return Player(play, lambda: float(sim.evaluate(state, sim.data.columns)["eval/loss"]))
