"""Models of the field's standard experiments: ordinary modules for ordinary batches."""

from vecfl.models.mnist import emnist_cnn, logistic

__all__ = ["emnist_cnn", "logistic"]
