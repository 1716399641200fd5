"""Targets and patience: when a run is over, and what is refused."""

import math
from typing import Any

import pytest
import torch

from vecfl.errors import InputError
from vecfl.state import State
from vecfl.stop import Stop
from vecfl.watch import Watch

NAN = math.nan


@pytest.mark.parametrize(
    ("rule", "values", "ends"),
    [
        ("eval/accuracy>=0.9", [0.8, NAN, 0.9, 0.7], 3),  # reached as soon as it is equal
        ("eval/accuracy >= 0.9", [0.8, 0.91], 2),
        ("eval/accuracy<=-1e-3", [0.0, -0.0005, -0.001], 3),
        ("eval/accuracy>=inf", [0.8, 1e300], None),
    ],
)
def test_a_target_ends_the_run(rule: str, values: list[float], ends: int | None) -> None:
    stop = Stop(rule, None, None)
    whys = [stop.why(t, {"eval/accuracy": v}, True, None) for t, v in enumerate(values, start=1)]
    found = [t for t, why in enumerate(whys, start=1) if why is not None]
    assert found == ([] if ends is None else [ends])


def test_it_says_which_value_was_enough() -> None:
    found = Stop("eval/loss<=0.25", None, None).why(4, {"eval/loss": 0.125}, True, None)
    assert found == "after round 4: eval/loss 0.125 <= 0.25"


def patient(patience: int, values: list[float | None], fall_back: bool = False) -> str | None:
    """Why the run ends by these values of its rounds, None for one that is not evaluated."""
    watch, stop = Watch("eval/loss:min", fall_back), Stop(None, patience, "eval/loss:min")
    for round, value in enumerate(values, start=1):
        metrics: dict[str, Any] = {} if value is None else {"eval/loss": value}
        watch.look(State(round, {"w": torch.zeros(1)}), metrics, value is not None)
        if value is not None and (why := stop.why(round, metrics, True, watch)) is not None:
            return why
    return None


@pytest.mark.parametrize("fall_back", [False, True])
def test_patience_counts_evaluations_without_a_better_value(fall_back: bool) -> None:
    # 3 is best until round 5; equal (round 3), worse and NaN count, a round without does not.
    values = [4.0, 3.0, 3.0, None, 2.0, 5.0, NAN, None, 2.5, 1.0]
    assert patient(3, values, fall_back) == (
        "after round 9: 3 evaluations without a better eval/loss, the best is 2 of round 5"
    )
    assert patient(1, values, fall_back) == (
        "after round 3: 1 evaluation without a better eval/loss, the best is 3 of round 2"
    )
    assert patient(4, values, fall_back) is None
    assert patient(2, [NAN, NAN]) == (
        "after round 2: 2 evaluations without a better eval/loss, none that is a number"
    )


def test_patience_goes_on_where_it_was_saved() -> None:
    first, second = Watch("eval/loss:min"), Watch("eval/loss:min")
    for round, value in enumerate([1.0, 2.0, 2.0], start=1):
        first.look(State(round, {}), {"eval/loss": value}, True)
    second.load(first.save(), {})
    assert (first.waited, second.waited) == (2, 2)
    second.look(State(4, {}), {"train/loss": 3.0}, False)  # a round without its evaluation
    assert second.waited == 2
    second.look(State(5, {}), {"eval/loss": 0.5}, True)
    assert second.waited == 0


def test_what_was_learned_from_metrics_does_not_fall_back() -> None:
    watch, found = Watch("eval/loss:min", fall_back=True), []
    for round, value in enumerate([1.0, 2.0], start=1):
        server = {"w": torch.tensor(round), "observed/server/factor": torch.tensor(0.5**round)}
        state, _ = watch.look(State(round, server), {"eval/loss": value}, True)
        found.append({name: t.item() for name, t in state.server.items()})
    assert found[1] == {"w": 1, "observed/server/factor": 0.25}
    assert watch.back_at(state) == 1


def test_other_rules_do_not_know_of_the_stop() -> None:
    kept = Stop("a>=1", 3, "b:min").save("after round 2: because")
    assert Stop("a>=1", 3, "b:min").before(kept) == "after round 2: because"
    for other in (Stop("a>=2", 3, "b:min"), Stop("a>=1", 4, "b:min"), Stop("a>=1", 3, "c:min")):
        assert other.before(kept) is None
    assert Stop("a>=1", None, "x:min").before(Stop("a>=1", None, None).save("y")) == "y"
    assert Stop("a>=1", 3, "b:min").before(None) is None
    assert Stop("a>=1", 3, "b:min").save(None) is None


@pytest.mark.parametrize("rule", ["eval/loss", "eval/loss=1", "a>1", "a>=b", "a>=nan", ">=1", ""])
def test_a_rule_needs_a_metric_a_direction_and_a_value(rule: str) -> None:
    with pytest.raises(InputError) as error:
        Stop(rule, None, None)
    assert str(error.value) == f"--stop-at: expected METRIC>=VALUE or METRIC<=VALUE, got {rule}"


def test_a_target_that_no_evaluation_has() -> None:
    stop = Stop("eval/acuracy>=0.5", None, None)
    with pytest.raises(InputError, match="^--stop-at: no metric eval/acuracy .* is it eval/accura"):
        stop.why(1, {"eval/loss": 1.0, "eval/accuracy": 0.5}, True, None)
    with pytest.raises(InputError, match="^--stop-at: a is text, 'x'; expected a number$"):
        Stop("a>=1", None, None).why(1, {"a": "x"}, True, None)
