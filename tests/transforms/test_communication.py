"""Bytes of a run: who counts, what a checkpoint keeps of them, and residuals over rounds."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vecfl
from vecfl import checkpoint
from vecfl.algorithms import Algorithm, Finished, Upload
from vecfl.named import TRANSFORMS
from vecfl.plugins import part

from ..oracles.bridge import dataset
from ..oracles.tasks import PROBLEMS
from ..persist import tiny

B = vecfl.Batches(4, epochs=2)
P, SIZE = 18, 8  # numbers of the linear model, and bytes of each
BYTES = ("up", "down", "total_up", "total_down")


def simulation(
    algorithm: Algorithm, sampler: Any = None, bad: tuple[int, ...] = (), **kind: Any
) -> vecfl.Simulation:
    """Clients of 5 0 1 23 3 4 8 examples; those in `bad` have a NaN."""
    problem = PROBLEMS["linear"]
    clients = problem.clients()
    for k in bad:
        clients[k]["x"][0] = torch.nan
    data = dataset(clients)
    task = vecfl.Task(problem.build(), problem.loss, example=data.examples(2))
    how = {"dtype": torch.float64, "backend": "loop", "seed": 3} | kind
    return vecfl.Simulation(task, data, algorithm, sampler or vecfl.everyone(), **how)


def drawn(*cohorts: list[int]) -> Any:
    return lambda eligible, seed, round: torch.tensor(cohorts[round], dtype=torch.int64)


def told(metrics: Any) -> list[int]:
    return [metrics[f"comm/{name}_bytes"] for name in BYTES]


@pytest.mark.parametrize("kind", [{}, {"workers": 3}, {"backend": "vmap", "slots": 2}], ids=str)
def test_who_counts(kind: dict[str, Any]) -> None:
    """Seven clients, one without examples and two that are not finite; four places of three; and
    nobody. Each sends and receives 18 numbers of 8 bytes."""
    sampler = drawn([*range(7)], [3, 5, 3, 1], [])
    sim = simulation(vecfl.fedavg(lr=0.1, batches=B), sampler, (3, 5), **kind)
    state, first = sim.round(sim.start())
    assert first["train/dropped_clients"] == 2
    state, second = sim.round(state)
    state, third = sim.round(state)
    row = P * SIZE
    assert told(first) == [7 * row] * 4
    assert told(second) == [4 * row, 4 * row, 11 * row, 11 * row]
    assert told(third) == [0, 0, 11 * row, 11 * row] and state.traffic == (11 * row, 11 * row)
    assert all(type(value) is int for value in told(third))


def test_lost_clients_receive_and_do_not_send() -> None:
    """Clients 0 and 4 are lost. Signs of a weight and a bias take 16 bytes and 18 bits."""
    lost = torch.zeros(1, 7, dtype=torch.bool)
    lost[0, [0, 4]] = True
    fedavg = vecfl.chain(vecfl.fedavg(lr=0.1, batches=B), vecfl.scaled_sign())
    sim = simulation(fedavg, bad=(3,), client_dropout=lost)
    _, metrics = sim.round(sim.start())
    assert told(metrics)[:2] == [5 * 19, 7 * P * SIZE]
    two = simulation(replace(fedavg, downlink=2), client_dropout=lost)
    assert told(two.round(two.start())[1])[:2] == [5 * 19, 14 * P * SIZE]


def test_clipping_before_a_codec_is_normal_and_float32_is_half() -> None:
    chained = vecfl.chain(vecfl.fedavg(lr=0.1, batches=B), vecfl.clip_by_norm(0.1), vecfl.top_k(2))
    sim = simulation(chained, dtype=torch.float32)
    state, metrics = sim.round(sim.start())
    # two of 18: positions of 5 bits, 10 in all, and 64 bits of numbers
    assert told(metrics)[:2] == [7 * 10, 7 * P * 4] and metrics["train/norm"] > 0
    plain = simulation(vecfl.fedavg(lr=0.1, batches=B), dtype=torch.float32)
    assert told(plain.round(plain.start())[1])[:2] == [7 * P * 4] * 2


def test_a_clip_keeps_the_bytes_of_an_algorithm() -> None:
    """One that says how many bytes its clients send."""
    plain = vecfl.fedavg(lr=0.1, batches=B)

    def upload(server: dict[str, Tensor], done: Finished) -> Upload:
        return replace(sent := plain.upload(server, done), bytes=sent.weight.long() + 1)

    sim = simulation(vecfl.chain(replace(plain, upload=upload), vecfl.clip_by_norm(0.1)))
    assert told(sim.round(sim.start())[1])[0] == 44 + 7


def recorded(algorithm: Algorithm, seen: dict[int, list[Tensor]]) -> Algorithm:
    """`algorithm` whose clients' messages are written down."""

    def upload(server: dict[str, Tensor], done: Finished) -> Upload:
        sent = algorithm.upload(server, done)
        for k, row in zip(done.client.tolist(), sent.update.clone(), strict=True):
            seen.setdefault(k, []).append(row)
        return sent

    return replace(algorithm, upload=upload)


