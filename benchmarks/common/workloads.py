"""What the benchmarks train: generated data, and the same round by a plain loop and by vecfl."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import vecfl
from vecfl.data import FederatedDataset
from vecfl.models import emnist_cnn

LR = 0.05


@dataclass(frozen=True)
class Workload:
    """`clients` clients of `examples` examples each, one epoch in batches of `batch`."""

    module: Callable[[], nn.Module]
    shape: tuple[int, ...]
    clients: int = 1
    examples: int = 60
    batch: int = 10

    @property
    def steps(self) -> int:
        """Client steps of a round."""
        return self.clients * -(-self.examples // self.batch)

    def data(self) -> FederatedDataset:
        n = self.clients * self.examples
        g = torch.Generator().manual_seed(0)
        x, y = torch.rand(n, *self.shape, generator=g), torch.randint(10, (n,), generator=g)
        offsets = torch.arange(0, n + 1, self.examples)
        return FederatedDataset({"x": x, "y": y}, offsets)

    def task(self, data: FederatedDataset) -> vecfl.Task:
        return vecfl.Task(self.module(), vecfl.cross_entropy, example=data.examples(2))

    def algorithm(self) -> vecfl.Algorithm:
        return vecfl.fedavg(lr=LR, batches=vecfl.Batches(self.batch))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


MODELS = {
    "logistic": Workload(lambda: nn.Linear(784, 10), (784,)),
    "mlp": Workload(mlp, (784,)),
    "cnn": Workload(emnist_cnn, (1, 28, 28)),  # with its dropouts
}


def plain_round(work: Workload, tuned: bool, device: str = "cpu") -> Callable[[], object]:
    """A round by a plain loop: shuffle, local steps, float32 mean of the models.

    Tuned: `autograd.grad` and one foreach update; else `zero_grad`, `backward`, `torch.optim`.
    """
    data, module = work.data().to(device), work.module().to(device).train()
    params: list[torch.Tensor] = list(module.parameters())
    clients = [data.client(k) for k in range(data.num_clients)]

    def train_tuned(x: torch.Tensor, y: torch.Tensor) -> None:
        for i in range(0, len(x), work.batch):
            loss = F.cross_entropy(module(x[i : i + work.batch]), y[i : i + work.batch])
            grads = torch.autograd.grad(loss, params)
            with torch.no_grad():
                torch._foreach_add_(params, grads, alpha=-LR)

    def train_written(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer = torch.optim.SGD(params, lr=LR)
        for i in range(0, len(x), work.batch):
            optimizer.zero_grad()
            F.cross_entropy(module(x[i : i + work.batch]), y[i : i + work.batch]).backward()
            optimizer.step()

    train = train_tuned if tuned else train_written

    def run() -> None:
        start = [p.detach().clone() for p in params]
        total = [torch.zeros_like(p) for p in params]
        for client in clients:
            with torch.no_grad():
                torch._foreach_copy_(params, start)
            order = torch.randperm(len(client["x"]), device=device)
            train(client["x"][order], client["y"][order])
            with torch.no_grad():
                torch._foreach_add_(total, params)
        with torch.no_grad():
            torch._foreach_copy_(params, torch._foreach_div(total, len(clients)))

    return run


def simulation(work: Workload, **arguments: Any) -> vecfl.Simulation:
    """The rounds of a workload by vecfl; further `arguments` of `vecfl.Simulation`."""
    data = work.data()
    return vecfl.Simulation(work.task(data), data, work.algorithm(), vecfl.everyone(), **arguments)


def vecfl_round(work: Workload, **arguments: Any) -> Callable[[], dict[str, float | int | str]]:
    """The same round by vecfl; further `arguments` of `vecfl.Simulation`."""
    sim = simulation(work, **arguments)
    state = sim.start()

    def run() -> dict[str, float | int | str]:
        nonlocal state
        state, metrics = sim.round(state)
        assert metrics["system/client_steps"] == work.steps
        assert metrics["train/dropped_clients"] == 0
        return metrics

    return run
