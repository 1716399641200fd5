"""Transforms of what clients send: one idea, one file, each a builder of a `Transform` value."""

from vecfl.transforms.adaptive_clip import adaptive_clip
from vecfl.transforms.base import Transform, chain
from vecfl.transforms.clip import clip_by_layer, clip_by_norm
from vecfl.transforms.clip_l1 import clip_by_l1
from vecfl.transforms.compress import error_feedback
from vecfl.transforms.flute import flute_quantizer
from vecfl.transforms.local_privacy import flute_local_dp, local_gaussian, local_laplace
from vecfl.transforms.private import private
from vecfl.transforms.privunit import privunit2
from vecfl.transforms.qsgd import qsgd
from vecfl.transforms.random_k import random_k
from vecfl.transforms.sign import scaled_sign
from vecfl.transforms.stochastic import stochastic_quantizer
from vecfl.transforms.top_k import top_k

__all__ = [
    "Transform",
    "adaptive_clip",
    "chain",
    "clip_by_l1",
    "clip_by_layer",
    "clip_by_norm",
    "error_feedback",
    "flute_local_dp",
    "flute_quantizer",
    "local_gaussian",
    "local_laplace",
    "private",
    "privunit2",
    "qsgd",
    "random_k",
    "scaled_sign",
    "stochastic_quantizer",
    "top_k",
]
