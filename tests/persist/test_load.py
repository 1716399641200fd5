"""A run read back."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import vecfl
from vecfl.checkpoint import load, path_of
from vecfl.errors import InputError
from vecfl.model_file import save_model, warm_start

Tiny = Callable[..., Path]


def test_a_finished_run(tiny: Tiny, rows: Callable[[Path], list[dict[str, Any]]]) -> None:
    run_dir = tiny(eval_every=3, watch="eval/accuracy:max", keep=1)
    run = vecfl.load_run(run_dir)
    assert (run.finished, run.round) == (True, 8)
    assert run.config == yaml.safe_load((run_dir / "config.yaml").read_text())
    assert run.metrics["round"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert run.metrics["round"].dtype == np.int64
    assert run.metrics["system/backend"] == ["loop"] * 8
    accuracy = [row.get("eval/accuracy", math.nan) for row in rows(run_dir)]
    assert np.isnan(run.metrics["eval/accuracy"]).tolist() == [True, True, False] * 2 + [
        True,
        False,
    ]
    np.testing.assert_array_equal(run.metrics["eval/accuracy"], accuracy)
    expected = torch.load(run_dir / "model.pt")
    assert run.model.keys() == expected.keys()
    assert all(torch.equal(run.model[name], expected[name]) for name in expected)
    best = max((a, -r) for r, a in enumerate(accuracy, 1) if a == a)
    assert run.best_round == -best[1] == 6  # --keep 1 alone would leave the last
    there = torch.load(tiny("best", rounds=6) / "model.pt")
    assert run.best is not None and run.best.keys() == there.keys()
    assert all(torch.equal(run.best[name], there[name]) for name in run.best)
    assert not torch.equal(run.best["0.weight"], run.model["0.weight"])


def test_a_run_that_is_not_finished(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    short = vecfl.load_run(tiny("short", rounds=4))
    run_dir = tiny("long", checkpoint_every=4)
    (run_dir / "model.pt").unlink()
    last = path_of(run_dir / "checkpoints", 8)
    last.write_bytes(last.read_bytes()[:99])
    run = vecfl.load_run(run_dir)
    assert (run.finished, run.round, run.best_round, run.best) == (False, 4, None, None)
    assert len(run.metrics["round"]) == 8  # what metrics.jsonl has
    assert "taking round-000004.ckpt" in caplog.text
    assert run.model.keys() == short.model.keys()
    assert all(torch.equal(run.model[name], short.model[name]) for name in run.model)


def test_what_is_no_run_is_named(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere/config.yaml: No such file .*directory of a run$"):
        vecfl.load_run("nowhere")
    (tiny(rounds=1) / "config.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="run/config.yaml: expected the settings of a run$"):
        vecfl.load_run("run")


def test_a_warm_start(tiny: Tiny) -> None:
    first, plain = tiny("first", rounds=3), tiny("plain", rounds=1)
    again = tiny("again", rounds=1, init="first/model.pt", dtype="float64", checkpoint_every=1)
    other = tiny("other", rounds=1, init="first/model.pt")
    begun = vecfl.load_run(first).model
    first_model = load(path_of(again / "checkpoints", 0))["run"]["model"]
    assert first_model["0.weight"].dtype == torch.float64
    assert all(torch.equal(first_model[name], begun[name].double()) for name in first_model)
    a, b = torch.load(other / "model.pt"), torch.load(plain / "model.pt")
    assert not torch.equal(a["0.weight"], b["0.weight"])


def test_a_warm_start_may_hold_a_mask(tmp_path: Path) -> None:
    """What is not finite is refused, unless this model has it there itself."""

    class Masked(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))

    module, path = Masked(), tmp_path / "model.pt"
    save_model(path, module.state_dict())
    warm_start(Masked(), path)
    save_model(path, module.state_dict() | {"mask": -module.mask})
    with pytest.raises(InputError, match="model.pt: tensor 'mask' is not finite$"):
        warm_start(Masked(), path)


def test_the_first_model_may_be_more_precise_than_float32(tiny: Tiny) -> None:
    precise = torch.load(tiny("first", rounds=1, dtype="float64") / "model.pt")
    precise["0.bias"] += 1e-12
    save_model(Path("precise.pt"), precise)
    run_dir = tiny("run", rounds=1, dtype="float64", init="precise.pt")
    found = load(path_of(run_dir / "checkpoints", 0))["run"]["model"]
    assert torch.equal(found["0.bias"], precise["0.bias"])


def test_safetensors(tiny: Tiny) -> None:
    pytest.importorskip("safetensors")
    run_dir = tiny(rounds=1, safetensors=True)
    from safetensors.torch import load_file

    exported, model = load_file(run_dir / "model.safetensors"), torch.load(run_dir / "model.pt")
    assert exported.keys() == model.keys()
    assert all(torch.equal(exported[name], model[name]) for name in model)
    begun = tiny("more", rounds=1, init="run/model.safetensors")
    same = tiny("same", rounds=1, init="run/model.pt")
    a, b = (torch.load(path / "model.pt") for path in (begun, same))
    assert all(torch.equal(a[name], b[name]) for name in a)
