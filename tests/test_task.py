"""Which modules, losses and data a task takes, what it says to the others, and what it makes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from vecfl import InputError, Task, cross_entropy
from vecfl.losses import Batch, Pair, Score
from vecfl.modules import KeyedDropout

G = torch.Generator().manual_seed(3)
X, SEQUENCE = torch.randn(2, 4, generator=G), torch.randn(2, 6, 4, generator=G)
TOKENS, Y = torch.randint(5, (2, 6), generator=G), torch.tensor([0, 2])
FLAT, LONG = {"x": X, "y": Y}, {"x": SEQUENCE, "y": Y}


class Wrapped(nn.Module):
    """`before(self, x)`, then a linear layer of 4 inputs and 3 classes."""

    def __init__(self, before: Callable[["Wrapped", Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.head = before, nn.Linear(4, 3)
        self.register_buffer("kept", torch.zeros(4))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.before(self, x))


class Recurrent(nn.Module):
    def __init__(self, rnn: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn, self.head = rnn(4, 4, batch_first=True, **options), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(x, x, x)[0][:, -1])


def remember(m: Wrapped, x: Tensor) -> Tensor:
    m.kept = 0.5 * m.kept + 0.5 * x.detach().mean(0)
    return x


def keep_last(m: Wrapped, x: Tensor) -> Tensor:
    m.kept = x[-1].detach()
    return x


def keep_first(m: Wrapped, x: Tensor) -> Tensor:
    m.kept = x[0].detach()
    return x


def count(m: Wrapped, x: Tensor) -> Tensor:
    m.calls += 1
    return x


def deep(m: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity(), m))


def refusal(module: nn.Module, example: Batch, loss: Score = cross_entropy, **options: Any) -> str:
    """The message of a task that is refused; it is one line, and torch's generator is as before."""
    state = torch.get_rng_state()
    with pytest.raises(InputError) as error:
        Task(module, loss, example=example, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------ modules

REFUSED = {
    "batch norm": (
        lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)),
        FLAT,
        "module '0' (BatchNorm1d) uses statistics of the batch",
        "use vecfl.batchnorm_to_groupnorm(module)",
    ),
    "batch norm alone": (
        lambda: nn.BatchNorm1d(4),
        FLAT,
        "the module (BatchNorm1d) uses statistics of the batch",
        "use vecfl.batchnorm_to_groupnorm(module)",
    ),
    "lstm dropout": (
        lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.5),
        LONG,
        "module 'rnn' draws from torch's random generator",
        "set its dropout to 0",
    ),
    "attention dropout": (
        lambda: Attention(0.5),
        LONG,
        "module 'attend' draws from torch's random generator",
        "set its dropout to 0",
    ),
    "functional dropout": (
        lambda: deep(Wrapped(lambda m, x: F.dropout(x, 0.5, m.training))),
        FLAT,
        "module '1.1' draws from torch's random generator",
        "use nn.Dropout layers",
    ),
    "functional dropout of the module itself": (
        lambda: Wrapped(lambda m, x: F.dropout(x, 0.5, m.training)),
        FLAT,
        "the module draws from torch's random generator",
        "use nn.Dropout layers",
    ),
    "mixing": (
        lambda: Wrapped(lambda m, x: x - x.mean(0)),
        FLAT,
        "the module, the loss or augment mixes the examples of a batch",
        "keep examples apart",
    ),
    "instance norm": (
        lambda: nn.Sequential(
            nn.InstanceNorm1d(6, track_running_stats=True), nn.Flatten(), nn.Linear(24, 3)
        ),
        LONG,
        "buffer '0.running_mean' is computed from the examples of a batch",
        "GroupNorm",
    ),
    "moving mean of data": (
        lambda: deep(Wrapped(remember)),
        FLAT,
        "buffer '1.1.kept' is computed from the examples of a batch",
        "GroupNorm",
    ),
    "the last example": (
        lambda: deep(Wrapped(keep_last)),
        FLAT,
        "buffer '1.1.kept' is computed from the examples of a batch",
        "GroupNorm",
    ),
    "the first example": (
        lambda: deep(Wrapped(keep_first)),
        FLAT,
        "buffer '1.1.kept' is computed from the examples of a batch",
        "GroupNorm",
    ),
    "failing": (
        lambda: deep(nn.Linear(5, 3)),
        FLAT,
        "module '1.1' failed on the example batch {'x': [2, 4]}: ",
        "cannot be multiplied (2x4 and 5x3)",
    ),
    "failing itself": (
        lambda: nn.Linear(5, 3),
        FLAT,
        "the module failed on the example batch {'x': [2, 4]}: ",
        "cannot be multiplied (2x4 and 5x3)",
    ),
    "too many dropout calls": (
        lambda: nn.Sequential(*(nn.Dropout(0.5) for _ in range(257)), nn.Linear(4, 3)),
        FLAT,
        "module '256' failed on the example batch",
        "more than 256 dropout calls",
    ),
    "frozen": (
        lambda: nn.Linear(4, 3).requires_grad_(False),
        FLAT,
        "the module has no trainable parameter",
        "requires_grad=False",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_modules(case: tuple) -> None:
    build, example, start, remedy = case
    message = refusal(build(), example)
    assert message.startswith(start) and remedy in message


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(12, 3))


