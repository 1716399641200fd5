"""Which run is gone on with, what its directory is then, and what is refused."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tests.persist.tiny
import vecfl
from tests.persist.tiny import CLIENT, TinyArgs, X, Y, arguments
from vecfl.algorithm_flags import AlgorithmArgs
from vecfl.changes import changes
from vecfl.checkpoint import load, path_of, rounds_in, save
from vecfl.cli import main
from vecfl.errors import InputError
from vecfl.flags import RunArgs
from vecfl.plugins import digests
from vecfl.resume import resume, rows_of
from vecfl.simulation import Simulation

ROOT = Path(__file__).resolve().parents[2]
PYTHON = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
Tiny = Callable[..., Path]
Rows = Callable[[Path], list[dict[str, Any]]]


def model(run_dir: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(run_dir / "model.pt")
    return found


def same(one: Path, other: Path, rows: Rows) -> bool:
    a, b = model(one), model(other)
    return rows(one) == rows(other) and all(torch.equal(a[name], b[name]) for name in a)


def test_a_longer_run_repeats_nothing(tiny: Tiny, rows: Rows, trained: list[int]) -> None:
    whole = tiny("whole")
    trained.clear()
    part = tiny("part", rounds=3)
    assert tiny("part", resume="auto") == part
    assert trained == [1, 2, 3, 4, 5, 6, 7, 8]
    assert same(whole, part, rows)
    assert yaml.safe_load((part / "config.yaml").read_text())["rounds"] == 8
    assert rounds_in(part / "checkpoints") == [3, 8]


def test_a_finished_run_is_left_alone(
    tiny: Tiny, trained: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tiny(rounds=2)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    said = capsys.readouterr().out
    tiny(rounds=2, resume="auto", track="auto")
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert (trained, capsys.readouterr().out) == ([1, 2], said)


def test_auto_starts_where_there_is_no_checkpoint(tiny: Tiny, rows: Rows) -> None:
    whole = tiny("whole", rounds=2)
    assert same(whole, tiny("new", rounds=2, resume="auto"), rows)
    killed = Path("killed")  # before the first checkpoint: as create_run_dir leaves it
    (killed / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", ".config.yaml.12"):
        (killed / name).write_text("")
    assert same(whole, tiny("killed", rounds=2, resume="auto"), rows)


def test_the_directory_or_a_checkpoint_in_it(tiny: Tiny, rows: Rows, trained: list[int]) -> None:
    flags = {"checkpoint_every": 2, "keep": 9}
    whole = tiny("whole", **flags)
    part = tiny("part", **flags)
    trained.clear()
    assert same(whole, tiny(None, resume="part", **flags), rows) and trained == []
    tiny(None, resume="part/checkpoints/round-000004.ckpt", **flags)
    assert trained == [5, 6, 7, 8] and same(whole, part, rows)
    tiny("./part", resume="part", **flags)
    for where, said in (
        ("part/checkpoints/round-000005.ckpt", "000005.ckpt does not exist; expected the dir"),
        ("nowhere", "^--resume: nowhere does not exist; expected the directory of a run$"),
        ("part/checkpoints", "checkpoints holds no checkpoint of a run; expected the directory"),
        ("part/model.pt", "part/model.pt is not in the folder checkpoints of a run$"),
    ):
        with pytest.raises(InputError, match=said):
            tiny(None, resume=where, **flags)
    with pytest.raises(InputError, match="^--out: a run goes on where it is, in part; got whole$"):
        tiny("whole", resume="part", **flags)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tiny: Tiny, rows: Rows, trained: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    whole, part = tiny("whole"), tiny("part", checkpoint_every=3)
    last = path_of(part / "checkpoints", 8)
    last.write_bytes(last.read_bytes()[:-7])
    trained.clear()
    tiny("part", resume="auto")
    assert trained == [7, 8] and same(whole, part, rows)
    assert "round-000008.ckpt: damaged: it ends after " in caplog.text
    last.write_bytes(last.read_bytes()[:-7])
    with pytest.raises(InputError, match="round-000008.ckpt: damaged"):  # named, so not passed over
        tiny(None, resume=str(last))


def test_the_arrangement_is_that_of_before(
    tiny: Tiny, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tiny("whole")
    tiny("part", rounds=4)
    with caplog.at_level(logging.INFO, "vecfl"):
        tiny("part", resume="auto", backend="vmap", slots="auto", workers="auto", threads=None)
    assert same(whole, Path("part"), rows)
    assert {row["system/backend"] for row in rows(Path("part"))} == {"loop"}
    assert "going on with part after round 4 of 8" in caplog.text
    assert "--backend: the run has loop and keeps it" in caplog.text


def test_other_settings_are_refused_with_their_names(
    tiny: Tiny, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    part = tiny("part", rounds=3)
    before = {path: path.read_bytes() for path in part.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as caught:
        tiny("part", resume="auto", seed=4, batch=5)
    assert str(caught.value) == (
        "--resume: part was begun with other settings: batch 3 there, 5 here; "
        "seed 0 there, 4 here; give the same, or --resume-changed True for another result"
    )
    with pytest.raises(InputError, match="^--rounds: expected at least 3, which are done, got 2$"):
        tiny("part", resume="auto", rounds=2)
    assert {path: path.read_bytes() for path in part.rglob("*") if path.is_file()} == before
    tiny("part", resume="auto", resume_changed=True, seed=4, backend="vmap")
    assert "going on with other settings: seed 0 there, 4 here" in caplog.text
    assert (part / "changes.log").read_text() == "after round 3: seed 0 there, 4 here\n"
    assert [row["system/backend"] for row in rows(part)] == ["loop"] * 3 + ["vmap"] * 5
    assert rows(part)[3:] != rows(tiny("whole"))[3:]
    with pytest.raises(InputError, match="seed 4 there, 0 here"):  # the run is another one now
        tiny("part", resume="auto")


def test_a_run_in_use_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first row to its last, and by whatever way the other process comes."""
    said, train = [], Simulation.round

    def busy(sim: Simulation, state: Any) -> Any:
        for way in ("auto", "run"):
            command = f"from tests.persist.tiny import *; run(arguments('run', resume={way!r}))"
            done = subprocess.run(
                [sys.executable, "-c", command], env=PYTHON, capture_output=True, text=True
            )
            said.append(done.stderr.splitlines()[-1])
        return train(sim, state)

    monkeypatch.setattr(Simulation, "round", busy)
    tiny("run", rounds=1)
    taken = f"{Path('run').resolve()} is in use by another process; end it, or choose another "
    assert said == [f"vecfl.errors.InputError: {taken}directory"] * 2
    monkeypatch.setattr(Simulation, "round", train)
    tiny("run", rounds=2, resume="auto")


