"""The loop is the judge: algorithms x backends x optimizers x tasks x batches x weights, float64.

Every row runs three rounds over ragged clients (0, 1, B-1, B, B+1, 2B and many examples) and is
compared with the plain loop: models, losses and what each client sent, to 1e-9. CI runs a cover of
all pairs, `pytest -m slow` the whole product.
"""

from functools import partial
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from .bridge import run_vecfl
from .cover import Row, pairwise
from .hand import HAND
from .loop import AGGREGATORS, Result, Setting, federated_loop
from .tasks import (
    AUGMENTED,
    LAYERED,
    PROBLEMS,
    SIZES,
    Positions,
    Problem,
    Tied,
    Tracked,
    classes,
    floats,
    integers,
    mlp,
    some_labels,
    tokens,
)

ALGORITHMS = {
    "fedavg": {},
    "fedprox": {"mu": 0.3},
    "adaptive": {"mu": 0.2, "adaptive": (0.3, 1)},
    "fedsgd": {"algorithm": "fedsgd", "server_lr": 0.5},
    "habit": {"algorithm": "habit"},
}
OPTIMIZERS = {
    "sgd": {},
    "clipped": {"clip": 0.05},
    "momentum": {"optimizer": "momentum"},
    "nesterov": {"optimizer": "nesterov", "clip": 0.3, "decay": 0.2},
    "adam": {"optimizer": "adam", "lr": 0.01},
    "adamw": {"optimizer": "adamw", "lr": lambda t: 0.02 / (1 + t)},
    "rmsprop": {"optimizer": "rmsprop", "lr": 0.01, "decay": 0.2},
    "centered": {"optimizer": "centered", "lr": 0.003, "factor": lambda step: 1 / (1 + step)},
    "decayed": {"decay": 0.5},
    "scheduled": {"factor": lambda step: 0.8**step},
}
BATCHES = {
    "two epochs": {"epochs": 2},
    "drop": {"epochs": 2, "last": "drop"},
    "wrap": {"epochs": 2, "last": "wrap"},
    "steps": {"epochs": None, "steps": 5},
    "full": {"epochs": 2, "full": True},
    "full steps": {"epochs": None, "steps": 3, "full": True},
    "cap": {"epochs": 2, "cap": 6},
    "heterogeneous": {"epochs": (3, 2, 0, 1, 4, 0, 2)},
    "random epochs": {"random_epochs": (0, 3, 0.8)},
    "steps by client": {"epochs": None, "steps": (2, 3, 1, 0, 7, 4, 5), "full": True},
    "token cap": {"epochs": 2, "cap": 9, "token_cap": 15},
}
WEIGHTS = {
    "examples": {},
    "uniform": {"weight": "uniform"},
    "capped": {"weight": "capped", "weight_cap": 5},
    "tokens": {"weight": "tokens"},
}
TAKEN = ("cohort", "sample_seed", "cap", "weight", "weight_cap")  # by fedsgd
BACKENDS: dict[str, dict[str, Any]] = {
    "loop S=1": {"backend": "loop", "slots": 1},
    "loop S=3": {"backend": "loop", "slots": 3},
    "loop W=3": {"backend": "loop", "slots": 1, "workers": 3},
    "vmap S=1": {"backend": "vmap", "slots": 1},
    "vmap S=3": {"backend": "vmap", "slots": 3},
    "vmap S=C": {"backend": "vmap", "slots": len(SIZES)},
    "vmap W=2": {"backend": "vmap", "slots": 2, "workers": 2},
}
STACKED: dict[str, dict[str, Any]] = {
    "stacked S=1": {"backend": "stacked", "slots": 1},
    "stacked S=3": {"backend": "stacked", "slots": 3},
    "stacked S=C": {"backend": "stacked", "slots": len(SIZES)},
    "stacked W=2": {"backend": "stacked", "slots": 2, "workers": 2},
    "grouped S=3": {"backend": "stacked-grouped", "slots": 3},
    "unfold S=3": {"backend": "stacked-unfold", "slots": 3},
}
TASKS = PROBLEMS | {
    "tied": Problem(lambda: Tied(0.25), classes, floats(5), integers(3)),
    "buffers": Problem(lambda: Tracked(0.3), classes, floats(5), integers(3)),
    "augmented": AUGMENTED["augmented"],
}
COHORTS = {
    "all": {},
    "four": {"cohort": 4, "sample_seed": 9},
    "repeats": {"cohort": ((5, 3, 5, 1, 5), (), (6, 3, 0, 3))},
}
COLUMNS = {
    "algorithm": ALGORITHMS,
    "backend": BACKENDS,
    "optimizer": OPTIMIZERS,
    "task": TASKS,
    "batches": BATCHES,
    "weights": WEIGHTS,
    "cohort": COHORTS,
}
DENSE = {
    "linear": PROBLEMS["linear"],
    "mlp": PROBLEMS["mlp"],
    "positions": Problem(Positions, tokens, floats(6, 5), some_labels),
    "images": AUGMENTED["images"],
    "cnn": PROBLEMS["cnn"],
    "tokens": PROBLEMS["tokens"],
    "mixed": LAYERED["mixed"],
}
RECURRENT = {name: LAYERED[name] for name in ("lstm", "gru")}
# Layers that run fused, and modules by vmap.
LAYERS = {"linear": (1, 0), "mlp": (2, 0), "positions": (2, 0), "images": (2, 0), "cnn": (4, 0)}
LAYERS |= {"tokens": (2, 0), "lstm": (3, 0), "gru": (5, 0), "mixed": (4, 2)}
LAYERS |= {"one layer": (1, 0), "biases": (0, 2)}
FROZEN = {
    "one layer": Problem(mlp, classes, floats(5), integers(3), freeze="^0[.]"),
    "biases": Problem(mlp, classes, floats(5), integers(3), freeze="bias$"),
    "tied and a gain": Problem(lambda: Tied(0.25), classes, floats(5), integers(3), (), "de|gain"),
}
# Betas under which the clients' weights differ, and some of `mean` and `update_mean` are capped.
BETAS = {"loss": 2.0, "flute_loss": 20.0, "variance": 10.0, "mean": 300.0, "rms": 5.0}
BETAS |= {"update_variance": 300.0, "update_mean": 1000.0, "update_rms": 30.0, "uniform": 1.0}
DGA = {f"dga {name}": {"weighting": name, "softmax_beta": beta} for name, beta in BETAS.items()}
CLIPS = {
    "none": {},
    "norm": {"clips": (("norm", 0.05),)},
    "layer": {"clips": (("layer", 0.08),)},
    "both": {"clips": (("layer", 0.1), ("norm", 0.06))},
}
AGGREGATED = {
    "mean": {},
    "median": {"aggregator": "median"},
    "trimmed": {"aggregator": "trimmed"},
}
KINDS, PROBLEM_OF = BACKENDS | STACKED, TASKS | DENSE | FROZEN | RECURRENT
SOME_EXAMPLES = [case for case in HAND if any(len(c["x"]) for c in case.clients)]
STACKED_COLUMNS = COLUMNS | {"backend": STACKED, "task": DENSE}
MESSAGES = {  # what clients send, and how much it counts
    "algorithm": {name: ALGORITHMS[name] for name in ("fedavg", "fedsgd", "habit")} | DGA,
    "backend": {name: BACKENDS[name] for name in ("loop S=1", "loop W=3", "vmap S=3", "vmap W=2")},
    "optimizer": {name: OPTIMIZERS[name] for name in ("sgd", "clipped", "adam")},
    "task": FROZEN | {name: TASKS[name] for name in ("linear", "tokens", "buffers")},
    "batches": {name: BATCHES[name] for name in ("two epochs", "drop", "full")},
    "cohort": COHORTS,
    "clips": CLIPS,
    "aggregator": AGGREGATED,
}
STACKED_MESSAGES = MESSAGES | {
    "backend": {name: STACKED[name] for name in ("stacked S=3", "stacked W=2")},
    "task": {name: FROZEN[name] for name in ("one layer", "biases")}
    | {"positions": DENSE["positions"]},
}
SEQUENCES = {
    "algorithm": {name: ALGORITHMS[name] for name in ("fedavg", "fedprox")},
    "backend": {name: STACKED[name] for name in ("stacked S=1", "stacked S=3", "stacked S=C")},
    "optimizer": {name: OPTIMIZERS[name] for name in ("sgd", "clipped", "adam")},
    "task": RECURRENT,
    "batches": {name: BATCHES[name] for name in ("drop", "full", "token cap")},
    "cohort": COHORTS,
}
EXAMPLES = {  # clip and noise of the gradients of single examples: all, or some, are clipped
    "none": {},
    "all clipped": {"examples": (0.3, 0.8)},
    "some clipped": {"examples": (1.6, 0.4)},
}
NOISED = {
    "examples": {name: EXAMPLES[name] for name in ("all clipped", "some clipped")},
    "algorithm": {n: (ALGORITHMS | DGA)[n] for n in ("fedavg", "fedprox", "dga update_rms")},
    "backend": {name: BACKENDS[name] for name in ("loop S=3", "vmap S=3", "vmap S=C", "vmap W=2")},
    "optimizer": {name: OPTIMIZERS[name] for name in ("clipped", "momentum", "adam")},
    "task": {name: TASKS[name] for name in ("mlp", "tied", "tokens", "augmented")},
    "batches": {name: BATCHES[name] for name in ("two epochs", "drop", "steps", "cap")},
    "cohort": COHORTS,
}
TABLES = (COLUMNS, STACKED_COLUMNS, MESSAGES, STACKED_MESSAGES, SEQUENCES, NOISED)
COVERS = [pairwise({name: list(values) for name, values in t.items()}) for t in TABLES]