def norms() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Linear(4, 3))


SPECTRAL = "1.parametrizations.weight.0"
ACCEPTED: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "attention": (Attention, SEQUENCE, []),
    "embedding": (embedding, TOKENS, []),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCE, []),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCE, []),
    "norms": (norms, X, []),
    "weight norm": (lambda: deep(parametrizations.weight_norm(nn.Linear(4, 3))), X, []),
    "spectral norm": (
        lambda: nn.Sequential(nn.Identity(), parametrizations.spectral_norm(nn.Linear(4, 3))),
        X,
        [f"{SPECTRAL}._u", f"{SPECTRAL}._v"],  # power iteration goes on in every step
    ),
    "counter": (lambda: Wrapped(count), X, ["calls"]),
    "constant buffers": (lambda: Wrapped(lambda m, x: x + m.kept), X, []),
    "dropout": (lambda: deep(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))), X, []),
    "dropout of nearly all": (
        lambda: nn.Sequential(nn.Dropout(1 - 1e-6), nn.Linear(4, 3)),
        X,
        [],
    ),
}


@pytest.mark.parametrize("case", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted_modules_and_their_changing_buffers(case: tuple) -> None:
    build, x, buffers = case
    task = Task(build(), cross_entropy, example={"x": x, "y": Y})
    assert [e.name for e in task.layout.buffers] == buffers
    parameters = [name for name, _ in task.module.named_parameters()]
    assert [e.name for e in task.layout.params] == parameters


def test_the_users_module_is_not_touched() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), Wrapped(count)).eval()
    module[0].requires_grad_(False)
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    task = Task(module, cross_entropy, example=FLAT)
    for value in task.module.state_dict().values():
        value.add_(1)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert type(module[1]) is nn.Dropout and not any(m.training for m in module.modules())
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert task.module.training and isinstance(task.module[1], KeyedDropout)
    assert [e.name for e in task.layout.params] == ["2.head.weight", "2.head.bias"]


# ------------------------------------------------------------------ losses, metrics, examples


def pair_of(value: Callable[[Tensor], object]) -> Callable[[Tensor, Batch], object]:
    return lambda output, batch: value(output)


WRONG_PAIRS = {
    "scalar": (pair_of(lambda o: o.mean()), "not [[]]"),
    "scalar with weight": (pair_of(lambda o: (o.mean(), None)), "not [[], None]"),
    "one per class": (pair_of(lambda o: (o, None)), "not [[2, 3], None]"),
    "weight per class": (pair_of(lambda o: (o.sum(1), o)), "not [[2], [2, 3]]"),
    "number": (pair_of(lambda o: (1.0, None)), "not ['float', None]"),
    "list": (pair_of(lambda o: [o.sum(1), None]), "not ['list']"),
    "no value": (pair_of(lambda o: (None, None)), "not [None, None]"),
    "no value with weight": (pair_of(lambda o: (None, o.sum(1))), "not [None, [2]]"),
    "three": (pair_of(lambda o: (o.sum(1), None, None)), "not [[2], None, None]"),
}


@pytest.mark.parametrize("case", WRONG_PAIRS.values(), ids=WRONG_PAIRS)
def test_what_a_loss_and_a_metric_must_give(case: tuple) -> None:
    score, got = case
    rest = "(sum [B], weight [B] or None), one number per example (B = 2 here)"
    message = refusal(nn.Linear(4, 3), FLAT, score)
    assert message.startswith(f"the loss must give {rest}, {got}")
    message = refusal(nn.Linear(4, 3), FLAT, metrics={"error": score})
    assert message.startswith(f"the metric 'error' must give {rest}, {got}")


