"""Schedules of a learning rate: functions from the round (from 0) to a factor.

For clients, `lr=scaled(0.1, cosine(100))`; for a server, `scheduled(server_adam(), cosine(100))`;
for the steps of a client in a round, `within_round(sgd(), by_step(cosine(100)))`. Each has its call
as its name, which is how runs tell them apart.
"""

import math
from collections.abc import Callable

from vecfl.errors import InputError, at_least_zero, is_integer

Schedule = Callable[[int], float]


def scaled(lr: float, *schedules: Schedule) -> Schedule:
    """lr times the factors of all schedules: a learning rate by round, for clients."""
    names = (getattr(schedule, "__qualname__", type(schedule).__name__) for schedule in schedules)

    def at(round: int) -> float:
        return lr * math.prod(schedule(round) for schedule in schedules)

    return _named(at, "scaled", lr, *names)


def step_decay(every: int, factor: float) -> Schedule:
    """factor^k after k times `every` rounds."""
    _rounds("step_decay", 1, every=every)
    at_least_zero("step_decay(factor)", factor)
    return _named(lambda round: factor ** (round // every), "step_decay", every, factor)


def multi_step(milestones: list[int], factor: float) -> Schedule:
    """factor^k from the k-th milestone on, rounds in rising order."""
    milestones = list(milestones)
    _rounds("multi_step", 0, **{f"milestones[{i}]": at for i, at in enumerate(milestones)})
    if milestones != sorted(set(milestones)):
        raise InputError(f"multi_step(milestones={milestones}): must rise")
    at_least_zero("multi_step(factor)", factor)

    def decay(round: int) -> float:
        return factor ** sum(at <= round for at in milestones)

    return _named(decay, "multi_step", milestones, factor)


def linear_warmup(rounds: int) -> Schedule:
    """1 / rounds in the first round, then linearly up to 1 in round number `rounds`.

    Goyal et al., arXiv:1706.02677, section 2.2 ("gradual warmup").
    """
    _rounds("linear_warmup", 1, rounds=rounds)
    return _named(lambda round: min(1.0, (round + 1) / rounds), "linear_warmup", rounds)


def cosine(rounds: int, floor: float = 0.0) -> Schedule:
    """Half a cosine from 1 in the first round down to `floor`, after `rounds` rounds.

    Loshchilov and Hutter, ICLR 2017, arXiv:1608.03983, equation 5, without restarts.
    """
    _rounds("cosine", 1, rounds=rounds)
    _share("cosine(floor)", floor)

    def at(round: int) -> float:
        return floor + (1 - floor) / 2 * (1 + math.cos(math.pi * min(round, rounds) / rounds))

    return _named(at, "cosine", rounds, floor)


def ramp_hold_decay(ramp: int, hold: int, end: int, floor: float = 0.01) -> Schedule:
    """Linearly up to 1 in round number `ramp`, 1 until `hold` rounds are done, then exponentially
    down to `floor` after `end` rounds, where it stays.

    Park et al., Interspeech 2019, arXiv:1904.08779, section 4.2: s_r, s_i, s_f; without its noise.
    """
    _rounds("ramp_hold_decay", 0, ramp=ramp, hold=hold, end=end)
    if not ramp <= hold < end:
        raise InputError(f"ramp_hold_decay({ramp}, {hold}, {end}): needs ramp <= hold < end")
    if not 0 < floor <= 1:
        raise InputError(f"ramp_hold_decay(floor) must be in (0, 1], not {floor}")

    def at(round: int) -> float:
        if round < ramp:
            return (round + 1) / ramp
        return float(floor ** (min(max(round - hold, 0), end - hold) / (end - hold)))

    return _named(at, "ramp_hold_decay", ramp, hold, end, floor)


def _named(at: Schedule, name: str, *values: object) -> Schedule:
    """`at`, whose name is the call that made it."""
    at.__qualname__ = f"{name}({', '.join(map(str, values))})"
    return at


def _rounds(what: str, least: int, **rounds: int) -> None:
    for name, value in rounds.items():
        if not (is_integer(value) and value >= least):
            raise InputError(f"{what}({name}={value!r}): must be an integer of at least {least}")


def _share(what: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{what} must be in [0, 1], not {value}")
