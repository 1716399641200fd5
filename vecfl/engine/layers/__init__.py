"""Layers that hold the parameters of S clients; their input is one batch, client after client."""

from vecfl.engine.layers.base import StackedLayer
from vecfl.engine.layers.by_vmap import ByVmap
from vecfl.engine.layers.convolution import (
    FORMULATIONS,
    StackedConvolution,
    has_convolutions,
    usual_formulation,
)
from vecfl.engine.layers.stack import stack_layers

__all__ = [
    "FORMULATIONS",
    "ByVmap",
    "StackedConvolution",
    "StackedLayer",
    "has_convolutions",
    "stack_layers",
    "usual_formulation",
]
