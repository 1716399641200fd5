"""Fused operations on the cohort matrix; kernels/README.md tells how one earns its place."""

from vecfl_kernels.weighted_sum import exact_weighted_sum_, weighted_sum_

__all__ = ["exact_weighted_sum_", "weighted_sum_"]
