"""Parts in files of one's own that are wrong: one line that names the flag and the function."""

from pathlib import Path
from typing import Any

import pytest
import torch

import vecfl
from tests.test_parts import DATA, HOW, by_flags, task
from vecfl.errors import InputError
from vecfl.named import named_model

OWN = """
import torch
import vecfl
from dataclasses import replace
from vecfl.transforms import Transform

number = 3


def plain(output, batch):
    return output.sum(1)


def mean(output, batch):
    return output.mean(), None


def text(output, batch):
    return "good"


def one(output):
    return output.sum(1), None


def good(output, batch):
    return output.sum(1), None


def whole(output, batch):
    return output.sum(1), torch.ones(len(output)).long()


def size():
    return 3


def nothing():
    return None


def forgets():
    def client(own, done, upload):
        replace(upload, update=2 * upload.update)

    return Transform("forgets", client)


def halves(part):
    def client(own, done, upload):
        return replace(upload, **{part: getattr(upload, part).flatten()[::2]})

    return Transform(f"halves {part}", client)


quiet = Transform("quiet")


def short(done):
    return torch.ones(len(done.examples) + 1)


def scalar(done):
    return 1.0


def draw(size):
    return vecfl.uniform(size)


def single(messages):
    return messages.mean(0)


def mean_of(messages, weights):
    return messages.mean(0)


def pair(a, b):
    return 1.0
"""
PAIR = "must give (sum [B], weight [B] or None), one number per example (B = 2 here), not"
FUNCTION = "expected a function of"

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"metrics": ("m=own.py:plain",)}, f"the metric 'm' {PAIR} [[2]]; "),
    ({"metrics": ("m=own.py:mean",)}, f"the metric 'm' {PAIR} [[], None]; "),
    ({"metrics": ("m=own.py:text",)}, f"the metric 'm' {PAIR} ['str']; "),
    ({"metrics": ("m=own.py:whole",)}, "the metric 'm' gives torch.int64 weights; weights are f"),
    (
        {"metrics": ("m=own.py:one",)},
        f"--metrics: own.py:one is one(output); {FUNCTION} (output, batch); one that makes it "
        "takes arguments, or (): own.py:one(...)",
    ),
    ({"metrics": ("m=own.py:number",)}, f"--metrics: own.py:number is 3; {FUNCTION} (output, "),
    (
        {"metrics": ("a=recall(1)", "a=recall(0)")},
        "--metrics: a=recall(0): there is one of this name; choose another",
    ),
    (
        {"metrics": ("a=recall(2)",)},
        "the metric 'a' failed on output [2, 2]: no class 2: the model has 2 outputs, from 0",
    ),
    ({"transforms": ("own.py:size()",)}, "--transforms: own.py:size() gives 3; expected a vecfl."),
    ({"transforms": ("own.py:nothing()",)}, "--transforms: own.py:nothing() gives None; expected"),
    ({"transforms": ("own.py:forgets",)}, "--transforms: own.py:forgets gives <function forgets"),
    ({"sampler": "own.py:nothing()"}, f"--sampler: own.py:nothing() gives None; {FUNCTION} (elig"),
    (
        {"sampler": "own.py:draw"},
        f"--sampler: own.py:draw is draw(size); {FUNCTION} (eligible, seed, round); one that makes "
        "it takes arguments, or (): own.py:draw(...)",
    ),
    ({"aggregator": "own.py:number"}, f"--aggregator: own.py:number is 3; {FUNCTION} (messages, w"),
    (
        {"aggregator": "own.py:single"},
        f"--aggregator: own.py:single is single(messages); {FUNCTION} (messages, weights); one th",
    ),
    ({"algorithm": "own.py:number"}, "--algorithm: number is 3; expected a function"),
    ({"around": ("own.py:number",)}, "--around: number is 3; expected a function"),
    ({"around": ("own.py:number()",)}, "--around: number is 3; expected a function"),
    ({"weights": "own.py:pair"}, f"--weights: own.py:pair is pair(a, b); {FUNCTION} (done); one "),
    ({"lr_schedule": ("own.py:pair",)}, f"--lr-schedule: own.py:pair is pair(a, b); {FUNCTION} (r"),
]


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("flags", "said"), WRONG)
def test_what_is_wrong_is_one_line(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        by_flags(**flags)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_what_is_right_passes() -> None:
    sim = by_flags(
        metrics=("m=own.py:good", "a=recall(1)"),
        transforms=("own.py:quiet",),
        sampler="own.py:draw(2)",
        aggregator="own.py:mean_of",
    )
    assert list(sim.task.metrics) == ["m", "a"] and len(sim.cohort(0)) == 2
    assert sim.algorithm.name == "fedavg, quiet, mean_of"


IN_A_ROUND: list[tuple[dict[str, Any], str]] = [
    (
        {"transforms": ("own.py:forgets()",)},
        "transform forgets: its client side gave None; expected an Upload, such as replace(",
    ),
    (  # of a linear layer of 3 and 2: 8 numbers
        {"transforms": ("own.py:halves('update')",)},
        "transform halves update: its client side gave the update [",
    ),
    (
        {"transforms": ("own.py:halves('weight')", "own.py:quiet"), "slots": 3},
        "transform halves weight: its client side gave the weight [2]; expected a tensor [3]",
    ),
    ({"weights": "own.py:scalar"}, "--weights: own.py:scalar gave 1.0 for "),
    (
        {"weights": "own.py:short", "slots": 3},
        "--weights: own.py:short gave [1] for 0 clients that ended together; expected a ten",
    ),
]
# Where clients end together, on vmap; on the loop they end one by one.
BY_BACKEND = [("vmap", *one) for one in IN_A_ROUND]
BY_BACKEND += [("loop", *one) for one in IN_A_ROUND if "slots" not in one[0]]


@pytest.mark.parametrize(("backend", "flags", "said"), BY_BACKEND)
def test_what_shows_in_a_round_is_one_line(
    backend: str, flags: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"backend": backend, "slots": 1, **flags}.items():
        if name in ("backend", "slots"):
            monkeypatch.setitem(HOW, name, value)
    sim = by_flags(**{n: v for n, v in flags.items() if n != "slots"}, steps=1)
    with pytest.raises(InputError) as caught:
        sim.round(sim.start())
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_model() -> None:
    for text, said in (
        ("own.py:number", f"--model: own.py:number is 3; {FUNCTION} (classes)"),
        ("own.py:pair", f"--model: own.py:pair is pair(a, b); {FUNCTION} (classes); one that"),
    ):
        with pytest.raises(InputError) as caught:
            named_model(text, {}, 10)
        assert str(caught.value).startswith(said)


def test_metrics_of_a_task_are_tried_in_python_too() -> None:
    with pytest.raises(InputError, match="^the metric 'm' must give"):
        task().scored({"m": lambda output, batch: output.mean()})
    scored = task().scored({"m": vecfl.accuracy})
    assert torch.equal(scored.example["x"], DATA.examples(2)["x"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"weights": "capped(5)"}, "clients count alike, in spite of --weights capped(5)"),
        ({"algorithm": "dga"}, "clients count alike, in spite of dga"),
        ({"weights": "uniform_weights"}, None),
        ({}, None),
    ],
)
def test_weights_in_vain_are_told(
    flags: dict[str, Any], said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "vecfl")
    by_flags(aggregator="trimmed_mean(0.1)", **flags)
    found = [line for line in caplog.messages if "alike" in line]
    assert found == ([] if said is None else [f"--aggregator trimmed_mean(0.1): {said}"])
    caplog.clear()
    by_flags(aggregator="own.py:mean_of", **flags)
    assert "alike" not in caplog.text
