"""Models and ragged clients of the oracle table."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import Transforms
from .loop import Columns, Loss

BATCH = 4
SIZES = (BATCH + 1, 0, 1, 23, BATCH - 1, BATCH, 2 * BATCH)


@dataclass(frozen=True)
class Problem:
    module: Callable[[], nn.Module]
    loss: Loss
    x: Callable[[torch.Generator, int], Tensor]
    y: Callable[[torch.Generator, int], Tensor]
    augment: Transforms = ()
    freeze: str = ""

    def clients(self, sizes: tuple[int, ...] = SIZES) -> list[Columns]:
        g = torch.Generator().manual_seed(11)
        return [{"x": self.x(g, n), "y": self.y(g, n)} for n in sizes]

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return self.module().double()


def classes(output: Tensor, batch: Columns) -> tuple[Tensor, Tensor]:
    value = F.cross_entropy(output, batch["y"], reduction="none")
    return value, torch.ones_like(value)


def tokens(output: Tensor, batch: Columns) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over positions; a label of -100 is no position."""
    y = batch["y"]
    value = F.cross_entropy(output.flatten(0, 1), y.flatten(), reduction="none")
    return value.view(y.shape).sum(1), (y != -100).to(value.dtype).sum(1)


class Cnn(nn.Module):
    """Convolutions, GroupNorm, element-wise (8 and 16 bit draws) and channel dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)
        self.conv2, self.channels = nn.Conv2d(4, 4, 3), nn.Dropout2d(0.25)
        self.drop, self.again = nn.Dropout(0.5), nn.Dropout(0.3)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channels(torch.relu(self.norm(self.conv1(x))))
        x = self.drop(torch.tanh(self.conv2(x)).flatten(1))
        return self.head(self.again(x))


class Tied(nn.Module):
    """One matrix under two names, a frozen layer, a 0-d gain, and dropout, some kept off."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(5, 5, bias=False), nn.Linear(5, 5)
        self.decode.weight = self.encode.weight
        self.frozen, self.head = nn.Linear(5, 5), nn.Linear(5, 3)
        self.frozen.requires_grad_(False)
        self.gain, self.drop = nn.Parameter(torch.tensor(0.7)), nn.Dropout(p)
        self.off = nn.Dropout(p)

    def train(self, mode: bool = True) -> "Tied":
        super().train(mode)
        self.off.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.off(x))
        x = torch.tanh(self.decode(torch.tanh(self.encode(x))))
        return self.head(self.gain * torch.tanh(self.frozen(x)) + x)


class Tracked(nn.Module):
    """Buffers that training changes: an integer count, a moving average of a weight, a constant."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.inner, self.drop = nn.Linear(5, 3), nn.Dropout(p)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mean_weight", torch.zeros(3, 5))
        self.register_buffer("constant", torch.linspace(0.5, 1.5, 5))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.mean_weight = 0.9 * self.mean_weight + 0.1 * self.inner.weight.detach()
        return self.inner(self.drop(x) * self.constant) + F.linear(x, self.mean_weight)


class Characters(nn.Module):
    """Next character from embeddings; half the positions may carry no label."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)))


class Positions(nn.Module):
    """Linear layers over positions: one called twice, one frozen, one without bias, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen = nn.Linear(5, 5), nn.Linear(5, 5)
        self.frozen.requires_grad_(False)
        self.head, self.drop = nn.Linear(5, 7, bias=False), nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.drop(torch.tanh(self.first(x)))))
        return self.head(self.drop(x + self.frozen(x)))


class Lstm(nn.Module):
    """Next character from an LSTM of two layers, time first, and from its last states."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(7, 4, padding_idx=2), nn.Dropout(0.25)
        self.lstm, self.head = nn.LSTM(4, 3, 2), nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        out, (h, c) = self.lstm(self.drop(self.embed(x)).transpose(0, 1))
        out = out.transpose(0, 1) + (h + 0.5 * c).sum(0).unsqueeze(1)
        return self.head(out)


class Gru(nn.Module):
    """Next character from a GRU that runs both ways from a state of the first character."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.start = nn.Embedding(7, 4), nn.Linear(4, 6)
        self.gru = nn.GRU(4, 3, batch_first=True, bidirectional=True)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        e = self.embed(x)
        start = torch.tanh(self.start(e[:, 0])).unflatten(1, (2, 3)).transpose(0, 1)
        return self.head(self.norm(self.gru(e, start.contiguous())[0]))


class Odd(nn.Module):
    """A layer of one's own: a matrix that is used twice, a vector, and dropout between."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = nn.Linear(5, 5, bias=False), nn.Dropout(0.25)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.drop(self.inner(x)) * self.gain) @ self.inner.weight


def floats(*shape: int) -> Callable[[torch.Generator, int], Tensor]:
    return lambda g, n: torch.randn(n, *shape, generator=g, dtype=torch.float64)


def integers(high: int, *shape: int) -> Callable[[torch.Generator, int], Tensor]:
    return lambda g, n: torch.randint(high, (n, *shape), generator=g)


def some_labels(g: torch.Generator, n: int) -> Tensor:
    y = torch.randint(7, (n, 6), generator=g)
    return torch.where(torch.rand(n, 6, generator=g) < 0.4, -100, y)


def pixels(g: torch.Generator, n: int) -> Tensor:
    return torch.randint(256, (n, 1, 6, 6), generator=g, dtype=torch.uint8)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.25), nn.Linear(8, 3))


def mixed() -> nn.Module:
    """Fused layers, and between them some that are not."""
    ends = nn.LayerNorm((3, 6)), nn.Dropout(0.25), nn.Flatten(), nn.Linear(18, 3)
    return nn.Sequential(nn.Linear(5, 5), Odd(), nn.PReLU(), nn.Conv1d(4, 3, 2, padding=1), *ends)


def wide() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(24, 6), nn.Tanh(), nn.Dropout(0.25), nn.Linear(6, 3)
    )


PROBLEMS = {
    "linear": Problem(lambda: nn.Linear(5, 3), classes, floats(5), integers(3)),
    "mlp": Problem(mlp, classes, floats(5), integers(3)),
    "cnn": Problem(Cnn, classes, pixels, integers(3)),
    "tied": Problem(Tied, classes, floats(5), integers(3)),
    "buffers": Problem(Tracked, classes, floats(5), integers(3)),
    "tokens": Problem(Characters, tokens, integers(7, 6), some_labels),
}

CROP_FLIP = (("crop", 2), ("flip",), ("normalise", (0.4,), (0.3,)))
FLIP_CROP = (("normalise", (0.1, -0.2), (0.5, 2.0)), ("flip",), ("crop", 1))
AUGMENTED = {
    "augmented": Problem(Cnn, classes, pixels, integers(3), CROP_FLIP),
    "images": Problem(wide, classes, floats(2, 3, 4), integers(3), FLIP_CROP),
}
LAYERED = {  # of layers that have a stacked form of their own, or none
    "lstm": Problem(Lstm, tokens, integers(7, 6), some_labels),
    "gru": Problem(Gru, tokens, integers(7, 6), some_labels),
    "mixed": Problem(mixed, classes, floats(4, 5), integers(3)),
}
