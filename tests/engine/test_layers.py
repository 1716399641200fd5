"""Each layer of S clients is S plain layers, in float64: outputs, gradients, and its own step."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from vecfl import InputError
from vecfl.engine.layers import (
    FORMULATIONS,
    ByVmap,
    StackedConvolution,
    StackedLayer,
    stack_layers,
)
from vecfl.engine.layers.affine import StackedLinear
from vecfl.engine.layers.embedding import StackedEmbedding
from vecfl.engine.layers.norm import StackedNorm
from vecfl.engine.layers.recurrent import StackedRecurrent
from vecfl.modules import Draws

S, B, LR = 3, 2, 0.3


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(layer: nn.Module) -> list[Tensor]:
    """A model [S, *shape] for each client, as views of one matrix, as slots have them."""
    sizes = [p.numel() for p in layer.parameters()]
    flat = numbers(S, sum(sizes) + 1, seed=1)  # a row that is longer than the layer
    parts = flat[:, 1:].split(sizes, 1)
    return [part.unflatten(1, p.shape) for part, p in zip(parts, layer.parameters(), strict=True)]


def stacked(layer: nn.Module, kind: type, formulation: str = "") -> Any:
    names = [name for name, _ in layer.named_parameters()]
    made, layers = stack_layers(copy.deepcopy(layer), names, Draws())
    assert type(made) is kind and layers == [made]
    if isinstance(made, StackedConvolution):
        made.by = formulation
    return made


def tensors(out: Any) -> list[Tensor]:
    return [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]


def same(
    layer: nn.Module,
    kind: type[StackedLayer],
    inputs: list[Tensor],
    axes: list[int],
    formulation: str = "",
    batches: list[int] | None = None,
) -> None:
    """The stacked layer against S plain ones.

    inputs  of all clients; axes: where each of them has its S * B examples; batches: likewise the
    outputs, 0 if not given
    """
    made, rows = stacked(layer.double(), kind, formulation), rows_of(layer)
    leaves = [r.detach().requires_grad_() for r in rows]
    given, outs = run(made, leaves, inputs, None)
    factors = [numbers(*t.shape, seed=7 + i) for i, t in enumerate(outs)]
    score(outs, factors).backward()
    places = batches or [0] * len(outs)
    for s in range(S):
        for p, r in zip(layer.parameters(), rows, strict=True):
            p.data, p.grad = r[s].clone(), None
        own = [leaf(part(x, s, axis)) for x, axis in zip(inputs, axes, strict=True)]
        right = tensors(call(layer, own))
        for mine, t, axis in zip(outs, right, places, strict=True):
            close(part(mine, s, axis), t)
        score(right, [part(f, s, axis) for f, axis in zip(factors, places, strict=True)]).backward()
        for x, o, axis in zip(given, own, axes, strict=True):
            assert o.grad is None or x.grad is not None
            close(x.grad if o.grad is None else part(x.grad, s, axis), o.grad)
        for row, p in zip(leaves, layer.parameters(), strict=True):
            assert row.grad is not None and p.grad is not None
            close(row.grad[s], p.grad)

    moved = [r.clone().requires_grad_() for r in rows]  # now by the layer itself
    again, outs = run(made, moved, inputs, LR)
    score(outs, factors).backward()
    for new, old, row in zip(moved, rows, leaves, strict=True):
        assert new.grad is None and row.grad is not None
        close(new.detach(), old - LR * row.grad)
    for x, o in zip(given, again, strict=True):
        close(o.grad, x.grad)
    alone(made, rows, inputs, factors, axes, places)


def alone(
    made: StackedLayer,
    rows: list[Tensor],
    inputs: list[Tensor],
    factors: list[Tensor],
    axes: list[int],
    places: list[int],
) -> None:
    """A client whose model is not finite leaves the others their bits."""
    found = []
    for spoiled in (False, True):
        moved = [r.clone() for r in rows]
        for r in moved:
            r[1] = math.nan if spoiled else r[1]
        given, outs = run(made, [r.requires_grad_() for r in moved], inputs, LR)
        score(outs, factors).backward()
        of_x = [x.grad for x in given if x.grad is not None]
        found.append([part(t, s, a) for s in (0, 2) for t, a in zip(outs, places, strict=True)])
        found[-1] += [part(g, s, a) for s in (0, 2) for g, a in zip(of_x, axes, strict=False)]
        found[-1] += [r.detach()[s] for s in (0, 2) for r in moved]
        assert spoiled == all(
            part(t, 1, a).isnan().all() for t, a in zip(outs, places, strict=True)
        )
    assert all(map(torch.equal, *found))


def run(
    made: StackedLayer, rows: list[Tensor], inputs: list[Tensor], lr: float | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs, as leaves, and all that a layer makes of them."""
    given = [leaf(x) for x in inputs]
    made.begin(rows, S * B, lr)
    outs = tensors(call(made, given))
    assert made.calls == 1
    return given, outs


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.is_floating_point())


