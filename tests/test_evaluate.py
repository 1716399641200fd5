"""Evaluation by hand, in batches of three: pooled, per client, and how it spreads."""

import importlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vecfl import (
    FederatedDataset,
    InputError,
    Task,
    accuracy,
    cross_entropy,
    evaluate,
    evaluate_clients,
)
from vecfl.evaluate import spread
from vecfl.losses import Batch, Pair
from vecfl.metrics import recall

from .oracles import tasks, tiny

# Losses at w = 1: FAR 1/2, STEEP 2, PLAIN 1/2, SETTLED 0. Client 1 has no example.
CLIENTS = [
    [tiny.FAR, tiny.STEEP, tiny.PLAIN, tiny.SETTLED],
    [],
    [tiny.STEEP, tiny.STEEP],
    [tiny.SETTLED],
]
LOSSES = [[0.5, 2, 0.5, 0], [], [2, 2], [0]]


@pytest.fixture(autouse=True)
def batches_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("vecfl.evaluate"), "BATCH", 3)


def dataset(weights: list[float] | None = None) -> FederatedDataset:
    """The seven examples, with weights m."""
    clients = [{k: v.clone() for k, v in tiny.client(*c).items()} for c in CLIENTS]
    sizes = torch.tensor([0] + [len(c["x"]) for c in clients]).cumsum(0)
    columns = {name: torch.cat([c[name] for c in clients]) for name in "xy"}
    columns["m"] = torch.ones(7) if weights is None else torch.tensor(weights)
    return FederatedDataset(columns, sizes)


def below_one(output: Tensor, batch: Batch) -> Pair:
    """A metric: whether the error is at most 1, which is so for all but STEEP."""
    return ((output - batch["y"]).abs() <= 1).to(output.dtype), None


def task(module: nn.Module | None = None) -> Task:
    data = dataset()
    metrics = {"near": below_one}
    return Task(module or tiny.Line(), tiny.masked, metrics, example=data.examples(2))


def test_pooled() -> None:
    """Seven examples in batches of 3, 3 and 1: losses add up to 7, four of seven are near.

    Weights (1, 3, 0, 2, 1, 0, 5): 0.5 + 3 * 2 + 2 * 0 + 2 + 0 = 8.5 over 12.
    """
    values = evaluate(task(), torch.ones(1), dataset().columns)
    assert values == pytest.approx({"loss": 7 / 7, "near": 4 / 7})
    weighted = dataset([1, 3, 0, 2, 1, 0, 5]).columns
    assert evaluate(task(), torch.ones(1), weighted)["loss"] == pytest.approx(8.5 / 12)
    at_two = evaluate(task(), torch.full((1,), 2.0), dataset().columns)  # 0, 8, 2, 0.5, 8, 8, 0.5
    assert at_two["loss"] == pytest.approx(27 / 7)


def test_batches_are_three_long_and_one_forward_pass_serves_all() -> None:
    lengths = []

    class Watched(tiny.Line):
        def forward(self, x: Tensor) -> Tensor:
            lengths.append((len(x), torch.is_grad_enabled()))
            return super().forward(x)

    watched = task(Watched())
    lengths.clear()
    evaluate(watched, torch.ones(1), dataset().columns)
    assert lengths == [(3, False), (3, False), (1, False)]


def test_per_client() -> None:
    values = evaluate_clients(task(), torch.ones(1), dataset())
    assert values.keys() == {"loss", "near", "weight"}
    assert values["weight"].tolist() == [4, 0, 2, 1]
    np.testing.assert_allclose(values["loss"], [3 / 4, math.nan, 2, 0], rtol=1e-12)
    np.testing.assert_allclose(values["near"], [3 / 4, math.nan, 0, 1], rtol=1e-12)
    weighted = evaluate_clients(task(), torch.ones(1), dataset([1, 3, 0, 2, 1, 0, 5]))
    np.testing.assert_allclose(weighted["loss"], [6.5 / 6, math.nan, 2, 0], rtol=1e-12)
    assert weighted["weight"].tolist() == [1 + 3 + 0 + 2, 0, 1 + 0, 5]


def test_per_client_agrees_with_pooled_on_that_client() -> None:
    data = dataset([1, 3, 0.5, 2, 1, 0, 5])
    values = evaluate_clients(task(), torch.full((1,), 0.7), data)
    for k in (0, 2, 3):
        alone = evaluate(task(), torch.full((1,), 0.7), data.client(k))
        assert {name: values[name][k] for name in alone} == pytest.approx(alone)


def test_nothing_to_evaluate() -> None:
    with pytest.raises(InputError) as error:
        evaluate(task(), torch.ones(1), dataset().client(1))
    assert str(error.value) == "nothing to evaluate: the evaluation data have no example"
    unweighted = evaluate(task(), torch.ones(1), dataset([0] * 7).columns)
    assert math.isnan(unweighted["loss"]) and unweighted["near"] == pytest.approx(4 / 7)


