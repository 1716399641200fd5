"""DP-SGD on clients: Abadi et al., CCS 2016, arXiv:1607.00133, Algorithm 1, without amplification.

Examples are not sampled but visited in shuffled epochs, each once, so a pass over a client's data
costs one Gaussian release: its batches are disjoint (McSherry, SIGMOD 2009, theorem 4).
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from vecfl.algorithms.base import Algorithm, Finished, Round, Server, Upload
from vecfl.engine.rule import ExampleNoise
from vecfl.errors import InputError, at_least_zero, inside
from vecfl.layout import Layout
from vecfl.privacy.events import PASSES, ExamplePrivacy
from vecfl.schedule import Batches


def dp_sgd(
    algorithm: Algorithm,
    *,
    clip: float,
    noise_multiplier: float,
    delta: float,
) -> Algorithm:
    """`algorithm` whose clients take steps that are private for each of their examples.

    A step takes for its gradient

        (sum over the valid examples of its batch of g_i min(1, C / |g_i|) + z C N(0, I)) / B

    with g_i the gradient of an example's loss sum over its loss weight (of text the mean over its
    tokens) and B the size of `Batches`, also for a short batch. What follows in the rule, its own
    clip, the pull, corrections and the optimizer, act on that. A g_i that is not finite is zero.

    clip              C, the largest norm of g_i over all trainable parameters
    noise_multiplier  z; 0: clipping alone, and epsilon is inf
    delta             at which `privacy/example_epsilon` is told, that of the client with the most
                      passes; `vecfl.example_epsilon` gives that of every client

    Neighbours differ in one example of one client, whose gradients are zero in one of the two; how
    many examples clients have is public. Messages and their weights see no loss. Clients keep
    "passes", the passes over their data that they have begun. It stands inside of `private`.

    Raises InputError for a second one, batches that wrap around or accumulate, a cap in tokens, and
    algorithms whose clients make another pass or use statistics of their steps; when a run begins
    for buffers that training changes and for messages that depend on losses.
    """
    check(clip, noise_multiplier, delta)
    refuse(algorithm)
    size = algorithm.rule.batches.size

    def upload(state: Server, done: Finished) -> Upload:
        sent = algorithm.upload(state, done)
        return replace(sent, table=sent.table | {PASSES: done.table[PASSES] + begun(done, size)})

    said = f"clip {float(clip)}, noise multiplier {float(noise_multiplier)}"
    made = replace(
        algorithm,
        name=f"{algorithm.name}, dp_sgd",
        rule=replace(algorithm.rule, examples=ExampleNoise(clip, noise_multiplier)),
        upload=upload,
        table=lambda layout: algorithm.table(layout) | {PASSES: ()},
        examples=ExamplePrivacy(noise_multiplier, delta),
        facts={**algorithm.facts, "dp_sgd": said},
    )
    return made.promises(algorithm.privacy)


def check(clip: float, noise_multiplier: float, delta: float) -> None:
    """InputError for numbers out of range."""
    if not 0 < clip < math.inf:
        raise InputError(f"dp_sgd(clip) must be positive and finite, not {clip}")
    at_least_zero("dp_sgd(noise_multiplier)", noise_multiplier)
    inside("dp_sgd(delta)", delta)


def refuse(algorithm: Algorithm) -> None:
    """InputError for an algorithm whose clients use their examples in another way."""
    name, batches = algorithm.name, algorithm.rule.batches
    if algorithm.examples is not None:
        raise InputError(f"{name}: has dp_sgd already")
    refuse_batches(name, batches)
    if algorithm.before is not None:
        raise InputError(
            f"dp_sgd: clients of {name} pass over their data once more, without noise; give "
            "option=2"
        )
    if algorithm.rule.statistics:
        raise InputError(
            f"dp_sgd: {name} weighs clients by statistics of their steps, which no noise is added "
            "to; give another weighting, such as update_rms or uniform"
        )


def refuse_batches(name: str, batches: Batches) -> None:
    """InputError for batches that visit an example otherwise than once in an epoch."""
    if batches.full:
        raise InputError(
            f"dp_sgd: {name} adds up gradients over a whole epoch; give Batches(size) with a step "
            "for each batch"
        )
    if batches.last == "wrap":
        raise InputError(
            "dp_sgd: a batch that is wrapped around visits an example twice in an epoch, which is "
            "accounted once; give Batches(last='keep') or 'drop'"
        )
    if batches.max_tokens is not None:
        raise InputError(
            "dp_sgd: under max_tokens the length of an example says who else takes part; give "
            "max_examples"
        )


def require_noised(algorithm: Algorithm) -> None:
    """InputError where the rule is no longer one whose steps have the noise."""
    noise, examples = algorithm.rule.examples, algorithm.examples
    if noise is None or examples is None or noise.multiplier != examples.multiplier:
        raise InputError(
            f"{algorithm.name}: its rule was replaced by one without the noise of dp_sgd; change "
            "the rule first, and put dp_sgd around it"
        )
    refuse_batches(algorithm.name, algorithm.rule.batches)


def begun(done: Finished, size: int) -> Tensor:
    """How many passes over their examples clients have begun, int64 [K]."""
    per_epoch = ((done.examples + size - 1) // size).clamp(min=1)
    return (done.steps + per_epoch - 1) // per_epoch


def unseen(done: Finished) -> Finished:
    """What messages of a client may depend on: all but its losses and what these count."""
    return replace(done, loss=torch.zeros_like(done.loss), weight=done.seen.double())


def require_unseen(algorithm: Algorithm, w: Tensor, layout: Layout, clients: int) -> None:
    """InputError unless two clients that differ in their losses alone send the same."""
    server, rule = algorithm.init(w, layout), algorithm.rule
    one, number = torch.ones(1, dtype=torch.int64, device=w.device), torch.ones_like
    rows = {n: w.new_zeros(1, *shape) for n, shape in algorithm.table(layout).items()}
    done = Finished(
        Round(0, 0, layout, clients),
        (w + torch.linspace(-0.1, 0.1, len(w)).to(w))[None],
        [w.new_zeros(1, layout.trainable) for _ in range(rule.optimizer.states)],
        w.new_zeros(1, layout.trainable) if rule.bias else None,
        0 * one,
        0 * one,
        one,
        number(one, dtype=torch.float64),
        number(one, dtype=torch.float64),
        one,
        rows,
        steps=one,
        lr=0.1,
    )
    with torch.no_grad():
        first, second = (
            algorithm.upload(server, some)
            for some in (done, replace(done, loss=3 * done.loss, weight=5 * done.weight))
        )
    if not all(torch.equal(a, b) for a, b in zip(sent(first), sent(second), strict=True)):
        raise InputError(
            f"{algorithm.name}: what its clients send depends on their losses, or on how much "
            "their examples count in these, which no noise is added to; give weights such as "
            "by_examples, or a weighting such as update_rms"
        )


def sent(upload: Upload) -> list[Tensor]:
    """All that leaves a client, and what it keeps."""
    some = [upload.update, upload.weight, *upload.table.values(), *upload.extra.values()]
    return some if upload.log_weight is None else [*some, upload.log_weight]