def score(outs: list[Tensor], factors: list[Tensor]) -> Tensor:
    """A number that depends on each entry of the outputs by another factor."""
    return torch.stack([(t * f).sum() for t, f in zip(outs, factors, strict=True)]).sum()


def call(layer: nn.Module, given: list[Tensor]) -> Any:
    if isinstance(layer, StackedRecurrent | nn.LSTM | nn.GRU) and len(given) > 1:
        return layer(given[0], tuple(given[1:]) if len(given) > 2 else given[1])
    return layer(*given)


def part(x: Any, s: int, axis: int) -> Tensor:
    """Client s of all."""
    return x.detach().unflatten(axis, (S, -1)).select(axis, s).clone()


def close(found: Any, right: Any) -> None:
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("middle", [(), (4,)])
def test_linear(bias: bool, middle: tuple[int, ...]) -> None:
    same(nn.Linear(5, 3, bias=bias), StackedLinear, [numbers(S * B, *middle, 5)], [0])


CONVOLUTIONS = {
    "plain": nn.Conv2d(2, 4, 3),
    "one pixel": nn.Conv2d(2, 4, 1, bias=False),
    "stride": nn.Conv2d(2, 4, 3, stride=(2, 3), padding=(2, 1)),
    "rest of a stride": nn.Conv2d(2, 4, (2, 3), stride=4),
    "dilation": nn.Conv2d(2, 4, (3, 2), dilation=(2, 3), padding=1),
    "groups": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(3, 6, 3, groups=3, stride=2, bias=False),
    "same": nn.Conv2d(2, 3, (3, 5), padding="same", dilation=(1, 2)),
    "same, even": nn.Conv2d(2, 3, (2, 3), padding="same"),
    "valid": nn.Conv2d(2, 3, 3, padding="valid"),
    "reflect": nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"),
    "circular": nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"),
    "1d": nn.Conv1d(2, 3, 3),
    "1d, all": nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
    "1d, same": nn.Conv1d(2, 3, 4, padding="same", bias=False),
    "1d, replicate": nn.Conv1d(2, 3, 3, padding=1, padding_mode="replicate"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions(layer: Any, formulation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    how = FORMULATIONS[formulation]
    watched = {name: None for name in FORMULATIONS} | {
        formulation: how._replace(
            forward=lambda *a: ran.append("forward") or how.forward(*a),
            backward=lambda *a: ran.append("backward") or how.backward(*a),
        )
    }
    monkeypatch.setattr("vecfl.engine.layers.convolution.FORMULATIONS", watched)
    space = (7, 9)[: len(layer.kernel_size)]
    x = numbers(S * B, layer.in_channels, *space)
    same(layer, StackedConvolution, [x], [0], formulation)
    assert ran == ["forward", "backward"] * 4


@pytest.mark.parametrize("padding", [None, 2, -1])
@pytest.mark.parametrize("shape", [(), (4,), (4, 2)])
def test_embeddings_add_up_what_comes_twice(padding: int | None, shape: tuple[int, ...]) -> None:
    index = torch.arange(S * B * 8).view(S * B, 4, 2)[:, :, 0] * 5 % 7
    index = index[:, 0] if not shape else index.view(S * B, *shape[:1], *(1,) * (len(shape) - 1))
    layer = nn.Embedding(7, 3, padding_idx=padding)
    same(layer, StackedEmbedding, [index.contiguous()], [0])


@pytest.mark.parametrize(
    "how", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}], ids=str
)
def test_embeddings_that_look_at_others_are_refused(how: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match=f"an embedding with {next(iter(how))} has no stacked form"
    ):
        stacked(nn.Embedding(7, 3, **how), StackedEmbedding)


NORMS = {
    "layer": (nn.LayerNorm(6), (4, 6)),
    "layer, two axes": (nn.LayerNorm((4, 6), eps=0.1), (3, 4, 6)),
    "layer, no bias": (nn.LayerNorm(6, bias=False), (6,)),
    "rms": (nn.RMSNorm(6), (4, 6)),
    "rms, eps": (nn.RMSNorm((4, 6), eps=0.1), (4, 6)),
    "group": (nn.GroupNorm(2, 6), (6, 3, 4)),
    "group, flat": (nn.GroupNorm(2, 6, eps=0.1), (6,)),
    "instance 1d": (nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "instance 2d": (nn.InstanceNorm2d(4, affine=True, eps=0.1), (4, 5, 3)),
    "instance 3d": (nn.InstanceNorm3d(2, affine=True), (2, 2, 3, 2)),
}


@pytest.mark.parametrize("layer, shape", NORMS.values(), ids=NORMS)
def test_norms(layer: nn.Module, shape: tuple[int, ...]) -> None:
    same(layer, StackedNorm, [numbers(S * B, *shape)], [0])


RECURRENT = {
    "one": {},
    "batch first": {"batch_first": True},
    "two layers": {"num_layers": 2},
    "no bias": {"bias": False, "num_layers": 2, "batch_first": True},
    "both ways": {"bidirectional": True},
    "all": {"bidirectional": True, "num_layers": 3, "batch_first": True},
}


@pytest.mark.parametrize("state", [False, True], ids=["zero", "given"])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("how", RECURRENT.values(), ids=RECURRENT)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent(kind: Any, how: dict[str, Any], length: int, state: bool) -> None:
    layer, first = kind(3, 5, **how), how.get("batch_first", False)
    x = numbers(S * B, length, 3) if first else numbers(length, S * B, 3)
    layers = layer.num_layers * (1 + layer.bidirectional)
    states = 2 if kind is nn.LSTM else 1
    given = [numbers(layers, S * B, 5, seed=3 + i) for i in range(states)] if state else []
    axis = 0 if first else 1
    outputs = [axis] + [1] * states
    same(layer, StackedRecurrent, [x, *given], [axis, *[1] * len(given)], batches=outputs)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("which", ["outputs", "end"])
def test_recurrent_layers_of_which_a_part_is_used(kind: Any, which: str) -> None:
    """What nobody uses has no gradient: the cell, or all outputs but the last."""
    layer = kind(3, 5).double()
    made, rows = stacked(layer, StackedRecurrent), rows_of(layer)
    x, leaves = numbers(4, S * B, 3), [r.detach().requires_grad_() for r in rows]

    def used(found: Any) -> Tensor:
        out, end = found
        if which == "outputs":
            return out.square().sum()
        return (end[1] if kind is nn.LSTM else end).square().sum()

    made.begin(leaves, S * B, None)
    used(made(x)).backward()
    for s in range(S):
        for p, r in zip(layer.parameters(), rows, strict=True):
            p.data, p.grad = r[s].clone(), None
        used(layer(part(x, s, 1))).backward()
        for leaf, p in zip(leaves, layer.parameters(), strict=True):
            close(leaf.grad[s], p.grad)


@pytest.mark.parametrize("how", [{"proj_size": 2}, {"dropout": 0.5, "num_layers": 2}], ids=str)
def test_recurrent_layers_that_project_or_drop_are_refused(how: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^the module \(LSTM\) has no stacked form"):
        stacked(nn.LSTM(3, 5, **how), StackedRecurrent)


def test_sizes_of_the_plain_layer_can_be_read() -> None:
    made = stacked(nn.LSTM(3, 5, 2, batch_first=True), StackedRecurrent)
    assert (made.hidden_size, made.num_layers, made.batch_first) == (5, 2, True)
    assert made.flatten_parameters() is None
    assert stacked(nn.Linear(5, 3), StackedLinear).out_features == 3


class Attends(nn.Module):
    """Examples, a mask that is no example, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.of = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        return self.of(x, x, x, attn_mask=mask)[0] * scale, None


def by_vmap(module: nn.Module, path: str) -> tuple[nn.Module, ByVmap]:
    names = [name for name, _ in module.named_parameters()]
    made, layers = stack_layers(copy.deepcopy(module), names, Draws(), [path])
    (layer,) = [one for one in layers if isinstance(one, ByVmap)]
    return made, layer


def test_what_is_no_example_is_the_same_for_all_clients() -> None:
    """The mask is as long as there are examples in the second pass; the first has decided."""
    outer = nn.Module()
    outer.of = Attends().double()
    made, layer = by_vmap(outer, "of")
    rows = rows_of(outer)
    for batch in (B, 1):
        x, mask = numbers(S * batch, S, 4), torch.ones(S, S).tril() == 0
        layer.begin(rows, S * batch, None)
        out, none = made.of(x, mask, scale=2.0)
        assert none is None and layer.batched == [[True, False, False]]
        for s in range(S):
            for p, r in zip(outer.parameters(), rows, strict=True):
                p.data = r[s]
            mine = slice(s * batch, (s + 1) * batch)
            close(out[mine], outer.of(x[mine], mask, 2.0)[0])


class Gives(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.w, self.what = nn.Parameter(torch.ones(3)), what

    def forward(self, x: Tensor) -> Tensor:
        return self.what(x * self.w)


@pytest.mark.parametrize("what", [lambda x: x.sum(), lambda x: x.sum(0), lambda x: x[:1]])
def test_a_module_by_vmap_gives_a_row_for_each_example(what: Any) -> None:
    made, layer = by_vmap(nn.Sequential(Gives(what)), "0")
    layer.begin([torch.ones(S, 3)], S * B, None)
    with pytest.raises(InputError, match="for each client: no row for each example"):
        made(torch.ones(S * B, 3))
    with pytest.raises(InputError, match=r"a module by vmap gets \[\[7, 3\]\] for a batch of 6"):
        made(torch.ones(7, 3))
