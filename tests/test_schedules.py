"""Schedules: their first values by hand, and clients that train by them."""

from collections.abc import Callable

import pytest
import torch

import vecfl
from vecfl.errors import InputError
from vecfl.schedules import Schedule

from .oracles.bridge import dataset
from .oracles.tiny import PLAIN, Line, client, squared

# Cosine over 6 rounds: cos of 0, 30, ... 180 degrees, 1/2 (1 + it).
# Ramp over 2 rounds, hold until 3 are done, then to 1/16 after 7: 16^(-k/4) = 2^-k.
ROOT = 3**0.5 / 4
BY_HAND = {
    "step": (vecfl.step_decay(2, 0.5), [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]),
    "multi-step": (vecfl.multi_step([1, 2, 5], 0.5), [1, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125]),
    "from the first": (vecfl.multi_step([0], 3.0), [3, 3]),
    "warm-up": (vecfl.linear_warmup(4), [0.25, 0.5, 0.75, 1, 1, 1]),
    "no warm-up": (vecfl.linear_warmup(1), [1, 1]),
    "cosine": (
        vecfl.cosine(6),
        [1, 0.5 + ROOT, 0.75, 0.5, 0.25, 0.5 - ROOT, 0, 0, 0],
    ),
    "cosine, floor": (vecfl.cosine(2, 0.2), [1, 0.6, 0.2, 0.2]),
    "ramp, hold, decay": (
        vecfl.ramp_hold_decay(2, 3, 7, 1 / 16),
        [0.5, 1, 1, 1, 0.5, 0.25, 0.125, 0.0625, 0.0625],
    ),
    "no ramp, no hold": (vecfl.ramp_hold_decay(0, 0, 2, 0.25), [1, 0.5, 0.25, 0.25]),
    "scaled": (vecfl.scaled(0.5), [0.5, 0.5]),
    "product": (
        vecfl.scaled(8.0, vecfl.linear_warmup(2), vecfl.step_decay(2, 0.5)),
        [4, 8, 4, 4, 2],
    ),
}


@pytest.mark.parametrize(("schedule", "values"), BY_HAND.values(), ids=BY_HAND)
def test_first_values_by_hand(schedule: Schedule, values: list[float]) -> None:
    found = [schedule(t) for t in range(len(values))]
    assert found == pytest.approx(values, rel=1e-14, abs=1e-15)
    assert all(type(value) is float for value in found)


def test_clients_train_by_a_schedule() -> None:
    # g = w: a step of 1/2 halves w, the next of 1/4 leaves 3/4 of that, then 3/4 again, then 7/8.
    data = dataset([client(PLAIN)])
    task = vecfl.Task(Line(), squared, example=data.examples(2))
    lr = vecfl.scaled(0.5, vecfl.multi_step([1, 3], 0.5))
    algorithm = vecfl.fedavg(lr=lr, batches=vecfl.Batches(1))
    sim = vecfl.Simulation(task, data, algorithm, vecfl.everyone(), dtype=torch.float64)
    state, found = sim.start(), []
    for _ in range(4):
        state, _ = sim.round(state)
        found.append(state.server["w"].item())
    assert found == [1 / 2, 3 / 8, 9 / 32, 63 / 256]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vecfl.step_decay(0, 0.5), "step_decay(every=0): must be an integer of at least 1"),
        (lambda: vecfl.step_decay(2, -1), "step_decay(factor) must be at least 0 and finite, no"),
        (lambda: vecfl.multi_step([3, 3], 0.5), "multi_step(milestones=[3, 3]): must rise"),
        (lambda: vecfl.multi_step([1.5], 0.5), "multi_step(milestones[0]=1.5): must be an integer"),
        (lambda: vecfl.linear_warmup(0), "linear_warmup(rounds=0): must be an integer of at leas"),
        (lambda: vecfl.cosine(2, 1.5), "cosine(floor) must be in [0, 1], not 1.5"),
        (lambda: vecfl.ramp_hold_decay(3, 2, 9), "ramp_hold_decay(3, 2, 9): needs ramp <= hold <"),
        (lambda: vecfl.ramp_hold_decay(1, 2, 2), "ramp_hold_decay(1, 2, 2): needs ramp <= hold <"),
        (lambda: vecfl.ramp_hold_decay(1, 2, 3, 0), "ramp_hold_decay(floor) must be in (0, 1], n"),
    ],
)
def test_bad_arguments(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value).startswith(message)
