"""Small private runs, and what their rounds add up."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import vecfl
from vecfl import Batches, FederatedDataset, Simulation, Task
from vecfl.aggregate import Aggregate
from vecfl.algorithms import Algorithm
from vecfl.privacy import Sampling
from vecfl.sampling import Sampler, lawful
from vecfl.transforms import Transform

WORK: dict[str, Any] = {"lr": 0.5, "batches": Batches(4)}
EVERYONE = Sampling("everyone")
UNIFORM = vecfl.uniform_weights
ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "fedavg": lambda: vecfl.fedavg(weights=UNIFORM, **WORK),
    "capped": lambda: vecfl.fedavg(weights=vecfl.capped(5), **WORK),
    "fedsgd": lambda: vecfl.fedsgd(lr=1.0, size=4, weights=UNIFORM),
    "fedprox": lambda: vecfl.fedprox(mu=0.3, weights=UNIFORM, **WORK),
    "fedadam": lambda: vecfl.fedadam(server_lr=0.1, weights=UNIFORM, **WORK),
    "fedavgm": lambda: vecfl.fedavgm(weights=UNIFORM, **WORK),
    "fedadagrad": lambda: vecfl.fedadagrad(server_lr=0.1, weights=UNIFORM, **WORK),
    "fedyogi": lambda: vecfl.fedyogi(server_lr=0.1, weights=UNIFORM, **WORK),
    "fedopt": lambda: vecfl.fedopt("fedopt", vecfl.server_lamb(0.1), weights=UNIFORM, **WORK),
    "fedprox_adaptive": lambda: vecfl.fedprox_adaptive(weights=UNIFORM, **WORK),
    "dga": lambda: vecfl.dga(max_weight=1.0, **WORK),
    "dga by mean": lambda: vecfl.dga(weighting="mean", softmax_beta=30.0, **WORK),
    "scaffold": lambda: vecfl.scaffold(**WORK),
    "scaffold, option 1": lambda: vecfl.scaffold(option=1, **WORK),
    "feddyn": lambda: vecfl.feddyn(alpha=0.1, **WORK),
    "ema": lambda: vecfl.ema(vecfl.fedavg(weights=UNIFORM, **WORK), 0.9),
    "feedback": lambda: vecfl.chain(
        vecfl.fedavg(weights=UNIFORM, **WORK), vecfl.error_feedback(vecfl.top_k(0.3))
    ),
    "codec": lambda: vecfl.chain(vecfl.fedavg(weights=UNIFORM, **WORK), vecfl.qsgd(4)),
    "clipped": lambda: vecfl.chain(vecfl.fedavg(weights=UNIFORM, **WORK), vecfl.clip_by_norm(9.0)),
}
CLIPS: dict[str, Callable[[], Transform]] = {
    "norm": lambda: vecfl.clip_by_norm(0.5),
    "layer": lambda: vecfl.clip_by_layer(0.5),
    "adaptive": lambda: vecfl.adaptive_clip(0.5, count_noise=2.0),
    "l1": lambda: vecfl.clip_by_l1(0.5),
}


def module() -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for p, value in zip(made.parameters(), (0.3, 0.1, -0.2, 0.0), strict=True):
            p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape) * value + value)
    return made


def population(*sizes: int, spoilt: int | None = None, huge: int | None = None) -> FederatedDataset:
    """Clients of these sizes; one of NaN, one of numbers so large that its update is clipped."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(sum(sizes), 3, generator=g, dtype=torch.float64)
    y = torch.randint(2, (sum(sizes),), generator=g)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    for k, value in ((spoilt, torch.nan), (huge, 50.0)):
        if k is not None:
            x[offsets[k] : offsets[k + 1]] *= value
    return FederatedDataset({"x": x, "y": y}, offsets)


def simulation(
    algorithm: Algorithm, data: FederatedDataset, sampler: Sampler, **how: Any
) -> Simulation:
    task = Task(module(), vecfl.cross_entropy, example=population(8).examples(2))
    how = {"backend": "loop", "dtype": torch.float64} | how
    return Simulation(task, data, algorithm, sampler, **how)


def sums_of_rounds(made: Algorithm, data: FederatedDataset, *cohorts: list[int]) -> list[Aggregate]:
    """What rounds with these cohorts add up, before any noise."""
    sums = list[Aggregate]()

    def server(state: dict[str, Tensor], found: Aggregate, round: Any) -> dict[str, Tensor]:
        sums.append(replace(found, total=found.total.clone()))
        return made.server(state, found, round)

    sampler = lawful(lambda e, s, round: torch.tensor(cohorts[round]), lambda n: EVERYONE)
    changed = replace(made, server=server).promises(made.privacy)
    sim = simulation(changed, data, sampler)
    sums.clear()  # of the step by zeros at the start
    state = sim.start()
    for _ in cohorts:
        state, metrics = sim.round(state)
        state = sim.observe(state, metrics)
    return sums
