"""Transforms around an algorithm: their order, what is their own, and what the chain keeps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vecfl
from vecfl.aggregate import Aggregate
from vecfl.algorithms import Algorithm, Finished, Round, Upload
from vecfl.engine.rule import LocalRule
from vecfl.layout import Layout
from vecfl.transforms import Transform, chain

from ..oracles.bridge import dataset
from ..oracles.tasks import PROBLEMS
from ..oracles.tiny import FAR, STEEP, Line, client, squared
from ..oracles.toy import habit

Server = dict[str, Tensor]
B = vecfl.Batches(4)


def simulation(
    algorithm: Algorithm, name: str = "linear", bad: tuple[int, ...] = (), **kind: Any
) -> vecfl.Simulation:
    problem = PROBLEMS[name]
    clients = problem.clients()
    for k in bad:
        clients[k]["x"][0] = torch.nan
    data = dataset(clients)
    task = vecfl.Task(problem.build(), problem.loss, example=data.examples(2))
    how = {"dtype": torch.float64, "backend": "loop", "seed": 3} | kind
    return vecfl.Simulation(task, data, algorithm, vecfl.everyone(), **how)


def affine(name: str, factor: float, add: float, undo: bool = True) -> Transform:
    """Messages u become factor * u + add; the server undoes that on the sums."""

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        return replace(upload, update=factor * upload.update + add)

    def server(own: Server, sums: Aggregate, round: Round) -> tuple[Aggregate, Server]:
        assert sums.extra == {}
        if not undo:
            return sums, own
        return replace(sums, total=(sums.total - add * sums.weight) / factor), own

    return Transform(name, client, server)


def test_client_sides_act_in_order_and_server_sides_in_reverse() -> None:
    """FAR alone, lr 1/4: u = -1/4. Twice it, then plus 3: 2.5 is sent, and w = 1 - 2.5. Plus 3
    first would be 5.5. What the servers undo, the last first, leaves 1.25; in the other order
    (2.5 / 2 - 3) is -1.75, and w 2.75."""
    data = dataset([client(FAR, FAR), client()])
    task = vecfl.Task(Line(), squared, example=data.examples(2))
    for undo, w in ((False, -1.5), (True, 1.25)):
        transforms = (affine("scale", 2, 0, undo), affine("move", 1, 3, undo))
        algorithm = chain(vecfl.fedavg(lr=0.25, batches=B), *transforms)
        assert algorithm.name == "fedavg, scale, move"
        sim = vecfl.Simulation(task, data, algorithm, vecfl.everyone(), backend="loop")
        assert sim.round(sim.start())[0].server["w"].item() == w


def counting(name: str = "count") -> Transform:
    """Messages stay. The server counts rounds, clients count their own, extra numbers are 1, the
    examples and the round of the server; all of it is this transform's own, and looked at."""

    def init(layout: Layout) -> Server:
        return {"rounds": torch.zeros(()), "size": torch.tensor(layout.size)}

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        assert own.keys() == {"rounds", "size"} and done.table.keys() == {"visits", "last"}
        assert not upload.table and not upload.extra
        visits = done.table["visits"] + 1
        return replace(
            upload,
            table={"visits": visits, "last": upload.update},
            extra={"clients": torch.ones_like(upload.weight), "examples": done.examples},
        )

    def server(own: Server, sums: Aggregate, round: Round) -> tuple[Aggregate, Server]:
        assert sums.extra.keys() == {"clients", "examples"}
        assert own["rounds"] == round.number and own["size"] == round.layout.size
        return sums, {**own, "rounds": own["rounds"] + 1}

    def metrics(own: Server, sums: Aggregate, round: Round) -> dict[str, float]:
        assert own["rounds"] == round.number and sums.extra.keys() == {"clients", "examples"}
        return {"count/clients": float(sums.extra["clients"]), "count/rounds": float(own["rounds"])}

    def table(size: int) -> dict[str, tuple[int, ...]]:
        return {"visits": (), "last": (size,)}

    return Transform(name, client, server, init, table, metrics)


