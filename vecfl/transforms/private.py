"""Central differential privacy of clients: what each sends is clipped, and the sum is noised.

McMahan et al., ICLR 2018, arXiv:1710.06963: the sum of clipped messages, with noise in proportion
to the clipping norm, over a denominator that no client changes. The protected unit is a client.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from vecfl.aggregate import Aggregate
from vecfl.algorithms.base import Algorithm, Finished, Metrics, Round, Server, Upload
from vecfl.errors import InputError, at_least_zero, inside, positive
from vecfl.privacy.events import Accountant, Mechanism, Population, Privacy
from vecfl.random import Kind, laplace, normal, stream
from vecfl.transforms.base import Limit, Transform, chain
from vecfl_kernels import add_noise_

COUNT = 1  # step of the stream of a count's noise; that of the sum is step 0


def private(
    algorithm: Algorithm,
    clip: Transform,
    *,
    noise_multiplier: float,
    cohort: float,
    delta: float,
    accountant: Accountant | None = None,
    stands_for: Population | None = None,
) -> Algorithm:
    """`algorithm` under central differential privacy of its clients.

    clip              the last thing that happens to a message: `clip_by_norm`, `clip_by_layer` or
                      `adaptive_clip` (Gaussian noise), `clip_by_l1` (Laplace noise)
    noise_multiplier  standard deviation of the noise on the sum over the clipping norm; with
                      `clip_by_l1` its scale. 0: clipping alone, and epsilon is inf
    cohort            how many clients take part in a round, in the mean: the denominator
    delta             at which epsilon is told
    accountant        "pld" or "rdp" (`vecfl.privacy.epsilon`)
    stands_for        the noise and the accounting of a larger population, on this one

    The message of a client is multiplied by a_k / max_weight, its weight over the largest that the
    algorithm declares, then clipped; the server gets (sum + noise) / cohort for the mean, in every
    round, one without a usable client too. The noise is drawn from seed and round alone. What
    clients count besides (`Upload.extra`) is replaced by `cohort` where it is the number of
    clients, and refused where the server reads anything else.

    Raises InputError for an algorithm without a largest weight, with delays or with an aggregator,
    and for a transform that does not bound messages.
    """
    if not isinstance(clip, Transform) or (limit := clip.limit) is None:
        raise InputError(
            f"private: {getattr(clip, 'name', repr(clip))} does not bound what clients send; give "
            "a clip, such as clip_by_norm(0.5)"
        )
    at_least_zero("private(noise_multiplier)", noise_multiplier)
    inside("private(delta)", delta)
    positive("private(cohort)", cohort)
    refuse(algorithm)
    check(accountant, stands_for)
    promise = Privacy(mechanism_of(limit), noise_multiplier, cohort, delta, accountant, stands_for)
    # Behind a codec a clip is a factor that travels with the code.
    inner = replace(counting_all(algorithm), coded=False)
    made = chain(inner, noised(clip, limit, promise, algorithm))
    facts = {**made.facts, "private": str(promise)}
    made = replace(made, max_weight=None, coded=algorithm.coded, facts=facts)
    return made.promises(promise)


def check(accountant: object, stands_for: object) -> None:
    """InputError for what nobody can account."""
    if accountant not in (None, "pld", "rdp"):
        raise InputError(f"private(accountant={accountant!r}): choose pld or rdp")
    if not isinstance(stands_for, Population | None):
        right = "vecfl.privacy.Population(clients, cohort)"
        raise InputError(f"private(stands_for={stands_for!r}): expected {right}")


def mechanism_of(limit: Limit) -> Mechanism:
    """The noise that goes with a bound of the L2 norm, or of the L1 norm."""
    return "gaussian" if limit.order == 2 else "laplace"


def refuse(algorithm: Algorithm) -> None:
    """InputError for an algorithm whose clients' influence has no bound."""
    name = algorithm.name
    if algorithm.privacy is not None:
        raise InputError(f"{name}: is private already")
    if algorithm.delay is not None:
        raise InputError(f"{name}: messages that arrive late would be released in another round")
    if algorithm.aggregator is not None:
        raise InputError(f"{name}: the noise is for a sum; nobody bounds what an aggregator makes")
    if algorithm.max_weight is None:
        raise InputError(
            f"{name}: a client's weight has no bound; give weights=uniform_weights or capped(n), "
            "or declare max_weight"
        )


