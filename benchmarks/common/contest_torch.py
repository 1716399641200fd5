"""The models of the contest in PyTorch, and local training as fast as a plain loop can do it."""

import functools
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.contest import EMBEDDING, HIDDEN, SHAPES, VOCABULARY, Arrays, Workload, load


class CharLSTM(nn.Module):
    """The next letter at each place: an embedding, two LSTM layers, logits [B, T, 90]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, EMBEDDING)
        self.lstm = nn.LSTM(EMBEDDING, HIDDEN, num_layers=2, batch_first=True)
        self.logits = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.logits(self.lstm(self.embedding(ids))[0])
        return out


def module(work: Workload, start: Arrays) -> nn.Module:
    """The model of a workload with these weights, in training mode."""
    built = _module(work)
    built.load_state_dict({name: torch.from_numpy(value) for name, value in start.items()})
    return built.train()


def _module(work: Workload) -> nn.Module:
    if work.model == "logistic":
        return nn.Sequential(OrderedDict(logits=nn.Linear(784, 10)))
    if work.model == "lstm":
        return CharLSTM()
    shapes = SHAPES[work.model]
    channels, flat = shapes["conv1.weight"][1], shapes["hidden.weight"][1]
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(channels, 32, 3),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(32, 64, 3),
        relu2=nn.ReLU(),
        pool=nn.MaxPool2d(2),
        dropout1=nn.Dropout(0.25),
        flatten=nn.Flatten(),
        hidden=nn.Linear(flat, 128),
        relu3=nn.ReLU(),
        dropout2=nn.Dropout(0.5),
        logits=nn.Linear(128, 10),
    )
    kept = layers.items() if work.dropout else [x for x in layers.items() if "drop" not in x[0]]
    return nn.Sequential(OrderedDict(kept))


def arrays(model: nn.Module) -> Arrays:
    """The parameters of a model by name."""
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def mean_loss(output: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits [B, ..., classes], the mean over examples and places."""
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


def probe_loss(path: Path, model: Arrays) -> float:
    """The loss of a model on the examples of a job that nobody trains on, without dropout."""
    job = load(path)
    net = module(job.work, model).eval()
    with torch.no_grad():
        output = net(torch.from_numpy(job.probe_x))
    return mean_loss(output, torch.from_numpy(job.probe_y)).item()


class Local:
    """A model of its own, and the clients of a job to train it on."""

    def __init__(self, path: Path) -> None:
        job = load(path)
        self.work, self.module = job.work, module(job.work, job.start)
        self.params: list[Tensor] = list(self.module.parameters())
        self.x, self.y = torch.from_numpy(job.x), torch.from_numpy(job.y)

    def shuffled(self, client: int) -> tuple[Tensor, Tensor]:
        order = torch.randperm(self.work.examples)
        return self.x[client][order], self.y[client][order]

    def train(self, client: int) -> None:
        """One epoch by `autograd.grad` and one foreach update for all parameters."""
        x, y = self.shuffled(client)
        for i in range(0, len(x), self.work.batch):
            batch = slice(i, i + self.work.batch)
            grads = torch.autograd.grad(mean_loss(self.module(x[batch]), y[batch]), self.params)
            with torch.no_grad():
                torch._foreach_add_(self.params, grads, alpha=-self.work.lr)

    def train_as_written(self, client: int) -> None:
        """One epoch as tutorials write it: zero_grad, backward, an optimizer's step."""
        optimizer = torch.optim.SGD(self.params, lr=self.work.lr)
        x, y = self.shuffled(client)
        for i in range(0, len(x), self.work.batch):
            batch = slice(i, i + self.work.batch)
            optimizer.zero_grad()
            mean_loss(self.module(x[batch]), y[batch]).backward()
            optimizer.step()


@functools.cache
def local(path: Path, worker: int = 0) -> Local:
    """The `Local` of a job, made once in a process for each of its workers."""
    return Local(path)
