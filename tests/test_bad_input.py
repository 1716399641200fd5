"""Bad input is refused with one line that names the thing and the remedy: tested as a whole."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vecfl
from vecfl import Batches, FederatedDataset, InputError, Simulation, Task, fedavg, fedprox, fedsgd
from vecfl.algorithms import Algorithm
from vecfl.engine import LocalRule

ONE = Batches(1)
LABELS = [0, 1, 2, 1, 0]
NAMES = ["ann", "ann", "bob", "bob", "bob"]


def data(y: Any = LABELS, **columns: Any) -> FederatedDataset:
    """Two clients with 2 and 3 examples."""
    columns = {"x": torch.zeros(5, 4), "y": torch.as_tensor(y)} | columns
    return FederatedDataset(columns, torch.tensor([0, 2, 5]))


def simulate(given: FederatedDataset | None = None, **kind: Any) -> Simulation:
    """A simulation of these data, with a task that was tried on good ones."""
    task = Task(nn.Linear(4, 3), vecfl.cross_entropy, example=data().examples(2))
    sampler, algorithm = kind.pop("sampler", vecfl.everyone()), kind.pop("algorithm", None)
    algorithm = algorithm or fedavg(lr=0.1, batches=ONE)
    return Simulation(task, given or data(), algorithm, sampler, **kind)


def spoilt(value: float) -> dict[str, Tensor]:
    x = torch.zeros(5, 4)
    x[3, 1] = value
    return {"x": x, "y": torch.tensor(LABELS)}


def without_bias() -> None:
    """A rule with a bias and a `begin` that knows none."""
    plain = fedavg(lr=0.1, batches=ONE)
    rule = LocalRule(vecfl.sgd(), ONE, lr=0.1, bias=True)
    algorithm = Algorithm("lost", rule, plain.init, plain.begin, plain.upload, plain.server)
    sim = simulate(algorithm=algorithm)
    sim.round(sim.start())


SEED = "must be an integer in [0, 2^63), not"
CLEAN = "clean it, or build FederatedDataset(columns, offsets), which does not look at values"
OUT_OF_RANGE = "is out of range: the model has 3 outputs, so labels are 0 to 2"
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "columns of two lengths": (
        lambda: data(y=LABELS[:4]),
        "column 'y' has 4 examples, but column 'x' has 5",
    ),
    "columns of two lengths, one client": (
        lambda: FederatedDataset.from_clients({"ann": {"x": torch.zeros(2, 4), "y": [0, 1, 2]}}),
        "client 'ann': column 'y' has 3 examples, but column 'x' has 2",
    ),
    "label too large": (
        lambda: simulate(data(y=[0, 1, 2, 3, 0])),
        f"column 'y': label 3 of example 3 {OUT_OF_RANGE}",
    ),
    "negative label": (
        lambda: simulate(data(y=[0, 1, -1, 3, 0])),
        f"column 'y': label -1 of example 2 {OUT_OF_RANGE}",
    ),
    "label that is ignored in sequences only": (
        lambda: simulate(data(y=[0, 1, 2, 1, -100])),
        f"column 'y': label -100 of example 4 {OUT_OF_RANGE}",
    ),
    "label of the evaluation data": (
        lambda: (s := simulate()).evaluate(s.start(), dict(data(y=[0, 1, 2, 1, 7]).columns)),
        f"column 'y': label 7 of example 4 {OUT_OF_RANGE}",
    ),
    "float labels": (
        lambda: simulate(data(y=[0.0, 1.0, 2.0, 1.0, 0.0])),
        "column 'y' is torch.float32; cross_entropy needs integer labels: y.long()",
    ),
    "nan in features": (
        lambda: FederatedDataset.from_arrays(spoilt(math.nan), NAMES),
        f"column 'x', client 'bob', example 1: NaN or Inf; {CLEAN}",
    ),
    "inf in features": (
        lambda: FederatedDataset.from_clients([spoilt(-math.inf)]),
        f"column 'x', client 0, example 3: NaN or Inf; {CLEAN}",
    ),
    "no examples, arrays": (
        lambda: FederatedDataset.from_arrays({"x": [], "y": []}, []),
        "empty dataset: no examples in columns ['x', 'y']",
    ),
    "no examples, clients": (
        lambda: FederatedDataset.from_clients([{"x": []}, {"x": []}]),
        "empty dataset: none of 2 clients has an example",
    ),
    "no clients": (
        lambda: FederatedDataset.from_clients({}),
        "no clients: expected {client id: {column: array}}, got none",
    ),
    "nothing to evaluate": (
        lambda: (s := simulate()).evaluate(s.start(), {"x": torch.zeros(0, 4), "y": torch.ones(0)}),
        "nothing to evaluate: the evaluation data have no example",
    ),
    "an evaluation with the name of other metrics": (
        lambda: (s := simulate()).evaluate(s.start(), s.data.columns, "train"),
        "name: expected a name for these metrics without '/', and not train, server, comm, late, "
        "system, update, privacy, "
        "got 'train'",
    ),
    "an evaluation of clients with a path for a name": (
        lambda: (s := simulate()).evaluate_clients(s.start(), name="a/b"),
        "name: expected a name for these metrics without '/', and not train, server, comm, late, "
        "system, update, privacy, "
        "got 'a/b'",
    ),
    "a column is missing": (
        lambda: simulate(FederatedDataset({"z": torch.zeros(5, 4)}, torch.tensor([0, 2, 5]))),
        "the data have no column 'x'; they have ['z']",
    ),
    "a place for the data that is none": (
        lambda: simulate(resident="disk"),
        "resident must be True, False or None (what fits), not 'disk'",
    ),
    "cohort above the population": (
        lambda: simulate(sampler=vecfl.uniform(3)),
        "a cohort of 3 clients is larger than the population of 2; choose at most 2",
    ),
    "cohort of nobody": (lambda: vecfl.uniform(0), "a cohort has at least 1 client, not 0"),
    "batch size 0": (lambda: Batches(0), "Batches(size=0): must be an integer of at least 1"),
    "half a step": (
        lambda: Batches(1, steps=0.5),
        "Batches(steps=0.5): must be an integer of at least 1",
    ),
    "epochs and steps": (
        lambda: Batches(1, epochs=1, steps=1),
        "Batches takes epochs or steps, not both",
    ),
    "unknown last": (
        lambda: Batches(1, last="skip"),
        "Batches(last='skip'): must be keep, drop or wrap",
    ),
    "full batch without its end": (
        lambda: Batches(1, full=True, last="drop"),
        "Batches(last='drop'): a full batch keeps every example",
    ),
    "slots 0": (lambda: simulate(slots=0), "slots must be an integer of at least 1, not 0"),
    "slots 1.5": (lambda: simulate(slots=1.5), "slots must be an integer of at least 1, not 1.5"),
    "unknown backend": (
        lambda: simulate(backend="jax"),
        "backend 'jax' is not known; choose loop, vmap, stacked or auto",
    ),
    "negative lr": (lambda: fedavg(lr=-1, batches=ONE), "lr must be at least 0 and finite, not -1"),
    "nan lr": (
        lambda: fedavg(lr=math.nan, batches=ONE),
        "lr must be at least 0 and finite, not nan",
    ),
    "negative mu": (lambda: fedprox(lr=1, mu=-1, batches=ONE), "mu must be at least 0, not -1"),
    "negative clip": (
        lambda: fedavg(lr=1, clip=-1, batches=ONE),
        "clip must be positive or None, not -1",
    ),
    "clip 0": (lambda: fedavg(lr=1, clip=0, batches=ONE), "clip must be positive or None, not 0"),
    "beta 1": (lambda: vecfl.momentum(1.0), "momentum(beta) must be in [0, 1), not 1.0"),
    "betas of Adam": (lambda: vecfl.adam((0.9, -1)), "adam(betas) must be in [0, 1), not -1"),
    "weight cap 0": (lambda: vecfl.capped(0), "capped(limit=0): must be positive"),
    "negative seed": (lambda: simulate(seed=-1), f"seed {SEED} -1"),
    "large seed": (lambda: simulate(seed=2**63), f"seed {SEED} 9223372036854775808"),
    "fractional seed": (lambda: simulate(seed=1.5), f"seed {SEED} 1.5"),
    "negative sample seed": (lambda: simulate(sample_seed=-1), f"sample_seed {SEED} -1"),
    "a client drawn too often": (
        lambda: simulate(sampler=lambda eligible, seed, round: torch.ones(1025, dtype=torch.int64)),
        "the sampler drew client 1 1025 times in round 1; "
        "a client has random numbers for 1024 of them",
    ),
    "fedsgd without a rate": (lambda: fedsgd(), "fedsgd takes lr or server, one of the two"),
    "fedsgd with two rates": (
        lambda: fedsgd(lr=1, server=vecfl.server_sgd()),
        "fedsgd takes lr or server, one of the two",
    ),
    "a bias that nobody gives": (
        without_bias,
        "the rule has a bias, but the algorithm's begin gives none",
    ),
}


@pytest.mark.parametrize("build, message", BAD.values(), ids=BAD)
def test_bad_input(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        build()
    assert str(caught.value) == message


def test_input_errors_are_value_errors() -> None:
    assert issubclass(InputError, ValueError)


def test_the_ends_of_what_is_allowed() -> None:
    sim = simulate(seed=2**63 - 1, sample_seed=0, slots=1, sampler=vecfl.uniform(2))
    assert sorted(sim.cohort(0).tolist()) == [0, 1]
    rule = fedprox(lr=0, mu=0, clip=math.inf, batches=ONE).rule
    assert (rule.lr, rule.mu, rule.clip) == (0, 0, math.inf)


def characters(last: int) -> Simulation:
    x = torch.tensor([[0, 1], [2, 3], [4, last]])
    data = FederatedDataset.from_arrays({"x": x, "y": torch.tensor([0, 1, 0])}, [0, 0, 1])
    module = nn.Sequential(nn.Embedding(6, 2), nn.Flatten(), nn.Linear(4, 2))
    task = Task(module, vecfl.cross_entropy, example=data.examples(2))
    return Simulation(task, data, fedavg(lr=0.1, batches=ONE), vecfl.everyone())


@pytest.mark.parametrize("index", [6, -1, 5000])
def test_an_index_out_of_an_embedding_is_refused(index: int) -> None:
    characters(5)
    with pytest.raises(InputError) as caught:
        characters(index)
    assert str(caught.value) == (
        f"column 'x' holds index {index}, out of range for an nn.Embedding of 6: indices are 0 to 5"
    )


@pytest.mark.parametrize("positions", [[-1, 0], [0, 99]])
def test_a_sampler_out_of_the_population_is_refused(positions: list[int]) -> None:
    with pytest.raises(InputError, match=r"^the sampler gave \[.*in round 1; clients are int64"):
        simulate(sampler=lambda eligible, seed, round: torch.tensor(positions))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=r"^dtype must be torch.float32 or torch.float64, not"):
        simulate(dtype=dtype)


def test_a_schedule_that_leaves_the_range_is_refused_in_its_round() -> None:
    sim = simulate(algorithm=fedavg(lr=lambda t: 0.1 - t, batches=ONE))
    state, _ = sim.round(sim.start())
    with pytest.raises(InputError, match=r"^lr is -0.9 in round 2: must be at least 0 and finite"):
        sim.round(state)


def test_weights_too_small_for_exact_sums_are_refused_in_their_round() -> None:
    """5 examples: steps of 2^-41; two clients are rounded by more than 2^-24 of 5e-7."""
    weights = lambda done: done.examples * 1e-7  # noqa: E731
    sim = simulate(algorithm=fedavg(lr=0.1, batches=ONE, weights=weights), exact_sums=True)
    with pytest.raises(InputError, match="^exact_sums: weights add up to 5e-07, too little for"):
        sim.round(sim.start())


@pytest.mark.parametrize(("factor", "told"), [(1.0, 0), (1e6, 1)])
def test_losses_beyond_exact_sums_are_told(
    factor: float, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    """5 examples of loss about ln 3 are far below 2^10; times 1e6 they are not. lr 0: no update."""

    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        sums, weight = vecfl.cross_entropy(output, batch)
        return factor * sums, weight

    task = Task(nn.Linear(4, 3), loss, example=data().examples(2))
    sim = Simulation(task, data(), fedavg(lr=0.0, batches=ONE), vecfl.everyone(), exact_sums=True)
    sim.round(sim.start())
    assert caplog.text.count("updates or losses are too large for exact sums") == told


def test_what_vecfl_has_not_made_is_named() -> None:
    with pytest.raises(InputError, match=r"^optimizer must be made by vecfl, such as sgd\(\), not"):
        fedavg(lr=0.1, batches=ONE, optimizer=vecfl.adam)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^batches must be made by vecfl, such as Batches\(10\)"):
        fedavg(lr=0.1, batches=8)  # type: ignore[arg-type]


def test_a_lazy_module_and_a_metric_called_loss_are_refused() -> None:
    example = {"x": torch.zeros(2, 3), "y": torch.tensor([0, 1])}
    with pytest.raises(InputError, match="^the module is lazy: call it once on a batch"):
        Task(nn.LazyLinear(2), vecfl.cross_entropy, example=example)
    with pytest.raises(InputError, match="^no metric can be called 'loss'"):
        Task(nn.Linear(3, 2), vecfl.cross_entropy, {"loss": vecfl.accuracy}, example=example)


def sparse() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Flatten(), nn.Linear(6, 2))


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize(
    "module, what",
    [
        (
            sparse,
            "module '0' (Embedding) gives sparse gradients, which no row of clients can add up; "
            "use sparse=False",
        ),
        (
            lambda: nn.Sequential(torch.jit.script(nn.Linear(3, 2))),
            "module '0' is compiled by torch.jit; use the module it is of",
        ),
        (
            lambda: torch.jit.trace(nn.Linear(3, 2), torch.zeros(2, 3)),
            "the module is compiled by torch.jit; use the module it is of",
        ),
        (
            lambda: nn.utils.weight_norm(nn.Linear(3, 2)),
            "the module (Linear) has torch.nn.utils.weight_norm, which cannot be copied; use "
            "torch.nn.utils.parametrizations.weight_norm",
        ),
    ],
    ids=["sparse", "script", "trace", "weight_norm"],
)
def test_modules_that_cannot_be_copied_hooked_or_added_up(
    module: Callable[[], nn.Module], what: str
) -> None:
    x = torch.zeros(2, 3, dtype=torch.int64 if module is sparse else torch.float32)
    with pytest.raises(InputError) as error:
        Task(module(), vecfl.cross_entropy, example={"x": x, "y": torch.tensor([0, 1])})
    assert str(error.value) == what


def test_integers_of_numpy_are_integers_and_truth_values_are_none() -> None:
    assert Batches(np.int64(4)).size == 4
    assert simulate(seed=np.int64(3), sampler=vecfl.uniform(np.int64(2))).seed == 3
    with pytest.raises(InputError):
        Batches(True)