def setting_of(row: Row) -> Setting:
    fields = (
        COHORTS[row["cohort"]]
        | BATCHES[row["batches"]]
        | WEIGHTS[row.get("weights", "examples")]
        | OPTIMIZERS[row["optimizer"]]
    )
    algorithm = (ALGORITHMS | DGA)[row["algorithm"]]
    if row["algorithm"] == "fedsgd":  # one pass, no client optimizer
        fields = {name: v for name, v in fields.items() if name in TAKEN}
    keeps = row["algorithm"] == "habit" or "examples" in row
    if keeps and row["cohort"] == "repeats":  # a client has one row
        fields["cohort"] = tuple(tuple(dict.fromkeys(cohort)) for cohort in fields["cohort"])
    problem = PROBLEM_OF[row["task"]]
    fields |= CLIPS[row.get("clips", "none")] | AGGREGATED[row.get("aggregator", "mean")]
    fields |= EXAMPLES[row.get("examples", "none")] | algorithm
    return Setting(seed=2**40 + 3, augment=problem.augment, freeze=problem.freeze, **fields)


def truth_of(row: Row) -> Result:
    problem = PROBLEM_OF[row["task"]]
    return federated_loop(problem.build(), problem.loss, problem.clients(), setting_of(row))


def check(row: Row, truth: Result) -> None:
    problem, s = PROBLEM_OF[row["task"]], setting_of(row)
    kind = KINDS[row["backend"]]
    ours = run_vecfl(problem.build(), problem.loss, problem.clients(), s, **kind)
    ran = [tuple(m.get(f"system/{how}") for how in ("fused", "by_vmap")) for m in ours.metrics]
    stacked = kind["backend"].startswith("stacked")
    assert set(ran) == {LAYERS[row["task"]] if stacked else (None, None)}
    for t in range(s.rounds):
        close = partial(
            torch.testing.assert_close, rtol=1e-9, atol=1e-12, msg=lambda m: f"{row}: {m}"
        )
        close(ours.models[t], truth.models[t])
        close(ours.metrics[t]["train/loss"], truth.loss[t], equal_nan=True)
        assert s.adaptive is None or ours.metrics[t]["train/mu"] == pytest.approx(truth.mu[t])
        sent, right = by_client(ours.updates[t]), sorted(truth.updates[t], key=order)
        assert [k for k, _, _ in sent] == [k for k, _, _ in right]
        for (_, row_k, weight_k), (_, update, weight) in zip(sent, right, strict=True):
            close(row_k, update)
            assert weight_k == pytest.approx(weight, rel=1e-12), row
        sent_by_all = [(u, w) for _, u, w in truth.updates[t]]
        check_geometry(ours.metrics[t], sent_by_all, AGGREGATORS[s.aggregator], close)
        if s.algorithm == "habit":
            habits, visits = zip(*truth.habits[t], strict=True)
            close(ours.rows[t]["habit"], torch.stack(habits))
            assert ours.rows[t]["visits"].tolist() == list(visits), row