def test_what_a_transform_has_stands_under_its_place_and_name() -> None:
    sim = simulation(chain(habit(lr=0.1, batches=B), affine("scale", 2, 1), counting()))
    plain, state = simulation(habit(lr=0.1, batches=B)), sim.start()
    other = plain.start()
    assert state.server.keys() == {"w", "half", "1.count.rounds", "1.count.size"}
    for t in range(3):
        state, metrics = sim.round(state)
        other, _ = plain.round(other)
        assert (metrics["count/clients"], metrics["count/rounds"]) == (7, t)
        torch.testing.assert_close(state.server["w"], other.server["w"], rtol=1e-9, atol=1e-12)
    assert state.server["1.count.rounds"] == 3
    everybody = torch.arange(7)
    assert state.table is not None and other.table is not None
    rows, right = state.table.gather(everybody), other.table.gather(everybody)
    assert rows.keys() == {"habit", "visits", "1.count.visits", "1.count.last"}
    assert rows["visits"].tolist() == rows["1.count.visits"].tolist() == [3] * 7
    torch.testing.assert_close(rows["habit"], right["habit"], rtol=1e-9, atol=1e-12)
    assert rows["1.count.last"][0].any() and (rows["1.count.last"][1] == 1).all()  # 2 * 0 + 1


def test_two_of_the_same_have_each_their_own() -> None:
    plain = vecfl.fedavg(lr=0.1, batches=B)
    once = chain(plain, counting(), counting())
    twice = chain(chain(plain, counting()), counting())
    for algorithm in (once, twice):
        sim = simulation(algorithm)
        state, metrics = sim.round(sim.start())
        named = {f"{i}.count.{what}" for i in (0, 1) for what in ("rounds", "size")}
        assert state.server.keys() == {"w"} | named
        assert [state.server[f"{i}.count.rounds"].item() for i in (0, 1)] == [1, 1]
        assert metrics["count/clients"] == metrics["count/clients.1"] == 7
        assert state.table is not None
        assert len(state.table.gather(torch.arange(2))) == 4


@pytest.mark.parametrize("inner", ["habit", "observing"])
def test_a_checkpoint_holds_all_of_it(inner: str) -> None:
    plain = habit(lr=0.1, batches=B) if inner == "habit" else observing()
    algorithm = chain(plain, counting(), vecfl.clip_by_norm(0.1), counting())

    def rounds(sim: vecfl.Simulation, state: Any, number: int) -> tuple[Any, dict]:
        metrics: dict = {}
        for _ in range(number):
            state, metrics = sim.round(state)
            state = sim.observe(state, metrics)
        return state, {k: v for k, v in metrics.items() if not k.startswith("system/")}

    sim = simulation(algorithm)
    through, told = rounds(sim, sim.start(), 4)
    first = simulation(algorithm)
    half, _ = rounds(first, first.start(), 2)
    content = first.save(half)
    second = simulation(algorithm)
    after, again = rounds(second, second.load(content), 2)
    assert again == told
    assert {k: t.tolist() for k, t in after.server.items()} == {
        k: t.tolist() for k, t in through.server.items()
    }
    everybody = torch.arange(7)
    for name, values in through.table.gather(everybody).items():
        assert torch.equal(after.table.gather(everybody)[name], values), name
    other = simulation(chain(plain, counting(), vecfl.clip_by_norm(0.2), counting()))
    with pytest.raises(vecfl.InputError):
        other.load(content)


def observing() -> Algorithm:
    """FedAvg whose learning rate is halved where the metrics of a round say so."""
    plain = vecfl.fedavg(lr=0.1, batches=B)

    def local(server: Server, rule: LocalRule) -> LocalRule:
        assert server.keys() == {"w", "rate"}
        return replace(rule, lr=float(server["rate"]))

    def observe(server: Server, told: Any) -> Server:
        assert server.keys() == {"w", "rate"}
        return {**server, "rate": server["rate"] / (2 if told["train/loss"] > 0 else 1)}

    def server(state: Server, sums: Aggregate, round: Round) -> Server:
        rate = {"rate": state["rate"]}
        return plain.server({"w": state["w"]}, sums, round) | rate

    return replace(
        plain,
        name="observing",
        init=lambda w, layout: {"w": w, "rate": torch.tensor(0.1, dtype=torch.float64)},
        server=server,
        local=local,
        model=lambda server: server["w"] + 1,
        observe=observe,
    )


