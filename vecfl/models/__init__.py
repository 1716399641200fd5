"""Models of the field's standard experiments: ordinary modules for ordinary batches."""

from vecfl.models.cifar import cifar_cnn, pfl_cnn
from vecfl.models.mnist import emnist_cnn, logistic, small_cnn
from vecfl.models.recurrent import GRU, LSTM
from vecfl.models.resnet import resnet18_gn
from vecfl.models.text import CharGRU, CharLSTM, WindowLM

__all__ = ["GRU", "LSTM", "CharGRU", "CharLSTM", "WindowLM"]
__all__ += ["cifar_cnn", "emnist_cnn", "logistic", "pfl_cnn", "resnet18_gn", "small_cnn"]
