"""Parts that flags name: vecfl's own, and those of files."""

import logging
from collections.abc import Callable, Mapping

from torch import nn

import vecfl.metrics
import vecfl.robust as robust
import vecfl.sampling as sampling
import vecfl.transforms as transforms
from vecfl.aggregator import aggregated_by
from vecfl.algorithms import Algorithm
from vecfl.errors import InputError
from vecfl.losses import Score
from vecfl.participation import separated
from vecfl.plugins import Known, part, takes
from vecfl.sampling import Sampler

log = logging.getLogger("vecfl")
NAMES = ("everyone", "uniform", "fraction", "uniform_between", "poisson", "cyclic")
SAMPLERS = {name: getattr(sampling, name) for name in NAMES} | {"separated": separated}
CLIPS = {
    n: getattr(transforms, n)
    for n in ("clip_by_norm", "clip_by_layer", "clip_by_l1", "adaptive_clip")
}
NO_TRANSFORMS = ("chain", "private", "adaptive_clip")  # the last two are for --private-clip
TRANSFORMS = {
    n: getattr(transforms, n)
    for n in transforms.__all__
    if n[0].islower() and n not in NO_TRANSFORMS
}
AGGREGATORS = {name: getattr(robust, name) for name in ("coordinate_median", "trimmed_mean")}
ALIKE = ("coordinate_median", "trimmed_mean")  # they have no use for weights
METRICS = {n: getattr(vecfl.metrics, n) for n in ("top_k_accuracy", "recall", "precision", "f1")}


def named_sampler(text: str) -> Sampler:
    """The sampler of --sampler, and a line that says so."""
    found = part("--sampler", text, SAMPLERS)
    log.info("--sampler %s says who takes part; --cohort is not used", text)
    return takes("--sampler", text, found, "eligible", "seed", "round")


def named_transform(
    text: str, flag: str = "--transforms", known: Known = TRANSFORMS
) -> transforms.Transform:
    """The transform of one text of --transforms, or of another flag."""
    found = part(flag, text, known)
    if not isinstance(found, transforms.Transform):
        made = "" if "(" in text else f"; one that makes it takes arguments, or (): {text}(...)"
        raise InputError(f"{flag}: {text} gives {found!r}; expected a vecfl.Transform{made}")
    return found


def named_aggregator(text: str, algorithm: Algorithm, weights: str | None) -> Algorithm:
    """`algorithm` with the aggregator of --aggregator, and a line where weights are in vain."""
    found = part("--aggregator", text, AGGREGATORS)
    takes("--aggregator", text, found, "messages", "weights")
    asked = f"--weights {weights}" if weights else "dga" * (algorithm.name[:3] == "dga")
    if text.partition("(")[0].strip() in ALIKE and asked not in ("", "--weights uniform_weights"):
        log.info("--aggregator %s: clients count alike, in spite of %s", text, asked)
    return aggregated_by(algorithm, found)


def named_metrics(texts: tuple[str, ...]) -> dict[str, Score]:
    """The metrics of --metrics by their names."""
    named = {}
    for text in texts:
        name, equals, what = text.partition("=")
        if not equals:
            raise InputError(f"--metrics: {text}: expected NAME=file.py:function")
        if name in named:
            raise InputError(f"--metrics: {text}: there is one of this name; choose another")
        named[name] = takes("--metrics", what, part("--metrics", what, METRICS), "output", "batch")
    return named


def named_model(text: str, known: Mapping[str, Callable[..., nn.Module]], size: int) -> nn.Module:
    """The module of --model for an output of `size` numbers."""
    make = known[text] if text in known else part("--model", text, known)
    module = make(size) if text in known else takes("--model", text, make, "classes")(size)
    if not isinstance(module, nn.Module):
        raise InputError(f"--model: {text} gives {module!r}; expected an nn.Module")
    return module
