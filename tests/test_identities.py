"""Settings that must not matter, each beside a hand-derived value where the same setting matters.

The derivations start from w = 1 and from the examples FAR, STEEP, PLAIN and SETTLED, whose
gradients stand in tests/oracles/tiny.py. Everything is float64 on both backends.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vecfl
from vecfl import Batches, Simulation, Task, everyone, fedavg, fedprox, fedsgd
from vecfl.algorithms import Algorithm

from .oracles.bridge import dataset
from .oracles.loop import Columns, Loss
from .oracles.tasks import PROBLEMS, SIZES
from .oracles.tiny import FAR, PLAIN, STEEP, Line, client, masked, squared

Models = dict[str, Tensor]
ONE = Batches(1)


@pytest.fixture(params=["loop", "vmap"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def train(
    algorithm: Algorithm,
    clients: list[Columns],
    backend: str,
    *,
    module: nn.Module | None = None,
    loss: Loss = squared,
    rounds: int = 1,
) -> Models:
    """The model after `rounds` rounds of everyone in two slots."""
    data = dataset(clients)
    task = Task(module or Line(), loss, example=data.examples(2))
    kind = {"backend": backend, "slots": 2, "seed": 5, "dtype": torch.float64}
    sim = Simulation(task, data, algorithm, everyone(), **kind)
    state = sim.start()
    for _ in range(rounds):
        state, metrics = sim.round(state)
        state = sim.observe(state, metrics)
        assert (metrics["system/backend"], metrics["system/slots"]) == (backend, 2)
    return sim.state_dict(state)


def at(value: float) -> Models:
    return {"w": torch.tensor([value], dtype=torch.float64)}


def close(a: Models, b: Models, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def same_bits(a: Models, b: Models) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def differ(a: Models, b: Models) -> None:
    assert any(not torch.allclose(a[name], b[name], rtol=1e-4) for name in a)


def without_dropout(problem: str) -> nn.Module:
    module = PROBLEMS[problem].build()
    for m in module.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return module


def on(
    problem: str, backend: str, sizes: tuple[int, ...] = SIZES, rounds: int = 2
) -> Callable[..., Models]:
    """`train` on the ragged clients of an oracle problem, two rounds, without dropout."""
    p, module = PROBLEMS[problem], without_dropout(problem)
    kind = {"module": module, "loss": p.loss, "rounds": rounds}
    return lambda algorithm: train(algorithm, p.clients(sizes), backend, **kind)


def test_fedprox_without_pull_is_fedavg(backend: str) -> None:
    run, work = on("mlp", backend), {"lr": 0.1, "batches": Batches(4, epochs=2)}
    same_bits(run(fedprox(mu=0, **work)), run(fedavg(**work)))
    differ(run(fedprox(mu=3.0, **work)), run(fedavg(**work)))


def test_pull_by_hand(backend: str) -> None:
    # Step 1: w = 1 + 1/4 = 1.25. Step 2: g = (1.25 - 2) + 2 (1.25 - 1) = -0.25, w = 1.3125.
    algorithm = fedprox(lr=0.25, mu=2.0, batches=Batches(1, steps=2))
    close(train(algorithm, [client(FAR)], backend), at(1.3125))


def test_infinite_clip_is_no_clip(backend: str) -> None:
    run, work = on("mlp", backend), {"lr": 0.1, "batches": Batches(4, epochs=2)}
    same_bits(run(fedavg(clip=torch.inf, **work)), run(fedavg(**work)))
    differ(run(fedavg(clip=0.05, **work)), run(fedavg(**work)))


class Affine(nn.Module):
    """y = a x + b, from a = b = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x + self.b


def test_clip_by_hand_takes_the_norm_over_all_parameters(backend: str) -> None:
    # x = 3/4, y = -4: the error is 4, the gradient (4 * 3/4, 4) = (3, 4), its norm 5. With clip 1
    # and lr 1 the parameters become -(3/5, 4/5); clip tensor by tensor would give -(1, 1).
    algorithm = fedavg(lr=1.0, clip=1.0, batches=ONE)
    model = train(algorithm, [client((0.75, -4.0))], backend, module=Affine())
    expected = {
        name: torch.tensor([v], dtype=torch.float64) for name, v in [("a", -0.6), ("b", -0.8)]
    }
    close(model, expected)


@pytest.mark.parametrize("problem", ["linear", "tied", "tokens"])
def test_one_client_with_one_full_batch_is_central_sgd(backend: str, problem: str) -> None:
    p = PROBLEMS[problem]
    (columns,) = p.clients((9,))
    module = without_dropout(problem)
    optimizer = torch.optim.SGD(module.parameters(), 0.2)
    for _ in range(2):
        optimizer.zero_grad()
        sums, weights = p.loss(module(columns["x"]), columns)
        (sums.sum() / weights.sum()).backward()
        optimizer.step()
    run = on(problem, backend, (9,))
    close(run(fedavg(lr=0.2, batches=Batches(9))), dict(module.state_dict()))
    close(run(fedavg(lr=0.2, batches=Batches(4, full=True))), dict(module.state_dict()))