def test_what_is_not_said_is_as_before(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """--resume RUN means the settings of the run, but for what is said anew."""
    part, got = tiny("part", rounds=3, batch=5, seed=4), list[TinyArgs]()
    shutil.copy(part / "config.yaml", "before.yaml")
    for flags, rounds in (
        (["--resume", "part"], 3),
        (["--resume=part/checkpoints/round-000003.ckpt", "--rounds", "9"], 9),
        (["--out", "part", "--resume", "auto", "--rounds", "4"], 4),
    ):
        monkeypatch.setattr(sys, "argv", ["tiny", *flags])
        main(got.append, TinyArgs)
        assert (got[-1].rounds, got[-1].batch, got[-1].seed) == (rounds, 5, 4), flags
        assert (got[-1].backend, got[-1].workers) == ("loop", 2)
    monkeypatch.setattr(sys, "argv", ["tiny", "--out", "part"])
    main(got.append, TinyArgs)
    assert (got[-1].rounds, got[-1].batch) == (100, 10)  # no run is gone on with


def test_the_first_model_is_not_needed_again(tiny: Tiny) -> None:
    torch.save(model(tiny("zero", rounds=1)), "first.pt")
    run_dir = tiny("run", rounds=1, init="first.pt")
    Path("first.pt").unlink()
    tiny("run", rounds=2, init=str(Path("first.pt").resolve()), resume="auto")
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["init"] == "first.pt"
    with pytest.raises(InputError, match="init first.pt there, other.pt here"):
        tiny("run", rounds=2, init="other.pt", resume="auto")


def pretrained(tiny: Tiny, path: str) -> None:
    """A model like none that a seed makes, in the layer that never trains, too."""
    first = model(tiny(f"of-{path}", rounds=1, seed=5))
    first["4.weight"] = torch.tensor([[1.0, 0.25], [-0.5, 1.0]])
    torch.save(first, path)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_first_model_that_is_partly_frozen_goes_on(
    tiny: Tiny, rows: Rows, rounds: int, left: bool
) -> None:
    """Its values are in no checkpoint, and the file of --init may be another one by now."""
    pretrained(tiny, "pre.pt")
    plan = {"init": "pre.pt", "freeze": "^0[.]", "checkpoint_every": 1, "keep": 9, "rounds": 4}
    whole, part = tiny("whole", **plan), tiny("part", **plan)
    (part / "model.pt").unlink()
    unfinished = vecfl.load_run(part).model
    assert unfinished.keys() == model(whole).keys()
    assert all(torch.equal(unfinished[name], t) for name, t in model(whole).items())
    if not left:
        Path("pre.pt").unlink()
    tiny(None, resume=f"part/checkpoints/round-{rounds:06}.ckpt", **plan)
    assert same(whole, part, rows)
    begun = torch.load("part/first.pt")
    for name in ("0.weight", "0.bias", "4.weight"):
        assert torch.equal(model(part)[name], begun[name]), name
    assert not torch.equal(model(part)["3.weight"], begun["3.weight"])


def test_what_never_changes_must_be_there(tiny: Tiny) -> None:
    pretrained(tiny, "pre.pt")
    run_dir = tiny(rounds=2, init="pre.pt", freeze="^0[.]")
    first = (run_dir / "first.pt").read_bytes()
    (run_dir / "first.pt").unlink()
    with pytest.raises(InputError, match="^the checkpoint is of another run: frozen .* there, .* "):
        tiny(rounds=3, init="pre.pt", freeze="^0[.]", resume="auto")
    (run_dir / "first.pt").write_bytes(first)
    tiny(rounds=3, init="pre.pt", freeze="^0[.]", resume="auto")
    pretrained(tiny, "other.pt")
    other = torch.load("other.pt")
    other["4.weight"] += 1
    torch.save(other, "other.pt")
    changed = {"init": "other.pt", "freeze": "^0[.]"}
    tiny(rounds=4, **changed, resume="auto", resume_changed=True)  # and so it stays
    Path("other.pt").unlink()
    tiny(rounds=5, **changed, resume="auto")
    assert torch.equal(model(run_dir)["4.weight"], other["4.weight"])


def test_another_population_under_the_same_settings_is_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.yaml does not tell what lies in a data set; the checkpoint does."""
    part = tiny("part", rounds=3)
    monkeypatch.setattr(tests.persist.tiny, "X", X[:39])
    monkeypatch.setattr(tests.persist.tiny, "Y", Y[:39])
    monkeypatch.setattr(tests.persist.tiny, "CLIENT", CLIENT[:39])
    with pytest.raises(InputError) as caught:
        tiny("part", resume="auto")
    assert str(caught.value) == "the checkpoint is of another run: examples 40 there, 39 here"
    assert (part / "model.pt").exists()
    tiny("part", resume="auto", resume_changed=True)


@pytest.mark.parametrize("exact", [False, True])
def test_another_torch_or_number_of_ranks_is_told(
    tiny: Tiny, caplog: pytest.LogCaptureFixture, exact: bool
) -> None:
    """Exact sums have the same bits on any number of ranks."""
    last = path_of(tiny(rounds=1, exact_sums=exact) / "checkpoints", 1)
    content = load(last)
    assert (content["torch"], content["ranks"]) == (torch.__version__, 1)
    tiny(rounds=2, exact_sums=exact, resume="auto")
    save(last, content | {"torch": "2.0", "ranks": 3})
    tiny(None, rounds=2, exact_sums=exact, resume=str(last))
    said = ["rounds 2 to 2, which are done, are trained again"]
    said += ["begun with torch 2.0: other bits may come"]
    said += [] if exact else ["begun with 3 ranks: other last bits may come"]
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == said


def test_another_recipe_is_refused(tiny: Tiny) -> None:
    tiny("run", rounds=1)
    with pytest.raises(InputError, match="^--resume: run is a run of tiny$"):
        resume(arguments("run", resume="auto"), "quickstart")


COUNT = [
    "validation",
    "cohort",
    "batch",
    "seed",
    "sample_seed",
    "device",
    "dtype",
    "exact_sums",
    "sampler",
    "client_dropout",
    "transforms",
    "aggregator",
    "around",
    "freeze",
    "init",
    "fall_back",
    "precision",
    "private_clip",
    "noise_multiplier",
    "epsilon",
    "delta",
    "accountant",
    "stands_for",
]
COUNT += [f.name for f in fields(AlgorithmArgs) if f.name not in asdict(RunArgs())]
COUNT += ["own"]  # a recipe's own count, too
WHEN = [
    "eval_every",
    "test_every",
    "initial_evaluation",
    "statistics",
    "rounds",
    "metrics",
    "watch",
]


def test_which_settings_change_the_result() -> None:
    """Each setting of a run counts, but for those that are known to be free."""
    base = asdict(AlgorithmArgs()) | {"own": 1}
    assert {"server_schedule", "within_round", "option", "alpha"} <= set(COUNT)

    def that_count(**how: bool) -> set[str]:
        return {name for name in base if changes(base, base | {name: "2"}, **how)}

    assert that_count() == set(COUNT)
    assert that_count(looks=True) == set(COUNT) | set(WHEN)  # metrics decide what comes next
    base["epsilon"] = 0.5  # the noise that was found for it is that of so many rounds
    assert that_count() == set(COUNT) | {"rounds"}
    base["fall_back"] = True
    assert that_count() == set(COUNT) | set(WHEN)
    assert changes({"lr": 1}, {"lr": 1, "mu": 2}) == ["mu None there, 2 here"]
    assert changes({"lr": 1}, {"lr": 1, "mu": None, "around": ()}) == []  # of an older version


@pytest.mark.parametrize(
    "around",
    [
        "server_on_plateau('eval/loss', 'min', 0.5, 0)",
        "around.py:inside",  # what it does cannot be told by its name
    ],
)
def test_evaluations_count_where_the_algorithm_sees_them(
    tiny: Tiny, rows: Rows, around: str
) -> None:
    Path("around.py").write_text(
        "import vecfl\n\n\ndef inside(algorithm):\n"
        "    return vecfl.server_on_plateau(algorithm, 'eval/loss', 'min', 0.5, 0)\n"
    )
    plan = {"rounds": 6, "around": (around,), "checkpoint_every": 2, "keep": 9}
    whole, part = tiny("whole", **plan), tiny("part", **plan)
    middle = str(part / "checkpoints" / "round-000002.ckpt")
    with pytest.raises(InputError) as caught:
        tiny(None, resume=middle, **plan | {"eval_every": 4})
    assert str(caught.value) == (
        f"--resume: {part.resolve()} was begun with other settings: eval_every 1 there, 4 here; "
        "give the same, or --resume-changed True for another result"
    )
    assert same(whole, part, rows)
    tiny(None, resume=middle, **plan, track="none", patience=None)
    assert same(whole, part, rows)
    tiny(None, resume=middle, **plan | {"eval_every": 4}, resume_changed=True)
    assert not same(whole, part, rows)
    said = "after round 2: none\nafter round 2: eval_every 1 there, 4 here\n"
    assert (part / "changes.log").read_text() == said


def test_what_only_averages_sees_no_evaluation(tiny: Tiny, rows: Rows) -> None:
    whole = tiny("whole", rounds=4, around=("ema(0.5)",))
    part = tiny("part", rounds=2, around=("ema(0.5)",))
    tiny("part", rounds=4, around=("ema(0.5)",), resume="auto")
    assert same(whole, part, rows)


LINES = ['{"round": 1, "a": 0.1}\n', '{"round": 2, "a": 0.2}\n', '{"round": 3, "a": 0.3}\n']


@pytest.mark.parametrize("torn", [b"", b'{"round": 4, "a"', b'{"round": 4}', b"\xff\0\n"])
@pytest.mark.parametrize("done", [0, 2, 3])
def test_later_rows_and_a_torn_one_are_cut(tmp_path: Path, done: int, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes("".join(LINES).encode() + torn)
    assert rows_of(path, done) == "".join(LINES[:done]).encode()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("".join(LINES[:2]), "metrics.jsonl: 2 rows of 3 rounds; put the missing ones back"),
        ("", "metrics.jsonl: 0 rows of 3 rounds; put the missing ones back"),
        ("x\n", "metrics.jsonl, line 1: not the row of a round"),
        (LINES[0] + "[2]\n", "metrics.jsonl, line 2: not the row of a round"),
        ("".join(LINES[:2] * 2), "metrics.jsonl, line 3: not the row of round 3"),
    ],
)
def test_rows_of_something_else_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match=said):
        rows_of(tmp_path / "metrics.jsonl", 3)


def test_rows_that_do_not_fit_leave_the_run_as_it_is(tiny: Tiny) -> None:
    run_dir = tiny(rounds=2)
    (run_dir / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="run/metrics.jsonl: No such file .*; expected 2 rows$"):
        tiny(resume="auto")
    assert (run_dir / "model.pt").exists() and rounds_in(run_dir / "checkpoints") == [0, 2]


@pytest.mark.parametrize("missing", ["model.pt", "curves.png", "model.safetensors"])
def test_a_result_that_is_missing_is_made(tiny: Tiny, trained: list[int], missing: str) -> None:
    flags = {"rounds": 2, "safetensors": missing.endswith("safetensors")}
    if flags["safetensors"]:
        pytest.importorskip("safetensors")
    run_dir = tiny(**flags)
    (run_dir / missing).unlink()
    tiny(**flags, resume="auto")
    assert (run_dir / missing).exists() and trained == [1, 2]


def test_rounds_without_a_checkpoint_are_refused(tiny: Tiny) -> None:
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text(LINES[0])
    with pytest.raises(
        InputError, match="^--resume auto: run has rounds and no checkpoint; choose"
    ):
        tiny(resume="auto")
    assert Path("run/metrics.jsonl").read_text() == LINES[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"resume": "auto"}, "--resume auto: needs --out, the directory of the run"),
        ({"watch": "loss"}, "--watch: expected METRIC:min or METRIC:max, got loss"),
        ({"fall_back": True}, "--fall-back: expected --watch beside it, got True"),
        ({"checkpoint_every": 0}, "--checkpoint-every: expected at least 1, got 0"),
        ({"keep": 0}, "--keep: expected at least 1, got 0"),
    ],
)
def test_wrong_flags(tiny: Tiny, flags: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        tiny(None, **flags)
    assert str(caught.value) == said
    assert not Path("runs").exists()


def test_falling_back_is_where_it_was(tiny: Tiny, rows: Rows) -> None:
    plan = {"watch": "eval/loss:min", "fall_back": True, "checkpoint_every": 3}
    whole, plain = tiny("whole", **plan), tiny("plain")
    assert not same(whole, plain, rows)
    losses = [row["eval/loss"] for row in rows(whole)]
    best = losses.index(min(losses)) + 1
    assert best in rounds_in(whole / "checkpoints")
    killed = tiny("killed", **plan, keep=9)
    for round in rounds_in(killed / "checkpoints"):
        tiny(None, resume=f"killed/checkpoints/round-{round:06}.ckpt", **plan, keep=9)
        assert same(whole, killed, rows), round
    config = yaml.safe_load((killed / "config.yaml").read_text())
    assert config["fall_back"] is True and "resume" not in config


def test_a_final_round_that_fails_leaves_the_best_model(
    tiny: Tiny, rows: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    for rounds in range(2, 9):
        run_dir = tiny(f"r{rounds}", rounds=rounds, watch="eval/loss:min", fall_back=True)
        losses = [row["eval/loss"] for row in rows(run_dir)]
        if losses[-1] > min(losses):
            break
    else:
        pytest.fail("no last round was worse than the best")
    best = losses.index(min(losses)) + 1
    assert f"model.pt        of round {best}, the best by eval/loss\n" in capsys.readouterr().out
    kept = torch.load(run_dir / "model.pt")
    other = model(tiny("best", rounds=best, watch="eval/loss:min", fall_back=True))
    assert all(torch.equal(kept[name], other[name]) for name in other)


EVERY = """
def first(eligible, seed, round):
    return eligible.nonzero().flatten()[:4]
"""
SCORE = """
def score(output, batch):
    return output.sum(1), None
"""


def test_an_edited_file_is_another_setting(tiny: Tiny, trained: list[int], tmp_path: Path) -> None:
    Path("own.py").write_text(EVERY)
    Path("score.py").write_text(SCORE)
    flags = {"sampler": "own.py:first", "metrics": ("m=score.py:score",)}
    tiny(rounds=2, **flags)
    names = load(path_of(Path("run/checkpoints"), 2))["files"]
    assert {name: list(files) for name, files in names.items()} == {
        "sampler": ["own.py"],
        "metrics": ["score.py"],
    }
    Path("score.py").write_text(SCORE + "# it changes no round\n")
    tiny(rounds=3, resume="auto", **flags)
    Path("own.py").write_text(EVERY.replace(":4", ":3"))
    with pytest.raises(InputError) as caught:
        tiny(rounds=4, resume="auto", **flags)
    assert str(caught.value) == (
        "--resume: run was begun with other settings: sampler: own.py has been edited; give the "
        "same, or --resume-changed True for another result"
    )
    tiny(rounds=4, resume="auto", resume_changed=True, **flags)
    assert trained == [1, 2, 3, 4]
    assert "after round 3: sampler: own.py has been edited" in Path("run/changes.log").read_text()
    tiny(rounds=5, resume="auto", **flags)  # the file as it is now
    whole = {"sampler": f"{tmp_path}/own.py:first", "around": (f"{tmp_path}/gone.py:x",)}
    assert list(digests(whole)) == ["sampler"]


def test_a_file_that_is_elsewhere(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own.py").write_text(EVERY)
    run_dir = tiny(rounds=1, sampler="own.py:first").absolute()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(InputError) as caught:
        tiny(None, rounds=2, resume=str(run_dir), sampler="own.py:first")
    assert str(caught.value) == (
        f"--sampler: no file own.py in {tmp_path}/other; go on with a run from the folder where it "
        "was started"
    )