FEEDBACK = {
    "top_k": vecfl.top_k(2),
    "sign": vecfl.scaled_sign(),
    "random_k": vecfl.random_k(0.2, scaled=False),
}


@pytest.mark.parametrize("name", FEEDBACK)
def test_what_is_not_sent_is_not_lost(name: str) -> None:
    """What a client sent in all its rounds and its residual come to its updates."""
    before: dict[int, list[Tensor]] = {}
    after: dict[int, list[Tensor]] = {}
    plain = recorded(vecfl.fedavg(lr=0.1, batches=B), before)
    chained = recorded(vecfl.chain(plain, vecfl.error_feedback(FEEDBACK[name])), after)
    sim = simulation(chained, drawn([0, 3, 5], [1, 3], [3, 0, 6], [5, 3]))
    state = sim.start()
    for _ in range(4):
        state, _ = sim.round(state)
    assert state.table is not None
    (rows,) = state.table.gather(torch.arange(7)).values()
    assert [k for k in range(7) if rows[k].any()] == [0, 3, 5, 6]
    for k, updates in before.items():
        total = torch.stack(after[k]).sum(0) + rows[k]
        torch.testing.assert_close(total, torch.stack(updates).sum(0), rtol=1e-12, atol=1e-14)
    assert len(before[3]) == 4 and not torch.equal(before[3][1], after[3][1])


def test_feedback_by_hand() -> None:
    """Updates (2, 1), then (0, 0.5): of the largest alone 2 is sent, 1 stays; then 1.5."""
    updates = torch.tensor([[2.0, 1.0], [0.0, 0.5]])
    kept, sent = torch.zeros(1, 2), []
    transform = vecfl.error_feedback(vecfl.top_k(1))
    from vecfl.algorithms import Round
    from vecfl.layout import Entry, Layout

    layout = Layout((Entry("w", (2,), 0, torch.float32),))
    zero, none = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 0)
    for t in range(2):
        at, double = Round(t, 0, layout), torch.ones(1).double()
        columns = (zero, zero, zero, double, double, zero)
        done = Finished(at, none, [], None, *columns, table={"residual": kept})
        upload = transform.client({}, done, Upload(updates[t : t + 1], double))
        kept = upload.table["residual"]
        sent.append(upload.update[0].tolist())
    assert sent == [[2, 0], [0, 1.5]] and not kept.any()
    assert transform.table(2) == {"residual": (2,)}


def test_a_dropped_client_keeps_its_residual() -> None:
    """Client 3 is not finite in the second round alone."""
    bad: list[int] = []
    plain = vecfl.fedavg(lr=0.1, batches=B)

    def upload(server: dict[str, Tensor], done: Finished) -> Upload:
        sent = plain.upload(server, done)
        wrong = torch.tensor([k in bad for k in done.client.tolist()])
        return replace(sent, update=sent.update.where(~wrong[:, None], torch.inf))

    chained = vecfl.chain(replace(plain, upload=upload), vecfl.error_feedback(vecfl.top_k(2)))
    sim = simulation(chained, slots=3)
    state, metrics = sim.round(sim.start())
    assert state.table is not None
    (first,) = state.table.gather(torch.arange(7)).values()
    bad.append(3)
    state, again = sim.round(state)
    (second,) = state.table.gather(torch.arange(7)).values()
    assert again["train/dropped_clients"] == 1 and told(again)[0] == told(metrics)[0]
    same = [torch.equal(first[k], second[k]) for k in range(7)]
    assert same == [False, True, False, True, False, False, False]  # 1 has no examples