def test_around_an_algorithm_that_observes() -> None:
    """It is asked to, sees the metrics, has its rule and its model; the rest of the state stays."""
    sim, plain = simulation(chain(observing(), counting())), simulation(observing())
    state, other = sim.start(), plain.start()
    for t in range(2):
        state, metrics = sim.round(state)
        other, right = plain.round(other)
        assert not state.observed
        with pytest.raises(vecfl.InputError, match="observing, count adapts"):
            sim.round(state)
        state, other = sim.observe(state, metrics), plain.observe(other, right)
        assert state.server["rate"].item() == 0.1 / 2 ** (t + 1)
        assert state.server["0.count.rounds"] == t + 1
    assert torch.equal(state.server["w"], other.server["w"])
    left, right = sim.state_dict(state), plain.state_dict(other)
    assert torch.equal(left["weight"], right["weight"])
    assert torch.equal(left["weight"].flatten(), state.server["w"][:15] + 1)
    assert chain(vecfl.fedavg(lr=0.1, batches=B), counting()).observe is None


EXTRA = [
    {"backend": "loop", "slots": 1},
    {"backend": "loop", "slots": 3, "workers": 3},
    {"backend": "vmap", "slots": 7},
    {"backend": "vmap", "slots": 2, "workers": 2},
]


def extras(bad: tuple[int, ...] = (), **kind: Any) -> dict[str, float]:
    """The sums of three numbers of each client: 1, its examples, a third of its loss."""
    found: dict[str, float] = {}

    def client(own: Server, done: Finished, upload: Upload) -> Upload:
        extra = {"one": torch.ones_like(done.loss), "examples": done.examples}
        return replace(upload, extra=extra | {"third": done.loss / 3})

    def metrics(own: Server, sums: Aggregate, round: Round) -> dict[str, float]:
        assert all(value.dtype == torch.float64 for value in sums.extra.values())
        found.update({name: value.item() for name, value in sums.extra.items()})
        return {}

    transform = Transform("extra", client, metrics=metrics)
    sim = simulation(chain(vecfl.fedavg(lr=0.1, batches=B), transform), bad=bad, **kind)
    _, told = sim.round(sim.start())
    assert found["third"] == pytest.approx(told["train/loss"] * found["examples"] / 3, rel=1e-9)
    return found


@pytest.mark.parametrize("kind", EXTRA, ids=str)
def test_extra_numbers_are_sums_over_clients(kind: dict[str, Any]) -> None:
    """Clients of 5 0 1 23 3 4 8 examples; of 0 too, and without weights."""
    found = extras(**kind)
    assert (found["one"], found["examples"]) == (7, 44)
    assert found["third"] == pytest.approx(extras(**EXTRA[0])["third"], rel=1e-12)


@pytest.mark.parametrize("kind", EXTRA, ids=str)
def test_extra_numbers_of_clients_that_are_not_finite_count_as_nothing(
    kind: dict[str, Any],
) -> None:
    """Without the clients of 23 and 4 examples; `third` of them would be NaN."""
    found = extras((3, 5), **kind)
    assert (found["one"], found["examples"]) == (5, 17)


def test_exact_extra_numbers_have_the_same_bits() -> None:
    """On the loop, where rows have the same bits. Plain sums of three workers differ."""
    kinds = [{"slots": 1}, {"slots": 3, "workers": 3}, {"slots": 2, "workers": 2}]
    assert len({extras(exact_sums=True, **kind)["third"] for kind in kinds}) == 1
    exact = extras(exact_sums=True)["third"]
    assert exact == pytest.approx(extras()["third"], rel=1e-9)
    assert (exact * 2.0**38).is_integer()  # 44 examples, up to 2^6: multiples of 2^(6 - 44)
    assert not (extras()["third"] * 2.0**38).is_integer()


def test_the_weights_of_dga_pass_through() -> None:
    kind = {"lr": 0.1, "batches": B, "softmax_beta": 2.0}
    plain, sim = (simulation(a) for a in (vecfl.dga(**kind), chain(vecfl.dga(**kind), counting())))
    left, right = plain.round(plain.start())[0], sim.round(sim.start())[0]
    assert torch.equal(left.server["w"], right.server["w"])


def test_steep_and_far_by_hand() -> None:
    """A transform sees rows before they are weighted: -0.25 of FAR, 1 of STEEP, doubled; by three
    examples against one: 1 - 2 (-0.25 + 3) / 4."""
    data = dataset([client(FAR), client(STEEP, STEEP, STEEP)])
    task = vecfl.Task(Line(), squared, example=data.examples(2))
    algorithm = chain(vecfl.fedavg(lr=0.25, batches=B), affine("double", 2, 0, undo=False))
    sim = vecfl.Simulation(task, data, algorithm, vecfl.everyone(), slots=2)
    assert sim.round(sim.start())[0].server["w"].item() == 1 - 2 * 2.75 / 4