def test_a_loss_that_squeezes_a_batch_of_one_is_refused() -> None:
    def squeezed(output: Tensor, batch: Batch) -> Pair:
        return output.sum(1, keepdim=True).squeeze(), None

    assert "(B = 1 here), not [[], None]" in refusal(nn.Linear(4, 3), FLAT, squeezed)


def test_a_loss_that_fails_is_named_with_the_output_it_saw() -> None:
    message = refusal(nn.Linear(4, 3), {"x": X, "z": Y})
    assert message == "the loss failed on output [2, 3]: 'y'"
    wide = {"x": X, "y": torch.tensor([0, 3])}
    assert refusal(nn.Linear(4, 3), wide).startswith("the loss failed on output [2, 3]: Target 3")


def test_example_batches_that_do_not_do() -> None:
    one = {"x": X[:1], "y": Y[:1]}
    assert refusal(nn.Linear(4, 3), one) == "the example batch needs two examples or more"
    message = refusal(nn.Linear(4, 3), FLAT, inputs=("x", "mask"))
    assert message == "the data have no column 'mask'; they have ['x', 'y']"


# ------------------------------------------------------------------ data


def test_prepare_scales_bytes_and_casts_floats() -> None:
    task = Task(nn.Linear(4, 3), cross_entropy, example=FLAT)
    columns = {
        "x": torch.tensor([[0, 51, 102, 255]], dtype=torch.uint8),
        "y": torch.tensor([2]),
        "mask": torch.tensor([7], dtype=torch.uint8),  # no input: it keeps its values
        "target": torch.tensor([0.1], dtype=torch.float64),
    }
    ready = task.prepare(columns)
    torch.testing.assert_close(ready["x"], torch.tensor([[0, 0.2, 0.4, 1]]))
    assert ready["y"] is columns["y"] and ready["mask"] is columns["mask"]
    assert torch.equal(ready["target"], torch.tensor([0.1], dtype=torch.float32))
    double = task.to("cpu", torch.float64).prepare(columns)
    assert double["target"].item() == 0.1
    assert torch.equal(double["x"], columns["x"].double() * (1 / 255))
    raw = Task(nn.Linear(4, 3), cross_entropy, example=FLAT, scale=1.0)
    assert torch.equal(raw.prepare(columns)["x"], columns["x"].float())


def test_inputs_are_given_in_their_order() -> None:
    class Divide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, top: Tensor, bottom: Tensor) -> Tensor:
            return self.one * top / bottom

    batch = {"a": torch.full((2,), 3.0), "b": torch.full((2,), 6.0)}
    task = Task(Divide(), lambda o, b: (o, None), example=batch, inputs=("b", "a"))
    assert task.output(batch).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([0, 1, 3], "column 'y': label 3 of example 2 is out of range: the model has 3 outputs"),
        ([0, -1, 2], "column 'y': label -1 of example 1 is out of range"),
        ([-100, 1, 2], "column 'y': label -100 of example 0 is out of range"),
        ([0.0, 1.0, 2.0], "column 'y' is torch.float32; cross_entropy needs integer labels"),
    ],
)
def test_check_refuses_labels(y: list, message: str) -> None:
    task = Task(nn.Linear(4, 3), cross_entropy, example=FLAT)
    x = torch.linspace(-1, 1, 12).view(3, 4)
    task.check({"x": x, "y": torch.tensor([0, 1, 2])})
    with pytest.raises(InputError) as error:
        task.check({"x": x, "y": torch.tensor(y)})
    assert str(error.value).startswith(message)


def test_check_of_sequences_and_of_missing_columns() -> None:
    y = torch.zeros(2, 6, dtype=torch.int64)
    task = Task(nn.Linear(4, 3), cross_entropy, example={"x": SEQUENCE, "y": y})
    y[1, 2] = -100  # a position without label
    task.check({"x": SEQUENCE, "y": y})
    y[1, 4] = 5
    with pytest.raises(InputError, match="label 5 of example 1 is out of range: .* 0 to 2"):
        task.check({"x": SEQUENCE, "y": y})
    with pytest.raises(InputError, match=r"the data have no column 'x'; they have \['y'\]"):
        task.check({"y": y})


def test_check_leaves_the_task_as_it_is() -> None:
    module = nn.Sequential(nn.Dropout(0.5), Wrapped(count))
    task = Task(module, cross_entropy, example=FLAT)
    task.check(FLAT)
    assert task.module.training and int(task.module[1].calls) == 0


# ------------------------------------------------------------------ copies


