"""Captured steps and lower precisions on a GPU, against plain steps on it.

With VECFL_TEST_DEVICE=cpu the captures are those of the stand-in, which tries this code.
"""

from dataclasses import replace

import pytest
import torch

import vecfl
from vecfl.engine import graphs

from ..engine.recorder import ASKING, Recorder, drawn
from ..oracles.tasks import PROBLEMS
from .test_gpu import ON, SETTINGS, C, close, play, pytestmark, sent, simulation

__all__ = ["pytestmark"]
TOGETHER = [(b, p) for b, p in ON if b != "loop"]
SOME = ("momentum, wrapped", "adam, pull, clip", "rows of clients")
LONGER = {name: replace(SETTINGS[name], rounds=3, epochs=3) for name in SOME}


@pytest.fixture(autouse=True)
def captured(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        asking = tuple(name for name in ASKING if name != "aten::_local_scalar_dense")
        monkeypatch.setattr(graphs, "recorder", lambda device: Recorder(asking))
        monkeypatch.setattr("vecfl.random.philox", drawn)
        monkeypatch.setattr("vecfl.arrange.require_cuda", lambda device: None)


@pytest.mark.parametrize("setting", LONGER)
@pytest.mark.parametrize("backend, problem", TOGETHER)
def test_captured_steps_give_what_plain_ones_give(
    backend: str, problem: str, setting: str, device: str
) -> None:
    how = {"backend": backend, "slots": 3}
    plain, ours = (
        play(PROBLEMS[problem], LONGER[setting], device, graphs=on, **how) for on in (False, True)
    )
    # Adam takes the rate in float32: 0.05 is off by 1.5e-8 of itself.
    rtol = 1e-6 if "adam" in setting else 1e-9
    close(ours.models, plain.models, rtol, rtol / 10)
    close([m["train/loss"] for m in ours.metrics], [m["train/loss"] for m in plain.metrics], rtol)


@pytest.mark.parametrize("backend", ["vmap", "stacked"])
@pytest.mark.parametrize("resident", [True, False])
def test_a_schedule_and_a_stream_of_examples(backend: str, resident: bool, device: str) -> None:
    p, found = PROBLEMS["mlp"], []
    algorithm = vecfl.fedavg(lr=lambda r: 0.1 * 0.5**r, batches=vecfl.Batches(4, epochs=3))
    for on in (False, True):
        how = {"backend": backend, "slots": 3, "graphs": on, "resident": resident}
        sim = simulation(p, p.clients(), algorithm, device, **how)
        state = sim.start()
        for _ in range(4):
            state, metrics = sim.round(state)
            assert metrics["system/graphs"] is on
        found.append(state.server["w"].cpu())
    close(found[1], found[0])
    captured = sim.trainer.workers[0].graphs
    assert captured is not None and len(captured.captured) == 1  # few steps need no mask


def test_a_captured_step_is_much_the_same_in_lower_precision(device: str) -> None:
    p, setting = PROBLEMS["mlp"], replace(SETTINGS["sgd"], rounds=1)
    how = {"backend": "vmap", "slots": C, "dtype": torch.float32}
    right = torch.stack(list(sent(play(p, setting, device, **how)).values()))
    for precision in ("bf16", "tf32"):
        if (device, precision) == ("cpu", "tf32"):
            continue
        low = {
            on: torch.stack(
                list(sent(play(p, setting, device, precision=precision, graphs=on, **how)).values())
            )
            for on in (False, True)
        }
        error = float((low[False] - right).norm() / right.norm())
        # Factors are off by 2^-9 or 2^-11; wide products are needed for a GPU to take TF32 at all.
        assert (1e-5 if precision == "bf16" else 0) < error < 3e-2, precision
        close(low[True], low[False], 1e-3, 1e-5)
