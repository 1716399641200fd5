"""FedAvg on a quadratic whose rounds are fractions: the case that FedJAX's tests of FedAvg have.

A step's gradient is w / (sum of the batch's x), lr = 1, w = (0, 2, 4). By batch sums a client ends
at w times a product of 1 - 1/sum:

    client 1, three examples: sums 10 and, wrapped, 4   9/10 * 3/4 = 0.675, moves by 0.325 w
                              10 and, cut, 2            9/10 * 1/2 = 0.45,  moves by 0.55 w
    client 2, two examples:   sum 18                    17/18,              moves by w / 18

    wrapped: w (1 - (3 * 0.325 + 2 / 18) / 5) = 0.7827777 w = (0, 1.5655555, 3.1311111)
    kept:    w (1 - (3 * 0.55  + 2 / 18) / 5) = 0.6477777 w = (0, 1.2955555, 2.5911111)
"""

import pytest
import torch
from torch import Tensor, nn

import vecfl
from vecfl.data import FederatedDataset

from ..oracles.philox import shuffle

SEED = 5


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.0, 2.0, 4.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.w + 0 * x[:, None]


def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """share |w|^2 / 2 with weight x; the shares of a batch add up to 1."""
    return batch["share"] * output.square().sum(1) / 2, batch["x"]


# Client 1 reads 2, 8, 2 in the order of its epoch: 2 + 8 = 10, then 2 alone, or 2 + the first 2.
@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize(
    ("last", "share", "expected"),
    [
        ("wrap", (0.5, 0.5, 0.5), (0, 1.5655555555555556, 3.1311111111111112)),
        ("keep", (0.5, 0.5, 1.0), (0, 1.2955555555555556, 2.5911111111111111)),
    ],
)
def test_a_round_in_closed_form(
    last: str, share: tuple[float, ...], expected: tuple[float, ...], backend: str
) -> None:
    order = torch.from_numpy(shuffle(SEED, 0, 0, epoch=0, n=3).astype("int64"))
    x, shares = torch.empty(3), torch.empty(3)
    x[order], shares[order] = torch.tensor([2.0, 8.0, 2.0]), torch.tensor(share)
    columns = {
        "x": torch.cat((x, torch.tensor([8.0, 10.0]))),
        "share": torch.cat((shares, torch.tensor([0.5, 0.5]))),
    }
    data = FederatedDataset.from_arrays(columns, torch.tensor([0, 0, 0, 1, 1]))
    task = vecfl.Task(Quadratic(), loss, example=data.examples(4))
    algorithm = vecfl.fedavg(lr=1.0, batches=vecfl.Batches(2, last=last))
    how = {"seed": SEED, "backend": backend, "dtype": torch.float64}
    sim = vecfl.Simulation(task, data, algorithm, vecfl.everyone(), **how)
    state, _ = sim.round(sim.start())
    assert state.server["w"].tolist() == pytest.approx(expected, rel=1e-14)
