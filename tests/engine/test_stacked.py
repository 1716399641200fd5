"""The stacked backend: what it takes, what it refuses by name, and when its layers step themselves.

That it computes what the plain loop computes is a part of oracles/test_table.py.
"""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vecfl
from vecfl import Batches, FederatedDataset, InputError, Simulation, Task
from vecfl.engine import make_backend
from vecfl.engine.layers import ByVmap
from vecfl.engine.sequence import Sequence
from vecfl.engine.stacked import Stack, StackedBackend, plain_gradients, stacked

EXAMPLE = {"x": torch.linspace(-1, 1, 20).view(4, 5), "y": torch.tensor([0, 1, 2, 0])}

EXAMPLE_OF_THREE = {"x": torch.randn(12, 5, generator=torch.Generator().manual_seed(1))}
EXAMPLE_OF_THREE |= {"y": torch.arange(12) % 3}


def task(module: nn.Module) -> Task:
    return Task(module, vecfl.cross_entropy, example=EXAMPLE)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


class Called(nn.Module):
    """The same layers, called by a forward of its own: no sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


KINDS = [(mlp, Sequence), (Called, Stack)]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(torch.tanh(self.inner(x))))


class Reads(nn.Module):
    """Uses the weight of its layer without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.head.weight.T


class Mine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Depends(nn.Module):
    """Goes another way for a large batch mean, which the example does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) if x.mean() < 1e6 else self.head(-x)


def half_frozen() -> nn.Module:
    module = nn.Linear(5, 3)
    module.bias.requires_grad_(False)
    return module


def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))
    module[2].weight = module[0].weight
    return module


def hooked() -> nn.Module:
    module = nn.Linear(5, 3)
    module.register_forward_hook(lambda m, x, y: y * 2)
    return module


@pytest.mark.parametrize(
    "module, said",
    [
        (
            Bare,
            "the module (Bare) has no stacked form, for its parameter 'w' is in no submodule: use "
            "vmap or loop, or move 'w' and what uses it into a submodule",
        ),
        (hooked, "the module (Linear) has no stacked form, for its parameter 'weight' is in no"),
        (half_frozen, "the module (Linear) has no stacked form"),
        (
            tied,
            "the module (Sequential) has no stacked form, for 0 and 2 share a parameter: use vmap",
        ),
        (lambda: nn.Sequential(nn.Linear(5, 3), Stateful()), "buffer '1.calls' changes"),
        (
            Reads,
            "the module cannot be stacked: its forward reads 'weight' of a Linear layer itself, "
            "outside of the layer's own: use vmap or loop",
        ),
        (Depends, "cannot be vectorised"),
    ],
)
def test_what_has_no_stacked_form_is_named(module: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(InputError) as error:
        StackedBackend(task(module()), EXAMPLE_OF_THREE)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("module, kind", KINDS)
def test_gradients_that_come_out_different_are_refused(
    module, kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kind.step

    def wrong(self, *args: object) -> object:
        grads, *rest = right(self, *args)
        return [g * (1 + 1e-7) for g in grads or []], *rest

    monkeypatch.setattr(kind, "step", wrong)
    with pytest.raises(InputError, match="its gradients come out different"):
        StackedBackend(task(module()), EXAMPLE_OF_THREE)


def test_a_module_that_writes_to_its_input_is_told_so() -> None:
    class Doubles(Called):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    example = {k: c.double() if k == "x" else c for k, c in EXAMPLE_OF_THREE.items()}
    StackedBackend(task(Called()), example)
    with pytest.raises(InputError, match=r"may write to its input \(x.mul_\(2\); write x = x \* 2"):
        StackedBackend(task(Doubles()), example)


def test_the_task_keeps_its_layers() -> None:
    t = task(mlp())
    StackedBackend(t, EXAMPLE_OF_THREE)
    assert [type(m) for m in t.module] == [nn.Linear, nn.ReLU, nn.Linear]


class Nested(nn.Module):
    """Parts that only a pass shows to be without a form, beside layers that have one."""

    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.first, self.odd, self.head = nn.Linear(5, 5), odd, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.odd(torch.tanh(self.first(x))))


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList([torch.eye(5), 2 * torch.eye(5)])

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.rows[0] @ self.rows[1]


class Swaps(nn.Module):
    """Has its examples in the second axis for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.unsqueeze(1).expand(-1, 7, -1).transpose(0, 1)
        return self.inner(wide).transpose(0, 1).sum(1)


