"""A residual network for small images [B, 3, side, side]; it gives logits [B, classes]."""

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 2


def conv(channels: int, out: int, side: int, stride: int = 1) -> nn.Sequential:
    """A convolution without bias and its GroupNorm."""
    padding = side // 2
    layer = nn.Conv2d(channels, out, side, stride, padding, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.GroupNorm(GROUPS, out))


class Block(nn.Module):
    """Two 3x3 convolutions, and a way around them that changes the shape where they do."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = conv(channels, out, 3, stride)
        self.second = conv(out, out, 3)
        same = stride == 1 and channels == out
        self.around = nn.Sequential() if same else conv(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.around(x))


def resnet18_gn(classes: int = 100) -> nn.Module:
    """ResNet-18 with GroupNorm: 11,220,132 parameters, 11,173,962 for 10 classes.

    He et al., CVPR 2016, arXiv:1512.03385, with the 3x3 stem of its CIFAR networks and no pool
    behind it, for images of 24 x 24 or 32 x 32. Two groups in place of BatchNorm: Hsieh et al.,
    ICML 2020, arXiv:1910.00189, and Reddi et al., ICLR 2021, arXiv:2003.00295, for CIFAR-100.
    """
    blocks, channels = [], 64
    for out in (64, 128, 256, 512):
        blocks += [Block(channels, out, 1 if out == 64 else 2), Block(out, out, 1)]
        channels = out
    stem = (*conv(3, 64, 3), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))
    return nn.Sequential(*stem, *blocks, *head)