def check_geometry(
    metrics: dict, sent: list[tuple[Tensor, float]], mean_of: Any, close: Any
) -> None:
    """Norms of the clients that count, and their cosines with what the server makes of them."""
    counted = [(update, weight) for update, weight in sent if weight > 0]
    if not counted:
        assert metrics["update/sampled"] == 0
        return
    weights = torch.tensor([w for _, w in counted], dtype=torch.float64)
    mean = mean_of(torch.stack([u for u, _ in counted]), weights)
    norms = torch.stack([u.norm() for u, _ in counted])
    close(metrics["update/aggregate_norm"], float(mean.norm()))
    close(metrics["update/norm_mean"], float(norms.mean()))
    close(metrics["update/norm_sd"], float(norms.std(correction=0)))
    close(metrics["update/norm_max"], float(norms.max()))
    cosines = [float(u @ mean / (u.norm() * mean.norm())) for u, _ in counted if u.any()]
    assert metrics["update/sampled"] == len(cosines)
    close(metrics["update/cosine_mean"], sum(cosines) / len(cosines))
    close(metrics["update/cosine_min"], min(cosines))


def order(update: tuple[int, Tensor, float]) -> tuple[int, list[float]]:
    """By client; updates of one client by their numbers."""
    return update[0], update[1].tolist()


