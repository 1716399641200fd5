"""LSTM and GRU against torch's: values and gradients, alone and of many clients."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_sequence

import vecfl
from tests.models.rounds import trained
from vecfl.engine import make_backend
from vecfl.models import GRU, LSTM, CharGRU, CharLSTM
from vecfl.models.recurrent import layers

KINDS = [(LSTM, nn.LSTM), (GRU, nn.GRU)]
CLIENTS, BATCH, LENGTH, INPUTS, HIDDEN = 3, 2, 5, 3, 4


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def score(results: Any) -> Tensor:
    """A number that depends on every output and every last state, each in its own way."""
    out, last = results
    states = last if isinstance(last, tuple) else (last,)
    parts = [out.sin().sum(), *(((k + 2) * s).cos().sum() for k, s in enumerate(states))]
    return torch.stack(parts).sum()


def gradients(module: nn.Module, weights: dict[str, Tensor], *inputs: Any) -> list[Tensor]:
    """Of `score` by weights and inputs, one of which may be the states of an LSTM, by autograd."""
    module.load_state_dict(weights)
    tensors = [t.clone().requires_grad_() for t in flat(inputs)]
    x, *states = tensors
    hx = tuple(states) if len(states) == 2 else states[0] if states else None
    return list(torch.autograd.grad(score(module(x, hx)), [*module.parameters(), *tensors]))


def flat(inputs: tuple[Any, ...]) -> Iterator[Tensor]:
    for one in inputs:
        yield from (one if isinstance(one, tuple) else (one,))


@pytest.mark.parametrize(("ours", "theirs"), KINDS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("layers", "bias"), [(1, True), (2, False)])
@pytest.mark.parametrize("given", [True, False])
def test_clients_get_what_torch_gives_each(
    ours: type[LSTM], theirs: type[nn.LSTM], batch_first: bool, layers: int, bias: bool, given: bool
) -> None:
    """By torch.func all at the same time, and by the module itself, as in the loop backend."""
    options = {"num_layers": layers, "bias": bias, "batch_first": batch_first}
    module, plain = (kind(INPUTS, HIDDEN, **options).double() for kind in (ours, theirs))
    names = [name for name, _ in plain.named_parameters()]
    weights = {
        name: torch.randn(CLIENTS, *p.shape).double() for name, p in plain.named_parameters()
    }
    shape = (BATCH, LENGTH) if batch_first else (LENGTH, BATCH)
    inputs: tuple[Any, ...] = (torch.randn(CLIENTS, *shape, INPUTS).double(),)
    if given:
        states = torch.randn(2, CLIENTS, layers, BATCH, HIDDEN).double().unbind()
        inputs += (states if theirs is nn.LSTM else states[0],)

    def value(weights: dict[str, Tensor], inputs: tuple[Any, ...]) -> Tensor:
        return score(functional_call(module, weights, inputs))

    by_weights, by_inputs = vmap(grad(value, argnums=(0, 1)))(weights, inputs)
    together = [*(by_weights[name] for name in names), *flat(by_inputs)]
    for k in range(CLIENTS):
        own = {name: w[k] for name, w in weights.items()}
        args = [tuple(t[k] for t in one) if isinstance(one, tuple) else one[k] for one in inputs]
        right = gradients(plain, own, *args)
        for name, a, b in zip([*names, *"xhc"][: len(right)], together, right, strict=True):
            torch.testing.assert_close(a[k], b, rtol=1e-9, atol=1e-12, msg=name)
        for a, b in zip(gradients(module, own, *args), right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), KINDS)
def test_values_and_shared_inputs(
    ours: type[LSTM], theirs: type[nn.LSTM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One input for all clients, which torch.func does not wrap, and one module for all inputs."""
    ran = []
    monkeypatch.setattr(
        "vecfl.models.recurrent.layers", lambda *args: ran.append(args) or layers(*args)
    )
    module, plain = ours(INPUTS, HIDDEN).double(), theirs(INPUTS, HIDDEN).double()
    weights = {n: torch.randn(CLIENTS, *p.shape).double() for n, p in plain.named_parameters()}
    x = torch.randn(CLIENTS, LENGTH, BATCH, INPUTS).double()
    out = vmap(lambda w: functional_call(module, w, (x[0],))[0])(weights)
    for k in range(CLIENTS):
        plain.load_state_dict({name: w[k] for name, w in weights.items()})
        torch.testing.assert_close(out[k], plain(x[0])[0])
    module.load_state_dict(plain.state_dict())
    out = vmap(lambda x: module(x)[0])(x)
    for k in range(CLIENTS):
        torch.testing.assert_close(out[k], plain(x[k])[0])
    assert len(ran) == 2  # not torch's kernels, which torch.func may also call


