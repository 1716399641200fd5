"""The models by their sizes, and as clients train them."""

import pytest
import torch
from torch import nn

import vecfl
from vecfl.data import FederatedDataset
from vecfl.models import emnist_cnn, logistic


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_by_hand() -> None:
    assert size(logistic()) == 784 * 10 + 10 == 7_850
    # 28 - 2 = 26, 26 - 2 = 24, pooled 12: 64 * 12 * 12 = 9,216 features.
    body = (9 * 32 + 32) + (9 * 32 * 64 + 64) + (9_216 * 128 + 128)
    assert size(emnist_cnn()) == body + 128 * 10 + 10 == 1_199_882
    assert size(emnist_cnn(62)) == body + 128 * 62 + 62 == 1_206_590


@pytest.mark.parametrize("module", [logistic(), emnist_cnn(), emnist_cnn(62)])
def test_logits_for_every_image(module: nn.Module) -> None:
    (*_, last) = module
    x = torch.randn(3, 1, 28, 28)
    module.eval()
    assert module(x).shape == (3, last.out_features)
    assert torch.allclose(module(x)[:1], module(x[:1]), atol=1e-5)


def test_the_cnn_drops_in_training_alone() -> None:
    module = emnist_cnn()
    assert [m.p for m in module if isinstance(m, nn.Dropout)] == [0.25, 0.5]
    x = torch.randn(1, 1, 28, 28)
    torch.manual_seed(0)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


@pytest.mark.parametrize("make", [logistic, emnist_cnn])
def test_backends_agree(make) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8)
    data = FederatedDataset.from_arrays({"x": x, "y": torch.arange(7)}, [0, 0, 0, 1, 2, 2, 2])
    task = vecfl.Task(make(), vecfl.cross_entropy, example=data.examples(2))
    algorithm = vecfl.fedavg(lr=0.1, batches=vecfl.Batches(size=2, epochs=1))
    models = []
    for backend in ("vmap", "loop"):
        sim = vecfl.Simulation(
            *(task, data, algorithm, vecfl.everyone()),
            **{"backend": backend, "slots": 2, "seed": 3, "dtype": torch.float64},
        )
        state, metrics = sim.round(sim.start())
        models.append(state.server["w"])
    assert (models[0] - sim.start().server["w"]).abs().max() > 1e-3  # it moved
    assert torch.allclose(*models, rtol=0, atol=1e-9)
