"""Transforms of what clients send: one idea, one file, each a builder of a `Transform` value."""

from vecfl.transforms.base import Transform, chain

__all__ = ["Transform", "chain"]
