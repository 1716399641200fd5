"""The models for color images by their sizes and layers, and as clients train them."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.models.rounds import check_backends_agree
from vecfl.models import cifar_cnn, pfl_cnn, resnet18_gn


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_by_hand() -> None:
    convolutions = (27 * 32 + 32) + (9 * 32 * 64 + 64)
    # 32, pooled 16, pooled 8: 64 * 8 * 8 features. 30, 28, pooled 14: 64 * 14 * 14.
    assert size(cifar_cnn()) == convolutions + 4096 * 128 + 128 + 1290 == 545_098
    assert size(pfl_cnn()) == convolutions + 12544 * 128 + 128 + 1290 == 1_626_442
    assert size(pfl_cnn(100)) == size(pfl_cnn()) + 90 * 129


def test_parameter_count_of_the_resnet_by_hand() -> None:
    # A stage: four 3x3 convolutions, all but the first from its own channels; the three later
    # stages have one of 1x1, too. A GroupNorm has two numbers a channel.
    stem, first = 27 * 64 + 128, 4 * (9 * 64 * 64 + 128)
    later = sum((9 + 1) * c // 2 * c + 3 * 9 * c * c + 5 * 2 * c for c in (128, 256, 512))
    assert size(resnet18_gn()) == stem + first + later + 512 * 100 + 100 == 11_220_132
    assert size(resnet18_gn(10)) == stem + first + later + 512 * 10 + 10 == 11_173_962


def test_the_resnet_has_18_layers_and_halves_the_image_three_times() -> None:
    module, sides = resnet18_gn(), []
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in module.modules() if isinstance(m, nn.GroupNorm)]
    assert sum(m.kernel_size == (3, 3) for m in convolutions) + 1 == 18  # and the linear layer
    assert len(norms) == len(convolutions) and {m.num_groups for m in norms} == {2}
    for layer in list(module)[3:11]:
        layer.register_forward_hook(lambda m, x, out: sides.append(tuple(out.shape[1:])))
    assert module(torch.randn(1, 3, 24, 24)).shape == (1, 100)
    shapes = [(64, 24, 24), (128, 12, 12), (256, 6, 6), (512, 3, 3)]
    assert sides == [shape for shape in shapes for _ in range(2)]
    assert module(torch.randn(1, 3, 32, 32)).shape == (1, 100)


def test_a_block_adds_its_input() -> None:
    block = resnet18_gn()[3]
    nn.init.zeros_(block.second[1].weight)  # what the convolutions give is multiplied by it
    x = torch.randn(2, 64, 4, 4)
    assert torch.equal(block(x), x.relu())


def test_weights_of_pfl_start_uniformly() -> None:
    """Glorot's bound is sqrt(6 / (inputs + outputs)); torch's own is smaller, 1 / sqrt(inputs)."""
    torch.manual_seed(0)
    first, last = (pfl_cnn()[at].weight.abs().max().item() for at in (2, 7))
    assert last == pytest.approx((6 / (12544 + 128)) ** 0.5, rel=1e-3)
    assert first == pytest.approx((6 / (288 + 576)) ** 0.5, rel=1e-2)


@pytest.mark.parametrize(
    ("make", "examples", "side"), [(cifar_cnn, 7, 32), (pfl_cnn, 7, 32), (resnet18_gn, 4, 8)]
)
def test_backends_agree(make: Callable[[], nn.Module], examples: int, side: int) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 256, (examples, 3, side, side), dtype=torch.uint8)
    check_backends_agree(make(), x, torch.arange(examples))