def test_a_client_that_does_not_count_keeps_its_residual() -> None:
    """Client 3 does nothing in the second round: weight 0 by examples; by uniform weights 1."""

    def work(clients: Tensor, round: int, seed: int) -> Tensor:
        return torch.where((clients == 3) & (round == 1), 0, 1)

    for weights, same in ((vecfl.by_examples, True), (vecfl.uniform_weights, False)):
        plain = vecfl.fedavg(lr=0.1, batches=vecfl.Batches(4, epochs=work), weights=weights)
        sim = simulation(vecfl.chain(plain, vecfl.error_feedback(vecfl.top_k(2))))
        state, found = sim.start(), []
        for _ in range(2):
            state, _ = sim.round(state)
            assert state.table is not None
            (rows,) = state.table.gather(torch.tensor([3])).values()
            found.append(rows)
        assert torch.equal(*found) is same and found[0].any()


def test_an_update_that_does_not_count_is_not_kept_either() -> None:
    """Client 3 trains in the second round, with the weight 0: its residual has nothing of it."""

    def weights(done: Finished) -> Tensor:
        none = (done.client == 3) & (done.round.number == 1)
        return done.examples.double().where(~none, 0)

    plain = vecfl.fedavg(lr=0.1, batches=vecfl.Batches(4), weights=weights)
    sim = simulation(vecfl.chain(plain, vecfl.error_feedback(vecfl.top_k(2))))
    state, found = sim.start(), []
    for _ in range(3):
        state, _ = sim.round(state)
        assert state.table is not None
        found += state.table.gather(torch.tensor([3])).values()
    assert torch.equal(found[0], found[1]) and found[0].any()
    assert not torch.equal(found[1], found[2])


def test_one_codec_and_behind_it_what_changes_nothing() -> None:
    """A server side behind a codec is fine, and does not hide the codec from a second one."""
    looks = vecfl.Transform("looks", server=lambda own, sums, round: (sums, own))
    once = vecfl.chain(vecfl.fedavg(lr=0.1, batches=B), vecfl.top_k(2), looks)
    assert simulation(once).round(simulation(once).start())[1]["comm/up_bytes"] > 0
    with pytest.raises(vecfl.InputError, match="top_k 2 stands behind a codec"):
        vecfl.chain(once, vecfl.top_k(2))


def test_what_flute_tells_anneals_by_round() -> None:
    """0.8 * 0.5^(r + 1), and bits 4 + r; a threshold that grows ends at 1."""
    codec = vecfl.flute_quantizer(lambda r: 4 + r, 0.8, 0.5)
    sim, told = simulation(vecfl.chain(vecfl.fedavg(lr=0.1, batches=B), codec)), []
    state = sim.start()
    for _ in range(2):
        state, metrics = sim.round(state)
        told.append((metrics["comm/bits"], metrics["comm/threshold"]))
    assert told == [(4, 0.4), (5, 0.2)]
    grows = vecfl.chain(vecfl.fedavg(lr=0.1, batches=B), vecfl.flute_quantizer(4, 0.9, 1.5))
    sim = simulation(grows)
    assert sim.round(sim.start())[1]["comm/threshold"] == 1