def test_copies_are_independent_and_keep_their_own_draws() -> None:
    module = nn.Sequential(nn.Dropout(0.5), Wrapped(count), nn.Sequential(nn.Dropout(0.1)))
    task = Task(module, cross_entropy, example=FLAT)
    before = task.layout.flatten(task.module)
    for new in (task.to("cpu", torch.float64), copy.deepcopy(task)):
        drops = [m for m in new.module.modules() if isinstance(m, KeyedDropout)]
        assert len(drops) == 2 and all(m.draws is new.draws for m in drops)
        assert new.draws is not task.draws
        new.draws.seed = 5
        new.module[1].head.weight.data.zero_()
        new.module[1].calls += 3
    assert task.draws.seed == 0 and torch.equal(task.layout.flatten(task.module), before)


def test_to_casts_floats_and_keeps_integers() -> None:
    task = Task(deep(Wrapped(count)), cross_entropy, example=FLAT)
    new = task.to("cpu", torch.float64)
    assert {e.dtype for e in new.layout.params} == {torch.float64}
    assert [(e.name, e.dtype) for e in new.layout.buffers] == [("1.1.calls", torch.int64)]
    assert new.layout.flatten(new.module).dtype == torch.float64
    assert {e.dtype for e in task.layout.params} == {torch.float32}


def test_keyed_says_whether_a_step_draws() -> None:
    plain = Task(nn.Linear(4, 3), cross_entropy, example=FLAT)
    drops = Task(nn.Sequential(nn.Dropout(), nn.Linear(4, 3)), cross_entropy, example=FLAT)
    assert not plain.keyed and drops.keyed


def test_a_column_that_is_no_tensor_is_named() -> None:
    example = {"x": torch.zeros(2, 4), "y": [0, 1]}
    with pytest.raises(InputError, match="^column 'y' is a list, not a tensor; use torch.as_tens"):
        Task(nn.Linear(4, 3), cross_entropy, example=example)  # type: ignore[dict-item]


# ------------------------------------------------------------------ what a trial must see


class Checkpointed(nn.Module):
    """Its backward pass runs the forward pass again, dropout included."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Remembering(nn.Linear):
    """Keeps a count that is no buffer."""

    count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x) * self.count


class Locked(nn.Dropout):
    """A dropout with a forward pass of its own, which draws from torch's generator."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full_like(x[:1], 0.5))


def test_dropout_in_a_checkpoint_is_refused() -> None:
    assert refusal(Checkpointed(), FLAT).startswith("the backward pass calls dropout again")


def test_state_outside_of_buffers_is_refused() -> None:
    assert "state outside of its buffers" in refusal(Remembering(4, 3), FLAT)


def test_subclasses_of_dropout_keep_their_forward() -> None:
    module = nn.Sequential(Locked(0.5), nn.Linear(4, 3))
    assert refusal(module, FLAT).startswith("module '0' draws from torch's random generator")


def test_a_loss_that_reads_the_module_is_refused() -> None:
    module = nn.Linear(4, 3)

    def penalised(output: Tensor, batch: Batch) -> Pair:
        value, _ = cross_entropy(output, batch)
        return value + module.weight.square().sum(), None

    assert refusal(module, FLAT, penalised).startswith("the loss reads parameters of the module")


def test_a_loss_without_parameters_is_refused() -> None:
    def constant(output: Tensor, batch: Batch) -> Pair:
        return torch.ones(len(output)), None

    expected = "the loss depends on no trainable parameter of the module"
    assert refusal(nn.Linear(4, 3), FLAT, constant) == expected


def test_a_weight_that_mixes_examples_is_refused() -> None:
    def relative(output: Tensor, batch: Batch) -> Pair:
        value, _ = cross_entropy(output, batch)
        return value, value / value.sum()

    assert "mixes the examples" in refusal(nn.Linear(4, 3), FLAT, relative)


def test_gradients_that_count_examples_are_refused() -> None:
    module = nn.Embedding(5, 3, scale_grad_by_freq=True)
    assert "mixes the examples" in refusal(module, {"x": torch.tensor([1, 2]), "y": Y})


def test_integer_weights_and_two_scaled_inputs_are_refused() -> None:
    def counted(output: Tensor, batch: Batch) -> Pair:
        return cross_entropy(output, batch)[0], torch.ones(len(output), dtype=torch.int64)

    expected = "the loss gives torch.int64 weights; weights are floats"
    assert refusal(nn.Linear(4, 3), FLAT, counted) == expected
    images = {"x": X.byte(), "mask": X.byte(), "y": Y}
    message = refusal(nn.Bilinear(4, 4, 3), images, inputs=("x", "mask"))
    assert message.startswith("inputs 'x' and 'mask' are both uint8")
