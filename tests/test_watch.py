"""The best round by a metric, and what the next one starts from after a worse one."""

import math
from typing import Any

import pytest
import torch

from vecfl.errors import InputError
from vecfl.state import State
from vecfl.watch import Watch

NAN = math.nan


def play(watch: Watch, values: list[float | None], first: int = 1) -> list[tuple[int, bool]]:
    """Rounds with these values, None for one without: from whose tensors the next starts, and
    whether it is the best so far. Tensors of a round, of model and optimizer, are its number."""
    found = []
    for round, value in enumerate(values, start=first):
        metrics: dict[str, Any] = {"round": round} | ({} if value is None else {"eval/loss": value})
        state = State(round, {"w": torch.tensor([float(round)]), "mean": torch.tensor(round)})
        after, best = watch.look(state, metrics, value is not None)
        assert (after.round, after.server["mean"]) == (round, after.server["w"])
        found.append((int(after.server["w"]), best))
    return found


VALUES = [3.0, 2.0, None, 2.0, 4.0, NAN, 1.0, 1.5]


def test_without_falling_back_the_best_is_known_alone() -> None:
    watch = Watch("eval/loss:min")
    assert [start for start, _ in play(watch, VALUES)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (watch.round, watch.value, watch.server) == (7, 1.0, None)


@pytest.mark.parametrize(("rule", "sign"), [("eval/loss:min", 1), ("eval/loss:max", -1)])
def test_a_worse_value_falls_back_to_the_best(rule: str, sign: int) -> None:
    values = [None if v is None else sign * v for v in VALUES]
    # 4 equals the best and goes on; 5, 6 (NaN) and 8 are worse than the best before them.
    starts = [1, 2, 3, 4, 2, 2, 7, 7]
    bests = [True, True, False, False, False, False, True, False]
    assert play(Watch(rule, fall_back=True), values) == list(zip(starts, bests, strict=True))


def test_nan_is_never_best() -> None:
    assert play(Watch("eval/loss:min", True), [NAN, NAN, 5.0, NAN]) == [
        *((1, False), (2, False), (3, True), (3, False)),
    ]


@pytest.mark.parametrize("cut", range(9))
def test_it_goes_on_where_it_was_saved(cut: int) -> None:
    whole = play(Watch("eval/loss:min", True), VALUES)
    before, after = (Watch("eval/loss:min", True) for _ in range(2))
    first = play(before, VALUES[:cut])
    after.load(before.save(), {"w": torch.zeros(1), "mean": torch.tensor(0)})
    assert first + play(after, VALUES[cut:], first=cut + 1) == whole


def test_another_rule_begins_anew() -> None:
    before = Watch("eval/loss:min", True)
    play(before, VALUES)
    for rule, kept in (("eval/loss:max", before.save()), ("eval/loss:min", None)):
        other = Watch(rule, True)
        other.load(kept, {"w": torch.zeros(1)})
        assert other.round is None
    plain = Watch("eval/loss:min")
    plain.load(before.save(), {"w": torch.zeros(1)})
    assert (plain.round, plain.server) == (7, None)


@pytest.mark.parametrize("rule", ["eval/loss", "eval/loss:low", ":min", ""])
def test_a_rule_needs_a_metric_and_a_direction(rule: str) -> None:
    with pytest.raises(InputError, match=f"^--watch: expected METRIC:min or .*, got {rule}$"):
        Watch(rule)


def test_a_metric_that_no_evaluation_has() -> None:
    state = State(1, {"w": torch.zeros(1)})
    watch = Watch("eval/acuracy:max")
    assert watch.look(state, {"round": 1}, evaluated=False) == (state, False)
    with pytest.raises(InputError, match="--watch: no metric eval/acuracy in .* eval/accuracy?"):
        watch.look(state, {"round": 1, "eval/loss": 1.0, "eval/accuracy": 0.5}, evaluated=True)


def test_text_has_no_best() -> None:
    state = State(1, {"w": torch.zeros(1)})
    with pytest.raises(InputError, match="--watch: system/backend is text, 'loop'; expected a num"):
        Watch("system/backend:max").look(state, {"system/backend": "loop"}, True)