CHAINS = {
    "feedback": lambda: vecfl.error_feedback(vecfl.scaled_sign()),
    "drawn": lambda: vecfl.stochastic_quantizer(2),
    "by round": lambda: vecfl.flute_quantizer(4, 0.5, 0.9),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, name: str, disk: bool) -> None:
    def made(folder: str) -> vecfl.Simulation:
        chained = vecfl.chain(vecfl.fedavg(lr=0.1, batches=B), CHAINS[name]())
        how = {"table": tmp_path / folder} if disk and name == "feedback" else {}
        return simulation(chained, vecfl.uniform(4), **how)

    def play(sim: vecfl.Simulation, state: vecfl.State, rounds: int) -> tuple[vecfl.State, list]:
        metrics: dict[str, Any] = {}
        for _ in range(rounds):
            state, metrics = sim.round(state)
        return state, [v for key, v in metrics.items() if not key.startswith("system/")]

    whole, right = play(sim := made("whole"), sim.start(), 5)
    half, _ = play(first := made("cut"), first.start(), 2)
    checkpoint.save(tmp_path / "half", first.save(half))
    del first, half
    second = made("cut")
    state, found = play(second, second.load(checkpoint.load(tmp_path / "half")), 3)
    assert found == right and state.traffic == whole.traffic
    assert torch.equal(state.server["w"], whole.server["w"])
    if state.table is not None and whole.table is not None:
        everybody = torch.arange(7)
        (rows,), (others,) = (s.table.gather(everybody).values() for s in (state, whole))
        assert torch.equal(rows, others) and rows.any()


def test_checkpoints_from_before_bytes_were_counted() -> None:
    sim = simulation(vecfl.fedavg(lr=0.1, batches=B))
    content = sim.save(sim.round(sim.start())[0])
    assert content.pop("traffic") == [7 * P * SIZE] * 2
    state, metrics = sim.round(sim.load(content))
    assert told(metrics) == [7 * P * SIZE] * 4


def test_a_codec_of_a_large_model_with_slots_workers_and_exact_sums() -> None:
    """Rows of 18 in any company have the same bits: what arrives is the same set of rows."""
    found = []
    for kind in ({}, {"slots": 3, "workers": 2}, {"slots": 7}):
        chained = vecfl.chain(vecfl.fedavg(lr=0.1, batches=B), vecfl.qsgd(3))
        sim = simulation(chained, exact_sums=True, **kind)
        state, _ = sim.round(sim.start())
        found.append(state.server["w"])
    assert all(torch.equal(w, found[0]) for w in found)


def test_flags_name_codecs() -> None:
    texts = {
        "top_k(0.01)": "top_k 0.01",
        "error_feedback(top_k(0.01))": "error_feedback top_k 0.01",
        "error_feedback(random_k(3, scaled=False))": "error_feedback random_k 3",
        'scaled_sign("message")': "scaled_sign per message",
        "qsgd(levels=7)": "qsgd 7 per tensor",
        "stochastic_quantizer(4)": "stochastic_quantizer 4 per tensor",
        "flute_quantizer(8, threshold=0.9, anneal=0.99)": "flute_quantizer 8 0.9 0.99 per tensor",
        "clip_by_norm(1.0)": "clip_by_norm 1.0",
    }
    assert {text: part("--transforms", text, TRANSFORMS).name for text in texts} == texts
    with pytest.raises(vecfl.InputError, match=re.escape("--transforms: top_k takes arguments")):
        part("--transforms", "top_k", TRANSFORMS)


def test_a_recorded_run_tells_and_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    """Rows of two halves of a run, with all bytes since the start, are those of the whole."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vecfl.finish.draw_curves", lambda folder: (folder / "curves.png").touch())
    how: dict[str, Any] = {
        "transforms": ("error_feedback(top_k(0.2))",),
        "cohort": 3,
        "rows": "memory",
    }
    tiny.run(tiny.arguments("whole", rounds=4, **how))
    tiny.run(tiny.arguments("cut", rounds=2, **how))
    tiny.run(tiny.arguments("cut", rounds=4, resume="cut", **how))
    runs = [vecfl.load_run(Path(name)).metrics for name in ("whole", "cut")]
    for key in ("comm/up_bytes", "comm/total_up_bytes", "comm/total_down_bytes", "eval/loss"):
        left, right = (run[key].tolist() for run in runs)
        assert left == right and len(left) == 4
    up = runs[0]["comm/up_bytes"]
    assert up.cumsum().tolist() == runs[0]["comm/total_up_bytes"].tolist()
