"""Models for images [B, 3, 32, 32]; they give logits [B, classes]."""

from torch import nn

from vecfl.models.mnist import reddi_cnn


def cifar_cnn(classes: int = 10) -> nn.Module:
    """Two padded 3x3 convolutions, each with a pool, and two linear layers: 545,098 parameters.

    After the CNNs of McMahan et al. 2017, arXiv:1602.05629, with 3x3 filters.
    """
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4096, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def pfl_cnn(classes: int = 10) -> nn.Module:
    """Two 3x3 convolutions, a pool and two linear layers, with dropout: 1,626,442 parameters.

    The CIFAR-10 benchmark of Granqvist et al., NeurIPS 2024, arXiv:2404.06430: the EMNIST CNN of
    Reddi et al. for color images; weights start as Glorot and Bengio 2010 have them, uniformly.
    """
    module = reddi_cnn(3, 12544, classes)
    for layer in module:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return module