def test_a_model_that_is_not_finite_shows() -> None:
    w = torch.full((1,), math.nan)
    assert math.isnan(evaluate(task(), w, dataset().columns)["loss"])
    values = evaluate_clients(task(), w, dataset())
    assert np.isnan(values["loss"]).all() and math.isnan(spread(values)["client/loss_p90"])


def test_one_example_that_is_not_finite_shows_where_it_is() -> None:
    data = dataset()
    data.columns["x"][5] = math.nan  # the second example of client 2
    assert math.isnan(evaluate(task(), torch.ones(1), data.columns)["loss"])
    values = evaluate_clients(task(), torch.ones(1), data)
    np.testing.assert_allclose(values["loss"], [3 / 4, math.nan, math.nan, 0])
    assert math.isnan(spread(values)["client/loss_p90"])


def test_spread_by_hand() -> None:
    """Over 0.1, 0.2, ..., 0.9, 1.0, 1.1 percentile q is the value 0.1 + q / 100; clients without
    weight do not count, whatever stands in their place."""
    shuffled = [0.5, 1.1, 0.1, 0.9, 0.3, 0.7, 0.2, 1.0, 0.4, 0.8, 0.6]
    result = spread(
        {
            "loss": np.array([*shuffled, math.nan, 1e9]),
            "accuracy": np.array([*shuffled, math.nan, -5]),
            "weight": np.array([0.5] + [2.0] * 10 + [0, 0]),
        }
    )
    assert result == pytest.approx(
        {
            "client/loss_p90": 1.0,
            "client/accuracy_mean": 0.6,
            "client/accuracy_p10": 0.2,
            "client/accuracy_p50": 0.6,
            "client/accuracy_p90": 1.0,
            "client/accuracy_worst": 0.1,
        }
    )


def test_spread_of_clients() -> None:
    """Losses 3/4, 2, 0: the 90th percentile is 3/4 + 0.8 * 5/4; near 3/4, 0, 1."""
    result = spread(evaluate_clients(task(), torch.ones(1), dataset()))
    assert result["client/loss_p90"] == pytest.approx(1.75)
    assert result["client/near_mean"] == pytest.approx(1.75 / 3)
    assert result["client/near_worst"] == 0
    assert result["client/near_p50"] == pytest.approx(3 / 4)


def test_a_client_whose_labels_are_all_ignored_has_no_weight_and_no_say() -> None:
    """The softmax of [0, log 3] is [1/4, 3/4]: label 0 loses log 4 and is wrong, label 1 loses
    log(4/3) and is right. Client 0 has labels 0, 1, 1, client 1 none, client 2 one 1."""
    y = torch.tensor([[0, -100], [1, 1], [-100, -100], [-100, -100], [1, -100]])
    x = torch.tensor([0, math.log(3)]).expand(5, 2, 2)
    data = FederatedDataset({"x": x, "y": y}, torch.tensor([0, 2, 4, 5]))
    made = Task(tiny.Line(), cross_entropy, {"accuracy": accuracy}, example=data.examples(2))
    values = evaluate_clients(made, torch.ones(1), data)
    first, last = (math.log(4) + 2 * math.log(4 / 3)) / 3, math.log(4 / 3)
    assert values["weight"].tolist() == [3, 0, 1]
    np.testing.assert_allclose(values["loss"], [first, math.nan, last], rtol=1e-6)
    np.testing.assert_allclose(values["accuracy"], [2 / 3, math.nan, 1], rtol=1e-6)
    result = spread(values)
    assert result["client/loss_p90"] == pytest.approx(last + 0.9 * (first - last))
    assert result["client/accuracy_mean"] == pytest.approx(5 / 6)
    assert result["client/accuracy_worst"] == pytest.approx(2 / 3)


# ------------------------------------------------------------------ modules in evaluation


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_comes_back(training: bool) -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3), nn.Dropout2d(0.9))
    (columns,) = tasks.PROBLEMS["linear"].clients((7,))
    metrics = {"accuracy": accuracy}
    made = Task(module, cross_entropy, metrics, example=columns).to("cpu", torch.float64)
    made.module.train(training)
    w = made.layout.flatten(made.module)
    values = evaluate(made, w, columns)
    output = module[1].double()(columns["x"])
    assert values["loss"] == pytest.approx(nn.functional.cross_entropy(output, columns["y"]).item())
    right = (output.argmax(1) == columns["y"]).double().mean()
    assert values["accuracy"] == pytest.approx(right.item())
    assert all(m.training == training for m in made.module.modules())


