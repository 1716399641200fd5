"""The models by their sizes, and as clients train them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models.rounds import check_backends_agree
from vecfl.data.digits import DIGITS_SCALE, digits
from vecfl.models import emnist_cnn, logistic, small_cnn


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_by_hand() -> None:
    assert size(logistic()) == 784 * 10 + 10 == 7_850
    # 28 - 2 = 26, 26 - 2 = 24, pooled 12: 64 * 12 * 12 = 9,216 features.
    body = (9 * 32 + 32) + (9 * 32 * 64 + 64) + (9_216 * 128 + 128)
    assert size(emnist_cnn()) == body + 128 * 10 + 10 == 1_199_882
    assert size(emnist_cnn(62)) == body + 128 * 62 + 62 == 1_206_590
    # 26, pooled 13, 11, pooled 5: 16 * 5 * 5 = 400 features.
    body = (9 * 8 + 8) + (9 * 8 * 16 + 16) + (400 * 32 + 32)
    assert size(small_cnn()) == body + 32 * 10 + 10 == 14_410
    assert size(small_cnn(62)) == body + 32 * 62 + 62 == 16_126 < 20_000


@pytest.mark.parametrize("module", [logistic(), emnist_cnn(), emnist_cnn(62), small_cnn(7)])
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


@pytest.mark.parametrize("make", [logistic, emnist_cnn, small_cnn])
def test_backends_agree(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8)
    check_backends_agree(make(), x, torch.arange(7))


def test_the_small_cnn_learns_in_three_epochs() -> None:
    """Scikit-learn's digits, magnified to 24 x 24 in a frame; guessing is right for 10 %."""
    train, test = ({"x": enlarged(d["x"]), "y": d["y"]} for d in digits())
    torch.manual_seed(0)
    module = small_cnn()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.003)
    for _ in range(3):
        for batch in torch.randperm(len(train["y"])).split(20):
            optimizer.zero_grad()
            F.cross_entropy(module(train["x"][batch]), train["y"][batch]).backward()
            optimizer.step()
    assert (module(test["x"]).argmax(1) == test["y"]).float().mean() > 0.9


def enlarged(x: torch.Tensor) -> torch.Tensor:
    """Images [n, 1, 8, 8] of 0..16 as [n, 1, 28, 28] of 0 to 1."""
    large = x.repeat_interleave(3, -1).repeat_interleave(3, -2)
    return F.pad(large * DIGITS_SCALE, (2, 2, 2, 2))
