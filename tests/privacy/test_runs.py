"""Private runs of recipes: what they tell, when they end, how they go on, and what they refuse."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import vecfl
import vecfl.finish
import vecfl.record
import vecfl.releases
import vecfl.report
from tests.persist.tiny import TinyArgs, arguments, run
from tests.privacy.worlds import ALGORITHMS, population, simulation
from tests.times import without_times
from vecfl.algorithm_flags import AlgorithmArgs, make_algorithm, settle
from vecfl.budget import draw_epsilon
from vecfl.cli import main
from vecfl.errors import InputError
from vecfl.flags import check_run
from vecfl.named import named_transform
from vecfl.privacy import Event, Privacy, Sampling, epsilon
from vecfl.privacy.accountant import COARSE
from vecfl.privacy_flags import PrivacyArgs, privately
from vecfl.releases import Releases
from vecfl.report import draw_curves
from vecfl.signals import Stopped
from vecfl.simulation import Simulation
from vecfl.state import State
from vecfl.track import Wandb

Tiny = Callable[..., Path]
Rows = list[dict[str, Any]]
CLIP = "clip_by_norm(0.5)"
Z, DELTA = 8.0, 1e-4
PRIVATE = {"private_clip": CLIP, "noise_multiplier": Z, "delta": DELTA}
RATE = math.floor(4 / 7 * 2**32) / 2**32  # of four of seven clients: down to a multiple of 2^-32
NAMES = ("privacy/epsilon", "privacy/delta", "privacy/noise_multiplier")


@cache
def spent(rounds: int, z: float = Z, delta: float = DELTA, **how: Any) -> float:
    return epsilon((Event("gaussian", z, Sampling("poisson", RATE), 7, rounds),), delta, **how)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Runs `tiny` with these flags in a directory of this name, and gives the directory."""
    monkeypatch.setattr(vecfl.finish, "draw_curves", lambda folder: (folder / "curves.png").touch())
    monkeypatch.chdir(tmp_path)

    def tiny(out: str | None = "run", **flags: Any) -> Path:
        run(arguments(out, **{"eval_every": 8} | flags))  # type: ignore[arg-type]
        return Path(out or "runs")

    return tiny


def rows(run_dir: Path) -> Rows:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [without_times(json.loads(line)) for line in lines]


