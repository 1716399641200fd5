"""Models for images [B, 1, 28, 28]; they give logits [B, classes]."""

from torch import nn


def logistic(classes: int = 10) -> nn.Module:
    """Multinomial logistic regression on the 784 pixels: 785 parameters a class."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))


def emnist_cnn(classes: int = 10) -> nn.Module:
    """Two 3x3 convolutions, a pool and two linear layers, with dropout: 1,199,882 parameters.

    Reddi et al., ICLR 2021, arXiv:2003.00295, the EMNIST CNN, there with 62 classes.
    """
    return reddi_cnn(1, 9216, classes)


def reddi_cnn(channels: int, features: int, classes: int) -> nn.Sequential:
    """The same for images of other channels and sizes, with `features` numbers behind the pool."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(features, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, classes),
    )


def small_cnn(classes: int = 10) -> nn.Module:
    """Two 3x3 convolutions with pools and two linear layers: 14,410 parameters, 16,126 for 62.

    After LeNet-5, LeCun et al. 1998, with 3x3 filters; small enough for rounds of many clients.
    """
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 32),
        nn.ReLU(),
        nn.Linear(32, classes),
    )