# All three gradients at w = 1: 4, 1 and -1, their mean is 4/3; lr = 3/8 takes w to 1 - 1/2.
@pytest.mark.parametrize("batches", [Batches(3), Batches(2, full=True)])
def test_central_sgd_by_hand(backend: str, batches: Batches) -> None:
    algorithm = fedavg(lr=0.375, batches=batches)
    close(train(algorithm, [client(STEEP, PLAIN, FAR)], backend), at(0.5))


@pytest.mark.parametrize("problem", ["linear", "tied", "buffers", "tokens"])
def test_fedsgd_is_fedavg_with_one_full_batch(backend: str, problem: str) -> None:
    run = on(problem, backend)
    gradients = run(fedsgd(lr=0.3, size=4))
    close(gradients, run(fedavg(lr=0.3, batches=Batches(4, full=True))), rtol=1e-9)
    differ(gradients, run(fedavg(lr=0.3, batches=Batches(4))))


def test_fedsgd_by_hand(backend: str) -> None:
    # Gradients at w = 1: FAR -1; the other client (4 + 4 + 1) / 3 = 3. Their mean by examples is
    # (1 * -1 + 3 * 3) / 4 = 2, and lr = 1/4 takes w to 1/2.
    clients = [client(FAR), client(STEEP, STEEP, PLAIN)]
    close(train(fedsgd(lr=0.25, size=2), clients, backend), at(0.5))
    close(train(fedavg(lr=0.25, batches=Batches(3)), clients, backend), at(0.5))


def test_momentum_without_memory_is_sgd(backend: str) -> None:
    run, work = on("mlp", backend), {"lr": 0.1, "batches": Batches(4, epochs=2)}
    same_bits(run(fedavg(optimizer=vecfl.momentum(0.0), **work)), run(fedavg(**work)))
    differ(run(fedavg(optimizer=vecfl.momentum(0.9), **work)), run(fedavg(**work)))


def test_momentum_by_hand(backend: str) -> None:
    # lr = 1/4, beta = 1/2: v = -1, w = 1.25; v = -1/2 + (1.25 - 2) = -1.25, w = 1.25 + 0.3125.
    algorithm = fedavg(lr=0.25, optimizer=vecfl.momentum(0.5), batches=Batches(1, steps=2))
    close(train(algorithm, [client(FAR)], backend), at(1.5625))


def test_server_rate_zero_leaves_the_model(backend: str) -> None:
    run, start = on("mlp", backend), dict(PROBLEMS["mlp"].build().state_dict())
    same_bits(run(fedavg(lr=0.1, batches=Batches(4), server=vecfl.server_sgd(0.0))), start)
    same_bits(run(fedsgd(lr=0.0)), start)


# lr = 1/2 takes FAR from 1 to 3/2; the server goes half of the way, all of it, twice as far.
@pytest.mark.parametrize("rate, w", [(0.5, 1.25), (1.0, 1.5), (2.0, 2.0)])
def test_server_rate_by_hand(backend: str, rate: float, w: float) -> None:
    algorithm = fedavg(lr=0.5, batches=ONE, server=vecfl.server_sgd(rate))
    close(train(algorithm, [client(FAR)], backend), at(w))


AROUND: dict[str, Callable[[Algorithm], Algorithm]] = {
    "ema that forgets": lambda a: vecfl.ema(a, 0.0),
    "server's plateau": lambda a: vecfl.server_on_plateau(a, "train/loss", "min", 0.5, 9),
    "clients' plateau": lambda a: vecfl.clients_on_plateau(a, "train/loss", "min", 0.5, 9),
}
SERVERS: dict[str, Callable[[], vecfl.server_optim.ServerOptimizer]] = {
    "infinite clip": lambda: vecfl.clipped(vecfl.server_adam(0.1), torch.inf),
    "constant schedule": lambda: vecfl.scheduled(vecfl.server_adam(0.1), vecfl.multi_step([], 0)),
    "no decay": lambda: vecfl.server_adamw(0.1, weight_decay=0.0),
}


@pytest.mark.parametrize("name", [*AROUND, *SERVERS])
def test_what_stands_around_the_server_and_does_nothing(backend: str, name: str) -> None:
    run, work = on("mlp", backend, rounds=3), {"lr": 0.1, "batches": Batches(4)}
    plain = fedavg(server=vecfl.server_adam(0.1), **work)
    other = AROUND[name](plain) if name in AROUND else fedavg(server=SERVERS[name](), **work)
    same_bits(run(other), run(plain))