def by_client(sent: dict[int, list[tuple[Tensor, float]]]) -> list[tuple[int, Tensor, float]]:
    """What clients sent, as the oracle tells it, in `order`."""
    return sorted(((k, *one) for k, several in sent.items() for one in several), key=order)


@pytest.mark.parametrize("row", sum(COVERS, []), ids=lambda row: "-".join(row.values()))
def test_pairwise_cover(row: Row) -> None:
    check(row, truth_of(row))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("task", PROBLEM_OF)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_whole_product(algorithm: str, task: str) -> None:
    seen = set()
    backends = (BACKENDS if task in TASKS else {}) | (STACKED if task in DENSE | RECURRENT else {})
    for optimizer, batches, weights, cohort in product(OPTIMIZERS, BATCHES, WEIGHTS, COHORTS):
        row = {"algorithm": algorithm, "optimizer": optimizer, "task": task}
        row |= {"batches": batches, "weights": weights, "cohort": cohort}
        if (key := repr(setting_of(row))) in seen:  # what fedsgd does not take makes no new row
            continue
        seen.add(key)
        truth = truth_of(row)
        for backend in backends:
            check(row | {"backend": backend}, truth)


def test_cover_holds_every_pair() -> None:
    for table, cover in zip(TABLES, COVERS, strict=True):
        for (a, left), (b, right) in combinations(table.items(), 2):
            seen = {(row[a], row[b]) for row in cover}
            assert seen == set(product(left, right)), (a, b)


@pytest.mark.parametrize("kind", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("case", SOME_EXAMPLES, ids=lambda case: case.name)
def test_hand_derived_values(case, kind: dict[str, Any]) -> None:
    run = run_vecfl(
        case.module(),
        case.loss_function,
        case.clients,
        case.setting,
        **kind,
        dtype=torch.float32,
    )
    for model, metrics, expected, loss in zip(
        run.models, run.metrics, case.expected, case.loss, strict=True
    ):
        for name, value in expected.items():
            assert model[name].item() == pytest.approx(value, rel=1e-5), name
        assert metrics["train/loss"] == pytest.approx(loss, rel=1e-5, nan_ok=True)
        assert metrics["train/dropped_clients"] == len(case.dropped)
