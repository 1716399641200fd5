"""Models of the field's standard experiments: ordinary modules for ordinary batches."""

from vecfl.models.mnist import emnist_cnn, logistic
from vecfl.models.text import WindowLM

__all__ = ["WindowLM", "emnist_cnn", "logistic"]