def test_epsilon_stands_beside_each_evaluation_and_is_exact_at_the_end(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(tiny(eval_every=3, initial_evaluation=True, **PRIVATE))
    told = {row["round"]: [row[name] for name in NAMES] for row in found if NAMES[0] in row}
    live = {t: [spent(t, step=COARSE), DELTA, Z] for t in (3, 6)}
    assert told == {0: [0.0, DELTA, Z], **live, 8: [spent(8), DELTA, Z]}
    assert spent(6) < spent(6, step=COARSE) < 1.01 * spent(6)
    assert found[1]["privacy/noise_std"] == pytest.approx(Z * 0.5 / (7 * RATE), rel=1e-12)
    captured = capsys.readouterr()
    line = f"privacy         epsilon {spent(8):.4g} at delta {DELTA:.3g}, noise multiplier {Z:g}; "
    line += "neighbours: one client more or less\n"
    assert line in captured.out
    assert f", epsilon {spent(6, step=COARSE):.3g} (round 6), " in captured.err


def test_it_stops_before_it_would_spend_more(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit is the exact epsilon of 5 rounds: their coarse epsilon is above it."""
    limit = spent(5)
    assert limit < spent(5, step=COARSE) < spent(6)
    flags = {"stop_at_epsilon": limit, "eval_every": 4, **PRIVATE}
    found = rows(tiny(**flags))
    assert [row["round"] for row in found] == [1, 2, 3, 4, 5]
    assert found[-1]["privacy/epsilon"] == spent(5) and "eval/loss" in found[-1]
    said = f"stopped         after round 5: epsilon {spent(5):.4g} at delta {DELTA:.3g}; "
    said += f"one more round would spend more than {limit:g}\n"
    assert said in capsys.readouterr().out
    again = rows(tiny(resume="auto", **flags))
    assert again == found and said in capsys.readouterr().out
    whole = rows(tiny("whole", eval_every=4, **PRIVATE))
    onwards = rows(tiny(resume="auto", **flags | {"stop_at_epsilon": spent(7)}))
    assert len(onwards) == 7 and onwards[5:6] == whole[5:6]
    assert rows(tiny(resume="auto", **flags | {"stop_at_epsilon": None}))[7:] == whole[7:] != []


def test_noise_that_was_found_without_earlier_rounds_is_refused(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    """Four rounds at z = 8, then noise for eight at another epsilon: together they spend more."""
    tiny(rounds=4, **PRIVATE)
    how = {"rounds": 8, "resume": "auto", "resume_changed": True, "delta": DELTA}
    with pytest.raises(InputError, match="^--epsilon: with the 4 rounds that were played otherwis"):
        tiny(private_clip=CLIP, epsilon=spent(4), **how)
    caplog.set_level(logging.INFO, "vecfl")
    tiny(private_clip=CLIP, noise_multiplier=12.0, **how)
    events = [Event("gaussian", z, Sampling("poisson", RATE), 7, 4) for z in (8.0, 12.0)]
    after = epsilon(tuple(events), DELTA, step=COARSE)
    assert f"privacy: epsilon {after:.4g} after all rounds, those before included" in caplog.text


def test_a_budget_that_is_spent_already_stops_at_once(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny(rounds=4, **PRIVATE)
    found = rows(tiny(resume="auto", stop_at_epsilon=spent(2), **PRIVATE))
    assert len(found) == 4
    assert f"delta {DELTA:.3g}, more than {spent(2):g}, is spent already" in capsys.readouterr().out
    with pytest.raises(InputError, match="^--stop-at-epsilon: expected at least .*first round sp"):
        tiny("other", stop_at_epsilon=0.99 * spent(1), **PRIVATE)
    assert not Path("other").exists()


def test_a_run_that_goes_on_tells_the_same_numbers(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in round 6: round 5, which no checkpoint has, is trained and spent once more."""
    flags = {"eval_every": 2, "checkpoint_every": 4, "stop_at_epsilon": spent(7), **PRIVATE}
    whole, train = rows(tiny("whole", **flags)), Simulation.round

    def interrupted(sim: Simulation, state: Any) -> Any:
        if state.round == 5:
            raise KeyboardInterrupt
        return train(sim, state)

    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "round", interrupted)
        with pytest.raises(Stopped):
            tiny(**flags)
    assert len(rows(Path("run"))) == 5
    assert rows(tiny(resume="auto", **flags)) == whole
    assert whole[-1]["privacy/epsilon"] == spent(7) and len(whole) == 7


def test_noise_is_found_for_an_epsilon(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "vecfl"):
        found = rows(tiny(private_clip=CLIP, epsilon=0.5))[-1]
    z, delta = found["privacy/noise_multiplier"], 7**-1.1  # where none is given
    assert found["privacy/delta"] == delta
    assert found["privacy/epsilon"] == spent(8, z, delta) <= 0.5 < spent(8, 0.999 * z, delta)
    line = f"noise multiplier {z:.4g}, epsilon 0.5 at delta {delta:.3g} after 8 rounds"
    assert line in caplog.text
    line = "^--resume: run was begun with other settings: rounds 8 there, 9 here"
    with pytest.raises(InputError, match=line):
        tiny(resume="auto", private_clip=CLIP, epsilon=0.5, rounds=9)
    given = rows(tiny("given", private_clip=CLIP, noise_multiplier=z))
    assert given == rows(Path("run"))


ALL, LEFT = Sampling("everyone"), Sampling("poisson", 0.5 * 0.75)


@pytest.mark.parametrize(
    ("flags", "sampler", "lost", "right"),
    [
        ({"private_clip": "clip_by_l1(0.5)"}, vecfl.everyone(), 0.0, Event("laplace", 1, ALL, 8)),
        ({"accountant": "rdp"}, vecfl.poisson(0.5), 0.25, Event("gaussian", 1, LEFT, 8)),
    ],
    ids=["laplace", "rdp of those left"],
)
def test_noise_is_found_for_what_is_released_and_accounted(
    flags: dict[str, Any],
    sampler: vecfl.sampling.Sampler,
    lost: float,
    right: Event,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Epsilon 2 of 3 rounds at 0.1 is that of the mechanism, the accountant and the clients that
    are left, neither more nor less by a thousandth; so is what is told of a given noise."""
    by, delta = flags.get("accountant"), 0.1
    args = PrivacyArgs(**{"private_clip": CLIP, "delta": delta} | flags)

    def multiplier(**how: Any) -> float:
        caplog.clear()
        with caplog.at_level("INFO", "vecfl"):
            algorithm = ALGORITHMS["fedavg"]()
            made = privately(replace(args, **how), algorithm, sampler, 8, 3, lost)
        assert made.privacy is not None
        return made.privacy.multiplier

    z = multiplier(epsilon=2.0)
    event = replace(right, multiplier=z, times=3)
    assert 1.998 < epsilon((event,), delta, accountant=by) <= 2.0
    assert f"noise multiplier {z:.4g}, epsilon 2 at delta 0.1 after 3 rounds" in caplog.text
    assert multiplier(noise_multiplier=1.5) == 1.5
    spent = epsilon((replace(event, multiplier=1.5),), delta, accountant=by, step=COARSE)
    assert f"noise multiplier 1.5, epsilon {spent:.4g} at delta 0.1 after 3" in caplog.text


@pytest.mark.parametrize("coarse", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("most", [4, 6, 30])
def test_rounds_that_are_affordable_go_by_the_last_figure(
    coarse: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A made-up epsilon of 1 a round, a coarse one of 0.8 or 1.3: of 2 rounds and 5 more, 7."""

    def made_up(ledger: Any, delta: float, *, accountant: Any, step: float) -> float:
        return sum(event.times for event in ledger) * (coarse if step == COARSE else 1.0)

    monkeypatch.setattr(vecfl.releases, "epsilon", made_up)
    event = Event("gaussian", Z, Sampling("poisson", RATE), 7)
    releases = Releases(Privacy("gaussian", Z, 7 * RATE, DELTA), event)
    state = State(2, {}, ledger=(replace(event, times=2),))
    assert releases.affordable(state, 7.0, most) == min(5, most)
    assert releases.affordable(state, 1.5, most) == 0


def test_other_promises_are_other_runs(tiny: Tiny) -> None:
    tiny(rounds=2, **PRIVATE)
    for name, value in (("noise_multiplier", 2.0), ("delta", 0.1), ("private_clip", None)):
        with pytest.raises(InputError, match=f"--resume: run was begun with other .*{name}"):
            flags = PRIVATE | {"rounds": 2, name: value}
            flags = {} if value is None else flags
            tiny(resume="auto", **flags)


def test_a_simulation_of_a_larger_population_says_so(
    tiny: Tiny,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configs: list[Any] = []

    class Board(Wandb):
        def __init__(self, run_dir: Path, config: Any, **how: Any) -> None:
            configs.append(config)
            super().__init__(run_dir, config, **how)

    monkeypatch.setattr(vecfl.record, "Wandb", Board)
    (run_dir,) = tiny(None, stands_for=(10_000, 100), **PRIVATE | {"delta": None}).iterdir()
    assert run_dir.name.startswith("tiny-as-of-10000-")
    (last,), delta = rows(run_dir)[-1:], 10_000**-1.1
    event = Event("gaussian", Z, Sampling("poisson", 0.01), 10_000, 8)
    assert last["privacy/epsilon"] == epsilon((event,), delta)
    assert last["privacy/noise_std"] == pytest.approx(Z * 0.5 / 100, rel=1e-12)
    captured = capsys.readouterr()
    assert ", as of 10,000 clients (simulated); " in captured.out
    assert ", as of 10,000 clients, " in captured.err
    (config,) = configs
    told = [config[name] for name in ("stands_for", "noise_multiplier", "delta")]
    assert told == [(10_000, 100), Z, delta]
    axes = panel(run_dir, monkeypatch)
    assert axes.get_ylabel() == "epsilon at evaluations, as of 10,000 clients (simulated)"
    title = f"Privacy of clients (epsilon {last['privacy/epsilon']:.3g} at delta {delta:.2g})"
    assert axes.get_title() == title
    (line,) = axes.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([8], [last["privacy/epsilon"]])


def panel(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Axes:
    """The one of `curves.png` that epsilon is drawn in, beside accuracy and loss."""
    panels = list[Axes]()

    def draw(axes: Axes, rows: Rows) -> None:
        panels.append(axes)
        draw_epsilon(axes, rows)

    monkeypatch.setattr(vecfl.report, "draw_epsilon", draw)
    assert draw_curves(run_dir).read_bytes().startswith(b"\x89PNG")
    (axes,) = panels
    assert axes.figure is not None and axes.figure.axes[2:] == [axes]
    return axes


def test_a_small_epsilon_is_told_exactly(tiny: Tiny) -> None:
    found = rows(tiny(rounds=3, eval_every=2, **PRIVATE | {"noise_multiplier": 30.0}))
    told = [row["privacy/epsilon"] for row in found if "privacy/epsilon" in row]
    assert told == [spent(2, 30.0), spent(3, 30.0)] and 0 < told[0] < 0.1
    assert spent(2, 30.0) < spent(2, 30.0, step=COARSE)


def test_the_law_is_that_of_the_sampler(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    """A fixed number of clients is accounted by Renyi DP; lost ones thin a Poisson cohort."""
    at = epsilon((Event("gaussian", Z, Sampling("fixed", size=2), 7, 2),), DELTA)
    flags = {"rounds": 2, "sampler": "uniform(2)", **PRIVATE}
    assert rows(tiny("fixed", **flags))[-1]["privacy/epsilon"] == at
    with caplog.at_level("INFO", "vecfl"):
        found = rows(tiny("lost", rounds=2, client_dropout=0.5, **PRIVATE))
    thin = Event("gaussian", Z, Sampling("poisson", RATE / 2), 7, 2)
    assert found[-1]["privacy/epsilon"] == epsilon((thin,), DELTA)
    assert "each of 7 clients takes part with probability 0.5714, 4 in the mean" in caplog.text
    rdp = rows(tiny("rdp", rounds=2, accountant="rdp", **PRIVATE))[-1]
    event = Event("gaussian", Z, Sampling("poisson", RATE), 7, 2)
    assert rdp["privacy/epsilon"] == epsilon((event,), DELTA, accountant="rdp")


def test_weights_under_privacy() -> None:
    def made(**options: Any) -> vecfl.algorithms.Algorithm:
        return make_algorithm(settle(AlgorithmArgs(**options)))

    assert made().max_weight is None
    assert settle(AlgorithmArgs(**PRIVATE)).weights == "uniform_weights"
    assert made(**PRIVATE).max_weight == 1
    assert made(weights="capped(5)", **PRIVATE).max_weight == 5
    assert made(algorithm="dga", **PRIVATE).max_weight == 1
    assert made(algorithm="dga(max_weight=3.0)", **PRIVATE).max_weight == 3
    assert made(algorithm="dga").max_weight == 100
    assert made(algorithm="scaffold", **PRIVATE).max_weight is not None


def test_rounds_in_one_call_tell_epsilon() -> None:
    made = vecfl.private(
        ALGORITHMS["fedavg"](), vecfl.clip_by_norm(0.5), noise_multiplier=4.0, cohort=4, delta=1e-3
    )
    sim = simulation(made, population(3, 4, 5, 3, 4, 5, 3, 4), vecfl.poisson(0.5))
    logged: list[Any] = []

    class Log:
        def log(self, metrics: Any) -> None:
            logged.append(metrics)

        def close(self) -> None: ...

    vecfl.run(sim, 5, trackers=[Log()], evaluate_every=2)

    def right(times: int, **how: Any) -> float:
        event = Event("gaussian", 4.0, Sampling("poisson", 0.5), 8, times)
        return epsilon((event,), 1e-3, **how)

    told = [row.get("privacy/epsilon") for row in logged]
    assert told == [None, right(2, step=COARSE), None, right(4, step=COARSE), right(5)]


def test_dp_sgd_stands_around_a_private_algorithm(tiny: Tiny) -> None:
    """Two epsilons: of clients by z = 8, of examples by one pass a round at most, of z = 3."""
    steps = "dp_sgd(clip=1.0, noise_multiplier=3.0, delta=1e-4)"
    last = rows(tiny(around=(steps,), backend="loop", processes=1, **PRIVATE))[-1]
    assert last["privacy/epsilon"] == spent(8)
    most = [
        epsilon((Event("gaussian", 3.0, Sampling("everyone"), 1, n),), 1e-4, step=COARSE)
        for n in range(1, 17)
    ]
    assert last["privacy/example_epsilon"] in most and last["privacy/example_delta"] == 1e-4


def test_local_mechanisms_are_among_the_transforms() -> None:
    texts = ("local_gaussian(1.0, 2.0, 1e-5)", "local_laplace(1.0, 2.0)", "clip_by_l1(1.0)")
    texts += ("flute_local_dp(0.5, 1.0)", "privunit2(8.0, 1.0)")
    for text in texts:
        assert named_transform(text).name.startswith(text.partition("(")[0])
    for text in ("adaptive_clip(0.1, count_noise=1.0)", "private()", "chain()"):
        with pytest.raises(InputError, match=f"^--transforms: no {text.partition('(')[0]} here"):
            named_transform(text)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"noise_multiplier": 1.0}, "--noise-multiplier: expected --private-clip beside it, as '"),
        ({"epsilon": 1.0}, "--epsilon: expected --private-clip beside it"),
        ({"delta": 0.1}, "--delta: expected --private-clip beside it"),
        ({"accountant": "rdp"}, "--accountant: expected --private-clip beside it"),
        ({"stop_at_epsilon": 1.0}, "--stop-at-epsilon: expected --private-clip beside it"),
        ({"stands_for": (9, 1)}, "--stands-for: expected --private-clip beside it"),
        ({"private_clip": CLIP}, "--private-clip: needs --noise-multiplier or --epsilon beside it"),
        (PRIVATE | {"epsilon": 1.0}, "--epsilon: expected none beside --noise-multiplier"),
        (PRIVATE | {"noise_multiplier": -1.0}, "--noise-multiplier: expected a number of at least"),
        (PRIVATE | {"noise_multiplier": math.nan}, "--noise-multiplier: expected a number of at"),
        (PRIVATE | {"stop_at_epsilon": 0.0}, "--stop-at-epsilon: expected a positive number"),
        (PRIVATE | {"delta": 1.0}, "--delta: expected a number between 0 and 1, got 1.0"),
        (PRIVATE | {"stands_for": (9, 10)}, "--stands-for: expected N clients and a cohort of 1"),
        (PRIVATE | {"private_clip": "clip(1)"}, "--private-clip: no clip here; is it"),
        (PRIVATE | {"private_clip": "clip_by_norm(0)"}, "--private-clip: clip_by_norm"),
        (PRIVATE | {"private_clip": "clip_by_norm"}, "--private-clip: clip_by_norm takes argu"),
        (PRIVATE | {"sampler": "cyclic(2)"}, "--sampler: no accountant knows how it draws"),
        (
            PRIVATE | {"sampler": "poisson(0.5, 6)", "stands_for": (99, 9)},
            "--sampler: expected poisson(rate) or uniform(size) beside --stands-for",
        ),
        (
            PRIVATE | {"aggregator": "coordinate_median()"},
            "fedadam, private clip_by_norm 0.5",
        ),
        (
            PRIVATE | {"noise_multiplier": None, "epsilon": 1e-9, "delta": 1e-15},
            "--epsilon: no noise multiplier reaches",
        ),
    ],
)
def test_what_is_wrong_is_one_line(tiny: Tiny, flags: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as error:
        tiny(**flags)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
    assert not Path("run").exists()


@pytest.mark.parametrize("weights", ["by_examples", "by_tokens"])
def test_weights_without_a_largest_are_refused(weights: str) -> None:
    line = "^--weights: expected uniform_weights, or capped.50., beside --private-clip: by_"
    with pytest.raises(InputError, match=line):
        check_run(AlgorithmArgs(weights=weights, track="none", **PRIVATE))


def test_one_line_and_exit_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--stands-for", "10", "11", "--private-clip", CLIP, "--noise-multiplier", "1"]
    monkeypatch.setattr("sys.argv", ["tiny", *flags])
    with pytest.raises(SystemExit) as caught:
        main(run, TinyArgs)
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
    right = "N clients and a cohort of 1 to N of them"
    assert captured.err == f"error: --stands-for: expected {right}, got (10, 11)\n"
    logging.getLogger("vecfl").setLevel(logging.NOTSET)


def test_no_bound_is_told_as_such(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(tiny(rounds=2, **PRIVATE | {"noise_multiplier": 0.0}))
    assert found[-1]["privacy/epsilon"] is None
    assert "privacy         no bound: epsilon is infinite at delta" in capsys.readouterr().out
    axes = Figure().subplots()
    unbounded = [{**row, "privacy/epsilon": math.nan} for row in found]
    draw_epsilon(axes, unbounded)
    assert axes.get_title() == f"Privacy of clients (epsilon is infinite at delta {DELTA:.2g})"
    assert torch.isnan(torch.tensor(axes.lines[0].get_ydata())).all()