def square_reads() -> nn.Module:
    module = Reads()
    module.head = nn.Linear(5, 5)
    return module


def half_frozen_square() -> nn.Module:
    module = nn.Linear(5, 5)
    module.bias.requires_grad_(False)
    return module


def square_hooked() -> nn.Module:
    module = nn.Linear(5, 5)
    module.register_forward_hook(lambda m, x, y: y * 2)
    return module


def square_tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 5))
    module[3].weight = module[0].weight
    return module


def weight_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))


ODD = {
    "custom": lambda: Mine(5, 5),
    "activation": nn.PReLU,
    "hooked": square_hooked,
    "frozen in part": half_frozen_square,
    "tied": square_tied,
    "reads": square_reads,
    "lists": Lists,
    "parametrised": weight_norm,
    "swaps": Swaps,
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_the_smallest_module_without_a_form_runs_by_vmap(odd: Callable[[], nn.Module]) -> None:
    """A run of it is the loop's; a step by vmap is that of a fused layer, at the same time."""
    torch.manual_seed(0)
    t = task(Nested(odd()))
    backend = StackedBackend(t, EXAMPLE_OF_THREE)
    assert backend.layers == {"fused": ["first", "head"], "by_vmap": ["odd"]}
    data = FederatedDataset(dict(EXAMPLE), torch.tensor([0, 3, 4]))
    algorithm, how = vecfl.fedavg(lr=0.1, batches=Batches(2)), {"dtype": torch.float64}
    stacked, loop = (
        Simulation(t, data, algorithm, vecfl.everyone(), backend=backend, **how)
        for backend in ("stacked", "loop")
    )
    (one, metrics), (other, plain) = (sim.round(sim.start()) for sim in (stacked, loop))
    torch.testing.assert_close(one.server["w"], other.server["w"], rtol=1e-9, atol=1e-12)
    assert (metrics["system/fused"], metrics["system/by_vmap"]) == (2, 1)
    assert "system/fused" not in plain and "system/by_vmap" not in plain


@pytest.mark.parametrize("name", ["", "each", "grouped", "unfold"])
def test_the_name_of_a_backend_tells_the_formulation(name: str) -> None:
    example = EXAMPLE_OF_THREE | {"x": EXAMPLE_OF_THREE["x"].unsqueeze(1)}
    module = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(6, 3))
    t = Task(module, vecfl.cross_entropy, example=example)
    backend = make_backend(f"stacked-{name}" if name else "stacked", t, example)
    assert isinstance(backend, StackedBackend) and backend.stack.layers[0].by == name


def test_a_module_at_two_places_is_one_layer() -> None:
    """Where one place lies in what runs by vmap, all of both does."""
    gain, inner = nn.PReLU(), nn.Linear(5, 5)
    shared = nn.Sequential(nn.Linear(5, 5), gain, nn.Linear(5, 5), gain, nn.Linear(5, 3))
    assert StackedBackend(task(shared), EXAMPLE_OF_THREE).layers["by_vmap"] == ["1"]
    odd = Mine(5, 5)
    odd.add_module("inside", inner)
    part = nn.Sequential(inner, nn.Tanh(), odd)
    module = nn.Sequential(part, nn.Linear(5, 3))
    assert StackedBackend(task(module), EXAMPLE_OF_THREE).layers == {
        "fused": ["1"],
        "by_vmap": ["0"],
    }


def test_what_runs_by_vmap_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    data = FederatedDataset(dict(EXAMPLE), torch.tensor([0, 3, 4]))
    caplog.set_level(logging.INFO, "vecfl")
    for module in (Nested(nn.PReLU()), mlp()):
        how = {"backend": "stacked", "workers": 2}
        algorithm = vecfl.fedavg(lr=0.1, batches=Batches(2))
        Simulation(task(module), data, algorithm, vecfl.everyone(), **how)
    assert caplog.messages == ["without a stacked form, hence by vmap: odd"]


