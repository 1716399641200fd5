"""Transforms of what clients send: one idea, one file, each a builder of a `Transform` value."""

from vecfl.transforms.base import Transform, chain
from vecfl.transforms.clip import clip_by_layer, clip_by_norm

__all__ = ["Transform", "chain", "clip_by_layer", "clip_by_norm"]
