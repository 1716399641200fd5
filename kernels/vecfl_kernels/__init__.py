"""Fused operations on the cohort matrix; kernels/README.md tells how one earns its place."""

from vecfl_kernels.weighted_sum import weighted_sum_

__all__ = ["weighted_sum_"]