def test_a_gradient_that_is_rounding_alone_is_no_difference() -> None:
    """The bias of the first layer moves no output: the norm behind it takes it away."""
    norm = nn.Sequential(nn.Conv1d(5, 4, 1), nn.InstanceNorm1d(4, affine=True), nn.Flatten())
    x = torch.randn(12, 5, 6, generator=torch.Generator().manual_seed(0))
    example = {"x": x, "y": torch.arange(12) % 3}
    module = nn.Sequential(*norm, nn.Linear(24, 3))
    StackedBackend(Task(module, vecfl.cross_entropy, example=example), example)


PLAIN = {"lr": 0.1, "batches": Batches(2)}
ALGORITHMS = {
    "plain": (vecfl.fedavg(**PLAIN), 0.1),
    "schedule": (vecfl.fedavg(lr=lambda t: 0.3, batches=Batches(2)), 0.3),
    "prox": (vecfl.fedprox(mu=0.1, **PLAIN), None),
    "clip": (vecfl.fedavg(clip=1.0, **PLAIN), None),
    "momentum": (vecfl.fedavg(optimizer=vecfl.momentum(), **PLAIN), None),
    "full": (vecfl.fedavg(lr=0.1, batches=Batches(2, full=True)), None),
}


@pytest.mark.parametrize("module, kind", KINDS)
@pytest.mark.parametrize("algorithm, lr", ALGORITHMS.values(), ids=ALGORITHMS)
def test_layers_step_by_themselves_where_the_rule_is_plain_sgd(
    algorithm, lr: float | None, module, kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, right = [], kind.step

    def step(self, *args):
        given.append(args[-1])
        return right(self, *args)

    data = FederatedDataset(dict(EXAMPLE), torch.tensor([0, 3, 4]))
    sims = [
        Simulation(task(module()), data, algorithm, vecfl.everyone(), dtype=torch.float64, **how)
        for how in ({"backend": "stacked", "slots": 2}, {"backend": "loop"})
    ]
    monkeypatch.setattr(kind, "step", step)
    stacked, loop = (sim.round(sims[0].start())[0].server["w"] for sim in sims)
    assert set(given) == {lr} and len(given) == 2
    torch.testing.assert_close(stacked, loop, rtol=1e-9, atol=1e-12)


class Long(nn.Module):
    """Calls a layer twice where the batch is long."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(x))
        return self.head(torch.tanh(self.inner(x)) if len(x) > 3 * EXAMPLE["x"].shape[0] else x)


class Again(nn.Module):
    """Calls one layer of a kind twice, the second time on what it gave."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head, self.kind = layer, nn.Linear(5, 3), type(layer)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind is nn.Embedding:
            near = (x * 3).round().long() % 4
            return self.head((self.layer(near) + self.layer((near + 1) % 4)).sum(-1))
        if self.kind in (nn.Linear, nn.LayerNorm):
            return self.head(self.layer(torch.tanh(self.layer(x))))
        return self.head(self.first(torch.tanh(self.first(torch.stack((x, 2 * x), 1))))[:, -1])

    def first(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


AGAIN = {
    "linear": lambda: Again(nn.Linear(5, 5)),
    "convolution": lambda: Again(nn.Conv1d(2, 2, 3, padding=1)),
    "embedding": lambda: Again(nn.Embedding(4, 2)),
    "norm": lambda: Again(nn.LayerNorm(5)),
    "lstm": lambda: Again(nn.LSTM(5, 5, batch_first=True)),
    "gru": lambda: Again(nn.GRU(5, 5, batch_first=True)),
    "behind another": lambda: nn.Sequential(nn.Linear(5, 5), Again(nn.Linear(5, 5))),
}


@pytest.mark.parametrize("module", [mlp, Called, Twice, Long, *AGAIN.values()])
def test_a_layer_that_is_called_twice_does_not_step_between_the_calls(
    module: Callable[[], nn.Module],
) -> None:
    stack, n = stacked(task(module())), 24
    w = [torch.randn(n, *e.shape) for e in stack.task.layout.params]
    before = [t.clone() for t in w]
    assert not any(isinstance(layer, ByVmap) for layer in stack.layers)
    batch = {k: c[:1].expand(n, 1, *c.shape[1:]) for k, c in EXAMPLE.items()}
    grads, _, _ = stack.step(w, batch, None, None, True, 0.5)
    right, _, _ = stack.step(before, batch, None, None, True, None)
    assert right is not None and all(g.any() for g in right)
    if module in (mlp, Called):
        assert grads is None
        moved = [t - 0.5 * g for t, g in zip(before, right, strict=True)]
        torch.testing.assert_close(w, moved)
    else:
        assert grads is not None and all(map(torch.equal, w, before))
        torch.testing.assert_close(grads, right)


class Mixes(nn.Module):
    """No layer, with a matrix that is no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 5))

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:
        return x @ mix * self.gain


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixes, self.head = Mixes(), nn.Linear(5, 3)
        self.register_buffer("mix", torch.linspace(-1, 1, 25).view(5, 5).exp())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixes(x, self.mix))


def test_what_was_no_batch_in_the_check_is_none_in_a_step() -> None:
    """The mix has 5 rows: no multiple of the 12 examples of the check, but of one of 5 clients."""
    t, n = task(Mixed()).to("cpu", torch.float64), 5
    backend = StackedBackend(t, EXAMPLE_OF_THREE)
    assert backend.layers["by_vmap"] == ["mixes"]
    g = torch.Generator().manual_seed(4)
    rows = torch.randn(n, t.layout.size, generator=g, dtype=torch.float64)
    batch = {k: c[:n].unsqueeze(1) for k, c in EXAMPLE_OF_THREE.items()}
    grads, _, _ = backend.stack.step(t.layout.param_views(rows), batch, None, None, True, None)
    for s in range(n):
        one = {k: c[s] for k, c in batch.items()}
        right = plain_gradients(t, rows[s], one, torch.zeros(3, dtype=torch.int64))
        torch.testing.assert_close([g[s] for g in grads or []], right, rtol=1e-9, atol=1e-12)


class Cuts(nn.Module):
    """Works on slices of the batch: ordinary for one client, not for several in a row."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.head, self.size = nn.Linear(5, 3), size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.head(part) for part in x.split(self.size)])


@pytest.mark.parametrize("size", [5, 12])
def test_a_batch_that_is_cut_is_refused_when_it_happens(size: int) -> None:
    if size == 5:
        with pytest.raises(InputError, match="cannot be stacked: a linear layer gets"):
            StackedBackend(task(Cuts(size)), EXAMPLE_OF_THREE)
        return
    backend = StackedBackend(task(Cuts(size)), EXAMPLE_OF_THREE)  # 12 rows are not cut yet
    w = [torch.randn(5, *e.shape) for e in backend.stack.task.layout.params]
    batch = {k: c.expand(5, *c.shape) for k, c in EXAMPLE.items()}
    with pytest.raises(InputError, match="cuts or reorders the batch has no stacked form"):
        backend.stack.step(w, batch, None, None, True, None)


def test_dropout_across_the_batch_is_refused() -> None:
    """A task mostly refuses such a module itself; a rare dropout may slip through its trial."""
    stack = Stack(task(nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))))
    w = [torch.randn(3, *e.shape) for e in stack.task.layout.params]
    batch = {k: c.unflatten(0, (3, 4)) for k, c in EXAMPLE_OF_THREE.items()}
    streams = torch.zeros(3, 3, dtype=torch.int64)
    stack.step(w, batch, None, streams, True, None)
    dropout = stack.task.module[0]
    with pytest.raises(InputError, match=r"a dropout layer gets \[5, 12\] for a batch of 12"):
        dropout(batch["x"].flatten(0, 1).T)


def test_a_model_of_zeros_hides_nothing() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 3)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

        def forward(self, x: Tensor) -> Tensor:
            penalty = sum((p.square().sum() for p in self.parameters()), torch.zeros(()))
            return self.head(x) * (1 + penalty)

    with pytest.raises(InputError, match="its gradients come out different"):
        StackedBackend(task(Penalised()), EXAMPLE_OF_THREE)


@pytest.mark.parametrize("module, kind", KINDS)
@pytest.mark.parametrize("client", [0, 1, 2])
def test_every_client_of_the_check_counts(
    client: int, module, kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kind.step

    def wrong(self, *args: object) -> object:
        grads, *rest = right(self, *args)
        for g in grads or []:
            g[client] *= 1 + 1e-7
        return grads, *rest

    monkeypatch.setattr(kind, "step", wrong)
    with pytest.raises(InputError, match="its gradients come out different"):
        StackedBackend(task(module()), EXAMPLE_OF_THREE)