def test_which_of_both_runs() -> None:
    """torch's kernel of an LSTM is fast on a CPU, that of a GRU in evaluation alone."""
    x = torch.randn(1, 2, INPUTS)
    assert not runs_steps(LSTM(INPUTS, HIDDEN)(x)[0].grad_fn)
    assert runs_steps(GRU(INPUTS, HIDDEN)(x)[0].grad_fn)
    assert not runs_steps(GRU(INPUTS, HIDDEN, bidirectional=True)(x)[0].grad_fn)
    with torch.no_grad():
        module, plain = GRU(INPUTS, HIDDEN), nn.GRU(INPUTS, HIDDEN)
        plain.load_state_dict(module.state_dict())
        assert torch.equal(module(x)[0], plain(x)[0])  # the same kernel: the same bits


def runs_steps(node: Any) -> bool:
    """Whether a function of vecfl is in the graph that ends here."""
    if node is None:
        return False
    return "Steps" in node.name() or any(runs_steps(before) for before, _ in node.next_functions)


@pytest.mark.parametrize(("ours", "theirs"), KINDS)
@pytest.mark.parametrize(
    ("options", "x"),
    [
        ({"bidirectional": True}, torch.randn(LENGTH, BATCH, INPUTS)),
        ({"num_layers": 2, "bidirectional": True}, torch.randn(LENGTH, BATCH, INPUTS)),
        ({}, torch.randn(LENGTH, INPUTS)),
        ({}, pack_sequence([torch.randn(3, INPUTS), torch.randn(2, INPUTS)])),
    ],
)
def test_what_the_steps_do_not_know_is_torchs(
    ours: type[LSTM], theirs: type[nn.LSTM], options: dict[str, Any], x: Any
) -> None:
    module, plain = ours(INPUTS, HIDDEN, **options), theirs(INPUTS, HIDDEN, **options)
    plain.load_state_dict(module.state_dict())
    got, right = module(x)[0], plain(x)[0]
    if not isinstance(x, Tensor):
        got, right = got.data, right.data
    assert torch.equal(got, right)


def test_projections_are_torchs() -> None:
    module, plain = (kind(INPUTS, HIDDEN, proj_size=2).double() for kind in (LSTM, nn.LSTM))
    plain.load_state_dict(module.state_dict())
    x = torch.randn(LENGTH, BATCH, INPUTS).double()
    assert torch.equal(module(x)[0], plain(x)[0]) and plain(x)[0].shape[-1] == 2


@pytest.mark.parametrize(("ours", "theirs"), KINDS)
def test_second_derivatives_are_right(ours: type[LSTM], theirs: type[nn.LSTM]) -> None:
    module, plain = ours(INPUTS, HIDDEN).double(), theirs(INPUTS, HIDDEN).double()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(LENGTH, BATCH, INPUTS).double()

    def second(module: nn.Module) -> Tensor:
        weights = {name: p.detach() for name, p in module.named_parameters()}

        def value(x: Tensor) -> Tensor:
            return score(functional_call(module, weights, (x,)))

        return grad(lambda x: grad(value)(x).square().sum())(x)

    assert second(plain).abs().max() > 1e-3
    torch.testing.assert_close(second(module), second(plain))


@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_dropout_inside_is_refused(kind: Callable[..., nn.Module]) -> None:
    module = CharLSTM(11, 3, 8)
    module.recurrent = kind(3, 8, 2, batch_first=True, dropout=0.5)
    batch = {"x": torch.randint(0, 11, (2, 6)), "y": torch.randint(0, 11, (2, 6))}
    with pytest.raises(vecfl.InputError, match="module 'recurrent' draws .* set its dropout to 0"):
        vecfl.Task(module, vecfl.cross_entropy, example=batch)


@pytest.mark.parametrize("make", [CharLSTM, CharGRU])
def test_the_vmap_backend_has_nothing_to_warn_of(
    make: type[CharLSTM], caplog: pytest.LogCaptureFixture
) -> None:
    """In float32, where torch's LSTM is an operator that vmap calls once for each client."""
    batch = {"x": torch.randint(0, 11, (2, 6)), "y": torch.randint(0, 11, (2, 6))}
    task = vecfl.Task(make(11, 3, 8), vecfl.cross_entropy, example=batch)
    with caplog.at_level(logging.WARNING, "vecfl"):
        make_backend("vmap", task.to("cpu", torch.float32), batch)
    assert caplog.messages == []


def test_our_layers_train_like_torchs() -> None:
    x, y = torch.randint(0, 11, (2, 7, 6))
    ours = CharGRU(11, 3, 8)
    theirs = CharGRU(11, 3, 8)
    theirs.recurrent = nn.GRU(3, 8, 2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    start, one = trained(ours, x, y, 0.5, "loop")
    _, other = trained(theirs, x, y, 0.5, "loop")
    assert (one - start).abs().max() > 1e-2
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
