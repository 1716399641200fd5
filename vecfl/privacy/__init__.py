"""Differential privacy: mechanisms, what they release, and what that costs."""

from vecfl.privacy.accountant import epsilon, noise_multiplier
from vecfl.privacy.events import Event, ExamplePrivacy, Population, Privacy, Sampling

__all__ = [
    "Event",
    "ExamplePrivacy",
    "Population",
    "Privacy",
    "Sampling",
    "epsilon",
    "noise_multiplier",
]
