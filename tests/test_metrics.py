"""Metrics by hand, and names that work everywhere or are refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vecfl
from vecfl import InputError, Task
from vecfl.evaluate import evaluate, evaluate_clients
from vecfl.report import draw_curves, summary
from vecfl.track import Console, Jsonl

from .oracles.bridge import dataset

# Logits of four examples, and their labels: predicted are 0, 1, 1, 2; the label is first, second,
# first and third.
LOGITS = torch.tensor(
    [[3.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 5.0, 1.0], [1.0, 2.0, 3.0]], dtype=torch.float64
)
LABELS = torch.tensor([0, 0, 1, 0])


def ratio(metric: Any, output: Tensor = LOGITS, y: Tensor = LABELS) -> float:
    value, weight = metric(output, {"y": y})
    total = value.sum() / (len(value) if weight is None else weight.sum())
    return float(total)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (vecfl.top_k_accuracy(1), 2 / 4),
        (vecfl.top_k_accuracy(2), 3 / 4),
        (vecfl.top_k_accuracy(3), 1.0),
        (vecfl.top_k_accuracy(9), 1.0),  # of three classes
        # Class 0: TP 1, FN 2, FP 0. Class 1: TP 1, FN 0, FP 1. Class 2: TP 0, FN 0, FP 1.
        (vecfl.recall(0), 1 / 3),
        (vecfl.precision(0), 1.0),
        (vecfl.f1(0), 2 / 4),
        (vecfl.recall(1), 1.0),
        (vecfl.precision(1), 1 / 2),
        (vecfl.f1(1), 2 / 3),
        (vecfl.recall(2), math.nan),
        (vecfl.precision(2), 0.0),
        (vecfl.f1(2), 0.0),
    ],
)
def test_metrics_by_hand(metric: Any, expected: float) -> None:
    assert ratio(metric) == pytest.approx(expected, nan_ok=True)
    # The same as positions of two sequences; a position without weight changes nothing.
    padded = torch.cat((LOGITS, LOGITS[:1], LOGITS[:1]))
    y = torch.tensor([0, 0, 1, 0, -100, -100])
    assert ratio(metric, padded.view(2, 3, 3), y.view(2, 3)) == pytest.approx(expected, nan_ok=True)
    value, weight = metric(padded.view(2, 3, 3), {"y": y.view(2, 3)})
    assert value.shape == weight.shape == (2,)


def test_a_model_that_is_not_finite_is_never_right() -> None:
    output = torch.full((3, 4), math.nan)
    assert ratio(vecfl.top_k_accuracy(4), output, torch.tensor([0, 1, 2])) == 0
    one = torch.tensor([[1.0, math.nan, 0.0]])
    assert ratio(vecfl.top_k_accuracy(1), one, torch.tensor([0])) == 0
    assert ratio(vecfl.top_k_accuracy(2), one, torch.tensor([0])) == 1


def test_equal_logits_count_for_the_label() -> None:
    assert ratio(vecfl.top_k_accuracy(1), torch.zeros(2, 5), torch.tensor([1, 4])) == 1


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_numbers_that_make_no_metric(k: Any) -> None:
    with pytest.raises(InputError, match="^top_k_accuracy: expected a number of classes, at least"):
        vecfl.top_k_accuracy(k)
    for make in (vecfl.recall, vecfl.precision, vecfl.f1):
        if k != 0 or k is False:
            with pytest.raises(InputError, match="^expected a class, counted from 0, got "):
                make(k)


def task_of(metrics: dict[Any, Any]) -> Task:
    example = {"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), "y": LABELS}
    return Task(nn.Linear(3, 3), vecfl.cross_entropy, metrics, example=example)


@pytest.mark.parametrize("name", ["top/5", "f1 score", "a\tb", "", 3, "new\nline"])
def test_names_that_would_be_taken_apart(name: Any) -> None:
    with pytest.raises(InputError) as caught:
        task_of({name: vecfl.accuracy})
    assert str(caught.value) == (
        f"metric {name!r}: expected a name without spaces and '/', which part the name of an "
        "evaluation from that of a metric"
    )


@pytest.mark.parametrize("name", ["loss", "weight", "client", "examples", "update_norm"])
def test_names_that_are_taken(name: str) -> None:
    with pytest.raises(InputError, match=f"^no metric can be called '{name}': that is the |how "):
        task_of({name: vecfl.accuracy})


# Longer than 8 characters, with other letters, with the ends of names that the spread makes.
NAMES = ["f1-score:macro", "x" * 200, "Genauigkeit_ä", "loss_p90", "accuracy_mean", "a.b[0]", "%d"]


@pytest.mark.parametrize("backend", ["loop", "vmap", "stacked"])
def test_any_other_name_works_everywhere(tmp_path: Path, backend: str) -> None:
    """Two clients of two examples: what each name says is the accuracy."""
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    data = dataset([{"x": x[i : i + 2].clone(), "y": LABELS[i : i + 2].clone()} for i in (0, 2)])
    task = task_of({"accuracy": vecfl.accuracy} | {name: vecfl.accuracy for name in NAMES})
    algorithm = vecfl.fedavg(lr=0.1, batches=vecfl.Batches(2))
    sim = vecfl.Simulation(task, data, algorithm, vecfl.everyone(), backend=backend)
    state, metrics = sim.round(sim.start())
    metrics |= sim.evaluate(state, data.columns) | sim.evaluate_clients(state)
    for name in NAMES:
        assert metrics[f"eval/{name}"] == metrics["eval/accuracy"]
        for part in ("mean", "p10", "p50", "p90", "worst"):
            assert metrics[f"client/{name}_{part}"] == metrics[f"client/accuracy_{part}"]
    assert len([key for key in metrics if key.startswith("eval/")]) == 2 + len(NAMES)
    assert len([key for key in metrics if key.startswith("client/")]) == 1 + 5 * (1 + len(NAMES))
    found = sim.client_results(state)
    assert all((found[name] == found["accuracy"]).all() for name in NAMES)
    log = Jsonl(tmp_path / "metrics.jsonl")
    log.log(metrics)
    log.close()
    Console(1).log(metrics)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())[f"eval/{NAMES[1]}"] is not None
    assert "test accuracy" in summary(tmp_path) and draw_curves(tmp_path).exists()


def test_pooled_and_per_client_agree() -> None:
    """F1 of class 0 over both clients is no mean of theirs: it is of the counts added up."""
    x = torch.eye(3, dtype=torch.float64)[[0, 1, 1, 2]]
    module = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.eye(3))  # it predicts 0, 1, 1, 2
    columns = [{"x": x[:2], "y": LABELS[:2]}, {"x": x[2:], "y": LABELS[2:]}]
    data = dataset([{k: v.clone() for k, v in c.items()} for c in columns])
    metrics = {"f1_0": vecfl.f1(0), "recall_0": vecfl.recall(0)}
    task = Task(module, vecfl.cross_entropy, metrics, example=data.examples(2))
    task = task.to("cpu", torch.float64)
    w = task.layout.flatten(task.module)
    # Client 0: TP 1, FN 1; client 1: FN 1. Pooled 2 / (2 + 2) = 1/2; alone 2 / 3 and 0.
    assert evaluate(task, w, data.columns)["f1_0"] == pytest.approx(1 / 2)
    found = evaluate_clients(task, w, data)
    assert found["f1_0"].tolist() == pytest.approx([2 / 3, 0])
    assert found["recall_0"].tolist() == pytest.approx([1 / 2, 0])
