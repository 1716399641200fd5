"""How near the steps of a round come to what this machine can do at most, measured here and now."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vecfl.precision import products
from vecfl.random import Kind, stream
from vecfl.simulation import Simulation


def shares(busy: float, moved: float, flops: float, sim: Simulation) -> list[str]:
    """How near the steps of a round come to this machine's rates, measured now."""
    found = (
        ("bytes moved", moved, copy_bandwidth(sim.device), "B", "copy"),
        ("arithmetic", flops, product_rate(sim), "FLOP", "product"),
    )
    return [
        f"{name:18}{amount / 1e9:10.3f} G{unit}, {amount / busy / 1e9:.2f} G{unit}/s: "
        f"{amount / busy / rate:.1%} of a {what}'s {rate / 1e9:.1f} G{unit}/s here"
        for name, amount, rate, unit, what in found
    ]


def executed(metrics: Mapping[str, Any]) -> float:
    """The slot-steps of a round, idle ones included."""
    steps, efficiency = (metrics[f"system/{n}"] for n in ("client_steps", "slot_efficiency"))
    return steps / efficiency if efficiency else 0.0


def step_bytes(sim: Simulation) -> int:
    """What the step of a slot reads and writes of row, gradient and examples, computed.

    It reads a row forward and backward, writes a gradient, and reads both and writes the row to
    move it: 6 passes, 4 where a layer moves its weights itself; each tensor of the optimizer is
    read and written. An example is read and written once. Activations do not count.
    """
    rule, layout = sim.algorithm.rule, sim.task.layout
    fused = sim.arrangement.backend.startswith("stacked") and rule.one_gradient and not rule.mu
    row = layout.trainable * sim.dtype.itemsize * ((4 if fused else 6) + 2 * rule.optimizer.states)
    one = sum(c[:1].numel() * c.element_size() for c in sim.data.columns.values())
    return row + 2 * rule.batches.size * one


def step_flops(sim: Simulation) -> int:
    """The arithmetic of products and convolutions in one step of one client, as torch counts it."""
    task = sim.task.to(sim.device, sim.dtype)
    batch = sim.data.examples(sim.algorithm.rule.batches.size)
    ready = task.prepare({name: c.to(sim.device) for name, c in batch.items()}, streams(sim.device))
    task.draws.begin(streams(sim.device))
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        value, _ = task.loss(task.output(ready), ready)
        value.sum().backward()
    return counter.get_total_flops()


def streams(device: torch.device) -> Tensor:
    return stream(Kind.DROPOUT).to(device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of 64 MiB in this process."""
    x = torch.ones(1 << 24, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / shortest(lambda: y.copy_(x), device)


def product_rate(sim: Simulation) -> float:
    """Floating-point operations a second of a product of 1,024 x 1,024 in the run's dtype."""
    x = torch.ones(1024, 1024, device=sim.device, dtype=sim.dtype)
    with products(sim.arrangement.precision):
        return 2 * 1024**3 / shortest(lambda: x @ x, sim.device)


def shortest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, the best of five, after one more."""
    best = math.inf
    for _ in range(6):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        best = min(best, time.perf_counter() - began)
    return best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
