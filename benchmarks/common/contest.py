"""What all contestants of benchmarks/rivals train. Numpy alone: every environment can import it.

A job is a file: a workload, its data, the model at the start and a batch to look at in the end. One
process writes it and every contestant reads it, so nobody trains anything else.
"""

import argparse
import functools
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.float32]]  # by the names of the parameters in PyTorch


@dataclass(frozen=True)
class Workload:
    """`clients` clients with `examples` examples each, one epoch in batches of `batch`, by SGD.

    model    "logistic", "emnist", "cifar" or "lstm"
    dropout  whether the model's dropout is on (True), or its probability 0 (False)
    """

    model: str
    clients: int
    examples: int
    batch: int
    lr: float
    dropout: bool = True

    @property
    def steps(self) -> int:
        """Client steps of a round."""
        return self.clients * -(-self.examples // self.batch)


WORKLOADS = {
    "logistic": Workload("logistic", clients=100, examples=60, batch=10, lr=0.001),
    "emnist": Workload("emnist", clients=10, examples=100, batch=20, lr=0.02),
    "cifar": Workload("cifar", clients=50, examples=50, batch=10, lr=0.01),
    "lstm": Workload("lstm", clients=10, examples=20, batch=4, lr=0.5),
}
IMAGES = {"logistic": (784,), "emnist": (1, 28, 28), "cifar": (3, 32, 32)}
VOCABULARY, LENGTH, EMBEDDING, HIDDEN = 90, 80, 8, 256
PROBE = 200  # examples that nobody trains on


def cnn(channels: int, side: int) -> dict[str, tuple[int, ...]]:
    """Two 3x3 convolutions, a pool and two linear layers: the EMNIST CNN, and pfl's CIFAR CNN."""
    flat = 64 * ((side - 4) // 2) ** 2
    weights: dict[str, tuple[int, ...]] = {
        "conv1": (32, channels, 3, 3),
        "conv2": (64, 32, 3, 3),
        "hidden": (128, flat),
        "logits": (10, 128),
    }
    return {
        f"{name}.{kind}": shape if kind == "weight" else shape[:1]
        for name, shape in weights.items()
        for kind in ("weight", "bias")
    }


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "logistic": {"logits.weight": (10, 784), "logits.bias": (10,)},
    "emnist": cnn(1, 28),
    "cifar": cnn(3, 32),
    "lstm": {
        "embedding.weight": (VOCABULARY, EMBEDDING),
        "lstm.weight_ih_l0": (4 * HIDDEN, EMBEDDING),
        "lstm.weight_hh_l0": (4 * HIDDEN, HIDDEN),
        "lstm.bias_ih_l0": (4 * HIDDEN,),
        "lstm.bias_hh_l0": (4 * HIDDEN,),
        "lstm.weight_ih_l1": (4 * HIDDEN, HIDDEN),
        "lstm.weight_hh_l1": (4 * HIDDEN, HIDDEN),
        "lstm.bias_ih_l1": (4 * HIDDEN,),
        "lstm.bias_hh_l1": (4 * HIDDEN,),
        "logits.weight": (VOCABULARY, HIDDEN),
        "logits.bias": (VOCABULARY,),
    },
}


def weights(model: str, draw: np.random.RandomState) -> Arrays:
    """The model at the start: weights with variance 1 / fan-in, small biases."""

    def one(shape: tuple[int, ...]) -> NDArray[np.float32]:
        bound = (3 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.05
        return draw.uniform(-bound, bound, shape).astype(np.float32)

    return {name: one(shape) for name, shape in SHAPES[model].items()}


def examples(model: str, n: int, draw: np.random.RandomState) -> tuple[NDArray, NDArray]:
    """x and y of n examples that can be learned, so that a loss shows how much was trained.

    Images [n, ...] float32 are one of ten pictures under noise, y [n] its number. Texts [n, 80]
    int64 go from a letter to a fixed next one in three of four places; y [n, 80] are the next ones.
    """
    if model in IMAGES:
        pictures = np.random.RandomState(1).standard_normal((10, *IMAGES[model]))
        y = draw.randint(10, size=n)
        x = 0.9 * pictures[y] + 0.4 * draw.standard_normal((n, *IMAGES[model]))
        return x.astype(np.float32), y.astype(np.int64)
    follows = np.random.RandomState(1).permutation(VOCABULARY)
    text = draw.randint(VOCABULARY, size=(n, LENGTH + 1))
    for t in range(LENGTH):
        goes = draw.random_sample(n) < 0.75
        text[goes, t + 1] = follows[text[goes, t]]
    return text[:, :-1].astype(np.int64), text[:, 1:].astype(np.int64)


@dataclass(frozen=True)
class Job:
    """A workload with its data: x and y [clients, examples, ...], and `PROBE` further examples."""

    work: Workload
    x: NDArray
    y: NDArray
    probe_x: NDArray
    probe_y: NDArray
    start: Arrays


def make(work: Workload, seed: int = 0) -> Job:
    """The job of a seed, the same with every version of numpy."""
    draw = np.random.RandomState(seed)
    start = weights(work.model, draw)
    n = work.clients * work.examples
    x, y = (
        part.reshape(work.clients, work.examples, *part.shape[1:])
        for part in examples(work.model, n, draw)
    )
    return Job(work, x, y, *examples(work.model, PROBE, draw), start)


def save(path: Path, job: Job) -> None:
    """Write a job to `path`, a .npz file."""
    data = {"x": job.x, "y": job.y, "probe_x": job.probe_x, "probe_y": job.probe_y}
    start = {f"start/{name}": value for name, value in job.start.items()}
    save_arrays(path, data | start | {"work": np.array(json.dumps(asdict(job.work)))})


def save_arrays(path: Path, arrays: Mapping[str, NDArray]) -> None:
    """Write arrays by name to a .npz file."""
    savez: Any = np.savez  # its types take the first array for an option
    savez(path, **arrays)


@functools.cache
def load(path: Path) -> Job:
    """The job at `path`, read once in a process."""
    with np.load(path) as file:
        parts = {name: file[name] for name in file.files}
    data = {name: parts.pop(name) for name in ("x", "y", "probe_x", "probe_y")}
    work = Workload(**json.loads(str(parts.pop("work"))))
    return Job(work, **data, start={name[len("start/") :]: w for name, w in parts.items()})


def arguments() -> argparse.ArgumentParser:
    """What every contestant is told; it may be told more."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the model after the rounds, .npz")
    return parser


class Marks:
    """When training began, and when each round ended, on the clock that all processes share."""

    def __init__(self) -> None:
        self.times = [time.monotonic()]

    def round(self) -> None:
        self.times.append(time.monotonic())


def finish(out: Path, marks: Marks, model: Arrays, packages: tuple[str, ...], **ran: str) -> None:
    """Write the model after the last round, and print one line of JSON with all else."""
    save_arrays(out, model)
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    print(json.dumps({"times": marks.times, "versions": versions} | ran), flush=True)