def test_changing_buffers_come_from_the_row() -> None:
    problem = tasks.PROBLEMS["buffers"]
    (columns,) = problem.clients((7,))
    made = Task(problem.build(), problem.loss, example=columns).to("cpu", torch.float64)
    w = made.layout.flatten(made.module)
    calls, average = made.layout.buffer_views(w)
    calls += 8
    average += torch.linspace(-1, 1, 15).view(3, 5)
    kept = w.clone()
    weight, bias = made.layout.param_views(w)
    output = columns["x"] * made.module.constant @ weight.T + bias + columns["x"] @ average.T
    expected = nn.functional.cross_entropy(output, columns["y"]).item()
    assert evaluate(made, w, columns)["loss"] == pytest.approx(expected)
    assert torch.equal(w, kept) and int(made.module.calls) == 0


class Drifting(tiny.Line):
    """y = w x + the number of calls, which it counts in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor([0.0]))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) + self.calls


def test_every_batch_starts_from_the_buffers_of_the_row_which_stays() -> None:
    """Row (0, 0): the output is 1 in all three batches; 1/2 for all five that are not SETTLED."""
    made, w = task(Drifting()), torch.zeros(2)
    assert [e.name for e in made.layout.buffers] == ["calls"]
    assert evaluate(made, w, dataset().columns)["loss"] == pytest.approx(2.5 / 7)
    per_client = evaluate_clients(made, w, dataset())
    np.testing.assert_allclose(per_client["loss"], [1.5 / 4, math.nan, 0.5, 0], rtol=1e-12)
    assert w.tolist() == [0, 0] and made.module.calls.item() == 0


@pytest.mark.parametrize("example", [1, 5])  # in the first batch and in the second
def test_labels_out_of_range_are_refused_and_the_mode_comes_back(example: int) -> None:
    (columns,) = tasks.PROBLEMS["linear"].clients((7,))
    made = Task(nn.Linear(5, 3), cross_entropy, example=columns)
    columns["y"][example] = 3
    message = f"column 'y': label 3 of example {example} is out of range"
    with pytest.raises(InputError, match=message):
        evaluate(made, made.layout.flatten(made.module), columns)
    assert made.module.training


def test_spread_where_no_client_has_weight() -> None:
    nothing = {"loss": np.array([np.nan]), "near": np.array([np.nan]), "weight": np.zeros(1)}
    assert all(np.isnan(value) for value in spread(nothing).values())


class Clamped(nn.Linear):
    """Writes into its input and into a buffer, in evaluation too."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x.clamp_(max=0.5))


def test_evaluation_leaves_model_and_data_as_they_are() -> None:
    clients = [{"x": torch.rand(3, 2) + 0.2, "y": torch.tensor([0, 1, 1])}]
    data = FederatedDataset.from_clients(clients)
    example = {name: c.clone() for name, c in clients[0].items()}
    net = Task(Clamped(), cross_entropy, {"accuracy": accuracy}, example=example)
    w, x = net.layout.flatten(net.module), data.columns["x"].clone()
    before = w.clone()
    evaluate(net, w, data.columns)
    evaluate_clients(net, w, data)
    assert torch.equal(w, before)
    assert torch.equal(data.columns["x"], x)


def test_spread_of_a_metric_that_some_clients_do_not_have() -> None:
    """Of four clients with a loss two have examples of the class: 1 and 1/2. Where the
    loss of a client is NaN, too, the model diverged, and that shows."""
    loss, weight = np.array([1.0, 1, 1, 1]), np.array([2.0, 1, 1, 3])
    some = np.array([1.0, math.nan, 0.5, math.nan])
    result = spread({"loss": loss, "recall": some, "near": loss, "weight": weight})
    assert result["client/recall_clients"] == 2 and "client/near_clients" not in result
    found = [result[f"client/recall_{name}"] for name in ("mean", "p10", "p50", "p90", "worst")]
    assert found == pytest.approx([0.75, 0.55, 0.75, 0.95, 0.5])
    lost = {"loss": np.array([1, math.nan]), "recall": np.array([1, math.nan])}
    result = spread(lost | {"weight": np.ones(2)})
    assert math.isnan(result["client/recall_mean"]) and "client/recall_clients" not in result
    none = spread({"loss": loss, "recall": some * math.nan, "weight": weight})
    assert none["client/recall_clients"] == 0 and math.isnan(none["client/recall_worst"])


def test_recall_of_a_class_that_a_client_lacks() -> None:
    """Client 0 has a 1, which is right; client 1 has zeros alone."""
    data = FederatedDataset.from_clients(
        {"x": torch.eye(2)[y], "y": torch.tensor(y)} for y in ([1, 0], [0, 0])
    )
    linear = nn.Linear(2, 2, bias=False)
    linear.load_state_dict({"weight": torch.eye(2)})
    made = Task(linear, cross_entropy, {"recall": recall(1)}, example=data.examples(2))
    result = spread(evaluate_clients(made, made.layout.flatten(made.module), data))
    assert (result["client/recall_mean"], result["client/recall_clients"]) == (1, 1)