def test_what_stands_around_the_server_and_does_something(backend: str) -> None:
    run, work = on("mlp", backend, rounds=3), {"lr": 0.1, "batches": Batches(4)}
    adam = vecfl.server_adam(0.1)
    plain = fedavg(server=adam, **work)
    falls = vecfl.server_on_plateau(plain, "train/loss", "max", 0.5, 0)  # the loss gets smaller
    for other in (
        vecfl.ema(plain, 0.5),
        falls,
        fedavg(server=vecfl.clipped(vecfl.server_momentum(), 1e-3), **work),
        fedavg(server=vecfl.scheduled(adam, vecfl.multi_step([1], 0.5)), **work),
        fedavg(server=vecfl.server_adamw(0.1, weight_decay=0.1), **work),
    ):
        differ(run(other), run(plain))


def test_a_cap_above_every_client_is_by_examples(backend: str) -> None:
    run, work = on("linear", backend), {"lr": 0.1, "batches": Batches(4)}
    same_bits(run(fedavg(weights=vecfl.capped(23), **work)), run(fedavg(**work)))
    differ(run(fedavg(weights=vecfl.capped(2), **work)), run(fedavg(**work)))


def test_capped_by_hand(backend: str) -> None:
    # FAR goes to 1.25 with weight min(1, 2), STEEP to 0 with weight min(3, 2).
    algorithm = fedavg(lr=0.25, batches=Batches(3), weights=vecfl.capped(2))
    clients = [client(FAR), client(STEEP, STEEP, STEEP)]
    close(train(algorithm, clients, backend), at(1.25 / 3))


@pytest.mark.parametrize("last", ["keep", "drop", "wrap"])
def test_tokens_of_unit_weight_are_examples(backend: str, last: str) -> None:
    run, work = on("linear", backend), {"lr": 0.1, "batches": Batches(4, epochs=2, last=last)}
    same_bits(run(fedavg(weights=vecfl.by_tokens, **work)), run(fedavg(**work)))


def test_tokens_by_hand(backend: str) -> None:
    # FAR has 2 tokens and goes to 1.25; three times STEEP have 1 each and go to 0:
    # (2 * 1.25 + 3 * 0) / 5; by examples it would be 1.25 / 4.
    clients = [client((*FAR, 2.0)), client(*[(*STEEP, 1.0)] * 3)]
    algorithm = fedavg(lr=0.25, batches=Batches(3), weights=vecfl.by_tokens)
    close(train(algorithm, clients, backend, loss=masked), at(0.5))


@pytest.mark.parametrize("full", [False, True])
def test_an_epoch_is_as_many_steps_as_it_has_batches(backend: str, full: bool) -> None:
    run, steps = on("mlp", backend, (5, 5, 5)), 1 if full else 3
    epochs = run(fedavg(lr=0.1, batches=Batches(2, epochs=1, full=full)))
    same_bits(epochs, run(fedavg(lr=0.1, batches=Batches(2, steps=steps, full=full))))
    differ(epochs, run(fedavg(lr=0.1, batches=Batches(2, steps=steps + 1, full=full))))


# Every step on PLAIN with lr = 1/2 halves w; five examples make three batches of two.
@pytest.mark.parametrize("work, w", [({"epochs": 2}, 2.0**-6), ({"steps": 4}, 2.0**-4)])
def test_epochs_and_steps_by_hand(backend: str, work: dict[str, int], w: float) -> None:
    algorithm = fedavg(lr=0.5, batches=Batches(2, **work))
    close(train(algorithm, [client(*[PLAIN] * 5)], backend), at(w))


@pytest.mark.parametrize("problem", ["linear", "tied", "tokens"])
def test_micro_batches_do_not_matter_in_full_batches(backend: str, problem: str) -> None:
    run, sizes = on(problem, backend), [1, 3, 64]
    gradients = [run(fedsgd(lr=0.3, size=size)) for size in sizes]
    steps = [run(fedavg(lr=0.3, batches=Batches(s, epochs=2, full=True))) for s in sizes]
    for others, first in [(gradients[1:], gradients[0]), (steps[1:], steps[0])]:
        for other in others:
            close(other, first)


# The mean gradient is ((4 w) + (w) + (w - 2)) / 3 = 2 w - 2/3. With lr = 3/8:
# w = 1 -> 1 - 3/8 * 4/3 = 1/2 -> 1/2 - 3/8 * 1/3 = 3/8.
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_micro_batches_by_hand(backend: str, size: int) -> None:
    algorithm = fedavg(lr=0.375, batches=Batches(size, epochs=2, full=True))
    close(train(algorithm, [client(STEEP, PLAIN, FAR)], backend), at(0.375))