def noised(clip: Transform, limit: Limit, promise: Privacy, algorithm: Algorithm) -> Transform:
    """Weights, clip and noise as one transform."""
    most, shares = algorithm.max_weight or 1.0, promise.smaller
    sum_multiplier = multiplier_of_sum(promise.multiplier, limit.count_noise)

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        amount = upload.weight
        if upload.log_weight is not None:
            amount = amount * upload.log_weight.exp()
        rows, share = upload.update, amount / most
        if not (rows.is_cpu and bool((share == 1).all())):  # asking a GPU would wait for it
            rows = rows * share.to(rows.dtype)[:, None]
        sent = replace(upload, update=rows, weight=(amount > 0).double(), log_weight=None)
        return clip.client(own, done, sent)

    def scale(own: Server) -> float:
        return sum_multiplier * limit.norm(own) * shares

    def server(own: Server, sums: Aggregate, round: Round) -> tuple[Aggregate, Server]:
        total = sums.total.clone()
        add_(total, scale(own), promise.mechanism, round)
        weight = torch.full_like(sums.weight, promise.cohort)
        if limit.adapt is not None:
            where = stream(Kind.NOISE, round=round.number, step=COUNT)
            noise = float(normal(round.seed, where, 1)) * limit.count_noise * shares
            share = (float(sums.extra.get("below", 0.0)) + noise) / promise.cohort + 0.5
            own = limit.adapt(own, share)
        return replace(sums, total=total, weight=weight), own

    def metrics(own: Server, sums: Aggregate, round: Round) -> Metrics:
        std = scale(own) * (1 if promise.mechanism == "gaussian" else math.sqrt(2))
        expected = std * math.sqrt(len(sums.total))
        told = {
            "privacy/clipping_norm": limit.norm(own),
            "privacy/noise_std": std / promise.cohort,
            "privacy/signal_to_noise": float(sums.total.norm()) / expected
            if expected
            else math.inf,
        }
        if promise.stands_for is not None:
            told["privacy/stands_for_clients"] = promise.stands_for.clients
        return {**clip.metrics(own, sums, round), **told}

    name = f"private {clip.name}"
    return replace(clip, name=name, client=client, server=server, metrics=metrics, bound=None)


def multiplier_of_sum(multiplier: float, count_noise: float) -> float:
    """The noise of the sum where a count, of sensitivity 1/2, spends its share of the budget.

    Andrew et al., NeurIPS 2021, arXiv:1905.03871, theorem 1: z_delta = (z^-2 - (2 s)^-2)^-1/2.
    """
    if not count_noise or not multiplier:
        return multiplier
    left = multiplier**-2 - (2 * count_noise) ** -2
    if left <= 0:
        raise InputError(
            f"adaptive_clip(count_noise={count_noise}): the count alone spends all of noise "
            f"multiplier {multiplier}; give it more than half of that"
        )
    return float(left**-0.5)


def add_(total: Tensor, scale: float, mechanism: Mechanism, round: Round) -> None:
    """total += noise, the same for any number of ranks."""
    at = stream(Kind.NOISE, round=round.number)
    if mechanism == "gaussian":
        first, second, third = at.tolist()
        add_noise_(total, scale, round.seed, (first, second, third))
    else:
        total += scale * laplace(round.seed, at, len(total)).to(total.device)


def counting_all(algorithm: Algorithm) -> Algorithm:
    """`algorithm` whose server takes the weight for the number of clients, and no other sum."""

    def server(state: Server, sums: Aggregate, round: Round) -> Server:
        public = {"clients": sums.weight}
        try:
            return algorithm.server(state, replace(sums, extra=public), round)
        except KeyError as error:
            raise InputError(
                f"{algorithm.name}: its server reads {error}, a sum over clients that no noise is "
                "added to; private are algorithms whose server needs the messages alone"
            ) from error

    return replace(algorithm, server=server)
