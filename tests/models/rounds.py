"""A round of three clients, by each backend."""

import torch
from torch import Tensor, nn

import vecfl
from vecfl.data import FederatedDataset


def trained(module: nn.Module, x: Tensor, y: Tensor, lr: float, *backends: str) -> list[Tensor]:
    """The first model [P], and that after a round by each backend, in float64.

    Of seven examples, a client has a single one; of four, there are two clients.
    """
    data = FederatedDataset.from_arrays({"x": x, "y": y}, [0, 0, 0, 1, 2, 2, 2][: len(x)])
    task = vecfl.Task(module, vecfl.cross_entropy, example=data.examples(2))
    algorithm = vecfl.fedavg(lr=lr, batches=vecfl.Batches(size=2, epochs=1))
    models: list[Tensor] = []
    for backend in backends:
        sim = vecfl.Simulation(
            *(task, data, algorithm, vecfl.everyone()),
            **{"backend": backend, "slots": 2, "seed": 3, "dtype": torch.float64},
        )
        state, _ = sim.round(start := sim.start())
        models = models or [start.server["w"]]
        models.append(state.server["w"])
    return models


def check_backends_agree(module: nn.Module, x: Tensor, y: Tensor, lr: float = 0.1) -> None:
    """Loop and vmap train to the same model, which is not the first one."""
    start, one, other = trained(module, x, y, lr, "loop", "vmap")
    assert (one - start).abs().max() > 1e-3
    torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11)
