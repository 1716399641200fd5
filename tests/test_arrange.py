"""What is "auto" is measured, said, kept and obeyed; what disagrees with the loop is not taken."""

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vecfl
from vecfl import Batches, InputError, Simulation, Task, choices, fedavg, fedprox, fedsgd
from vecfl.arrange import arrange, layouts
from vecfl.arrangement import Arrangement, Wanted
from vecfl.engine.vmap import VmapBackend
from vecfl.feed import Resident
from vecfl.job import Job
from vecfl.probe import Probe, slot_steps
from vecfl.processes import Crew
from vecfl.trainer import Trainer, operator_threads

from .oracles.bridge import dataset
from .oracles.tasks import LAYERED, PROBLEMS

AUTO = {"backend": "auto", "workers": "auto", "slots": "auto"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vecfl" / "choices.json"


def probe(problem: str = "mlp", algorithm=None, sizes=(5, 0, 1, 23, 3, 4, 8, 9)) -> Probe:
    p = (PROBLEMS | LAYERED)[problem]
    data = dataset(p.clients(sizes))
    task = Task(p.build().float(), vecfl.cross_entropy, example=data.examples(4))
    algorithm = algorithm or fedavg(lr=0.1, batches=Batches(4, epochs=2))
    fetch = Resident(data, torch.device("cpu")).fetch
    return Probe(task, data, algorithm, torch.arange(len(sizes)), seed=3, fetch=fetch)


def simulate(**kind) -> Simulation:
    p = probe()
    return Simulation(p.task, p.data, p.algorithm, vecfl.everyone(), **kind)


def pretend(monkeypatch: pytest.MonkeyPatch, seconds) -> list[Arrangement]:
    """Let `seconds(arrangement)` stand for the clock; the list fills with what is timed."""
    tried: list[Arrangement] = []

    def time(self: Probe, a: Arrangement) -> None:
        if a not in self.seconds:
            tried.append(a)
            self.seconds[a] = seconds(a)

    monkeypatch.setattr(Probe, "time", time)
    return tried


def test_the_rule_decides_where_nothing_is_auto() -> None:
    with operator_threads(4):
        sim = simulate()
        assert sim.arrangement == Arrangement("vmap", workers=1, threads=4, slots=8)
        assert simulate(workers=2).arrangement == Arrangement("vmap", 2, threads=2, slots=4)
        assert simulate(workers=8).arrangement.threads == 1
        assert simulate(workers=2, threads=3, slots=5).arrangement == Arrangement("vmap", 2, 3, 5)


def test_the_fastest_is_searched_by_backend_then_cores_then_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # vmap is twice as fast as loop, workers halve it, and two slots are better than eight.
    def seconds(a: Arrangement) -> float:
        alone = {"loop": 2.0, "vmap": 1.0, "stacked": 3.0}[a.backend]
        return alone / a.workers + abs(a.slots - 2) / 100

    tried = pretend(monkeypatch, seconds)
    with operator_threads(2):
        chosen = arrange(Wanted("auto", "auto", None, "auto"), probe())
    assert chosen == Arrangement("vmap", workers=2, threads=1, slots=2, processes=2)
    layout = [(a.backend, a.workers, a.threads) for a in tried[:7]]
    assert layout == [  # stacked, three times as slow as vmap, is not tried on two cores
        ("loop", 1, 1),
        ("vmap", 1, 1),
        ("stacked", 1, 1),
        ("loop", 2, 1),
        ("vmap", 2, 1),
        ("loop", 1, 2),
        ("vmap", 1, 2),
    ]
    assert [a.slots for a in tried[7:]] == [1, 2]  # a quarter of four, and half of it


def test_vmap_is_not_tried_where_torch_takes_clients_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """nn.LSTM has no rule; who names vmap gets it all the same."""
    caplog.set_level(logging.INFO, "vecfl")
    tried = pretend(monkeypatch, lambda a: 1.0)
    with operator_threads(1):
        arrange(Wanted("auto", "auto", None, None), probe("lstm"))
        assert {a.backend for a in tried} == {"loop", "stacked"}
        assert "backend vmap is out: " in caplog.text and "batching rule" in caplog.text
        assert arrange(Wanted("vmap", 1, None, 2), probe("lstm")).backend == "vmap"


def test_convolutions_are_tried_by_every_formulation_and_one_goes_on(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    alone = {"loop": 2.0, "vmap": 3.0, "stacked": 1.5, "stacked-grouped": 1.0}
    tried = pretend(monkeypatch, lambda a: alone.get(a.backend, 1.2) / a.workers)
    with operator_threads(2):
        chosen = arrange(Wanted("auto", "auto", None, None), probe("cnn"))
        assert chosen.backend == "stacked-grouped"
        assert [a.backend for a in tried] == [
            *("loop", "vmap", "stacked", "stacked-grouped", "stacked-unfold"),
            *("loop", "stacked-grouped") * 2,
        ]
        tried.clear()
        assert arrange(Wanted("auto", "auto", None, None), probe("cnn")) == chosen and not tried
        arrange(Wanted("stacked", "auto", None, None), probe("cnn"))
        arrange(Wanted("auto", "auto", None, None), probe("mlp"))
    assert {a.backend for a in tried} == {"loop", "vmap", "stacked"}


def test_a_backend_that_the_cores_cannot_save_is_measured_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = pretend(monkeypatch, lambda a: 4.0 / a.threads if a.backend == "loop" else 9.0)
    with operator_threads(2):
        chosen = arrange(Wanted("auto", "auto", None, "auto"), probe())
    assert (chosen.backend, chosen.workers, chosen.threads) == ("loop", 1, 2)
    assert [a.backend for a in tried].count("vmap") == 1


def test_what_is_given_is_not_measured() -> None:
    for forks in (False, True):
        assert layouts(Wanted("vmap", 3, None, "auto"), 8, forks) == [(3, 2, 1)]
        assert layouts(Wanted("vmap", 3, 5, "auto"), 8, forks) == [(3, 5, 1)]
        assert layouts(Wanted("vmap", 3, 1, "auto", 3), 8, forks) == [(3, 1, 3)]
        assert layouts(Wanted("auto", "auto", 2, None), 8, forks) == [(1, 2, 1), (4, 2, 1)]
        assert layouts(Wanted("auto", "auto", None, None), 1, forks) == [(1, 1, 1)]
    threads, apart = [(1, 1, 1), (4, 1, 1), (1, 4, 1)], [(1, 1, 1), (4, 1, 4), (1, 4, 1)]
    assert layouts(Wanted("auto", "auto", None, None), 4, False) == threads
    assert layouts(Wanted("auto", "auto", None, None, 1), 4, True) == threads
    assert layouts(Wanted("auto", "auto", None, None), 4, True) == apart
    with operator_threads(2):
        p = probe()
        chosen = arrange(Wanted("vmap", 2, None, 3), p)
        assert (chosen, p.seconds) == (Arrangement("vmap", 2, 1, 3), {})
        chosen = arrange(Wanted("auto", 2, None, 3), p)
        assert {(a.workers, a.threads, a.slots) for a in p.seconds} == {(2, 1, 3)}
        assert chosen in p.seconds and {a.backend for a in p.seconds} == {"loop", "vmap", "stacked"}


def test_a_choice_is_said_kept_recorded_and_obeyed(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "vecfl")
    with operator_threads(2):
        sim = simulate(**AUTO)
        assert len(caplog.messages) == 1
        assert f"{sim.arrangement}: the fastest of" in caplog.text and str(home) in caplog.text
        (kept,) = json.loads(home.read_text()).values()
        assert Arrangement(**kept) == sim.arrangement
        state, metrics = sim.round(sim.start())
        assert {k: metrics[f"system/{k}"] for k in kept} == kept
        assert len(sim.trainer.workers) == kept["workers"]
        assert {w.backend.name for w in sim.trainer.workers} == {kept["backend"]}
        assert {w.slots.number for w in sim.trainer.workers} == {kept["slots"]}

        # Another choice in the file is obeyed, and nothing is measured again.
        monkeypatch.setattr(Probe, "time", lambda *_: pytest.fail("measured again"))
        other = kept | {"slots": 3, "workers": 2, "backend": "loop"}
        home.write_text(json.dumps(dict.fromkeys(json.loads(home.read_text()), other)))
        again = simulate(**AUTO, seed=8)
        assert again.arrangement == Arrangement(**other)
        assert "as measured before" in caplog.messages[-1]


def test_a_choice_holds_for_its_task_alone() -> None:
    def facts(p: Probe) -> str:
        return choices.key(p.facts())

    p = probe()
    cohort, columns = p.cohort, p.data.columns
    one_more = vecfl.FederatedDataset(columns, torch.cat((p.data.offsets, p.data.offsets[-1:])))
    wider = {name: c if name == "y" else c.repeat(1, 2) for name, c in columns.items()}
    others = {
        "model": replace(p, task=probe("linear").task),
        "dtype": replace(p, task=p.task.to("cpu", torch.float64)),
        "loss": replace(p, task=with_loss(p.task, lambda output, batch: (output.sum(1), None))),
        "augment": replace(p, task=with_augment(p.task, negate)),
        "columns": replace(p, data=replace(p.data, columns=wider)),
        "population": replace(p, data=one_more),
        "cohort": replace(p, cohort=cohort[:3]),
        "pass": replace(p, algorithm=replace(p.algorithm, before=p.algorithm)),
        "rule": replace(p, algorithm=fedprox(lr=0.1, mu=0.1, batches=Batches(4, epochs=2))),
        "epochs": replace(p, algorithm=fedavg(lr=0.1, batches=Batches(4, epochs=3))),
        "epochs by client": replace(p, algorithm=own_work([2, 2, 2, 2, 2, 2, 2, 1])),
        "by others": replace(p, algorithm=own_work([2, 2, 2, 2, 2, 2, 1, 2])),
        "random": replace(p, algorithm=own_work(vecfl.random_epochs(1, 2))),
        "less random": replace(p, algorithm=own_work(vecfl.random_epochs(1, 2, 0.5))),
    }
    keys = {name: facts(other) for name, other in others.items()} | {"same": facts(p)}
    assert len(set(keys.values())) == len(keys)
    work = {"lr": 0.2, "batches": Batches(4, epochs=2)}
    for algorithm in (fedavg(**work), vecfl.fedadam(server_lr=0.1, **work)):
        assert facts(replace(p, algorithm=algorithm)) == facts(probe()) == keys["same"]
    with operator_threads(torch.get_num_threads() + 1):
        assert facts(p) != keys["same"]


def own_work(epochs):
    return fedavg(lr=0.1, batches=Batches(4, epochs=epochs))


def nobody_at_first(clients: torch.Tensor, round: int, seed: int) -> torch.Tensor:
    return torch.full_like(clients, min(round, 1))


def test_a_first_round_without_a_step_is_measured_too() -> None:
    p = probe(algorithm=own_work(nobody_at_first))
    sim = Simulation(p.task, p.data, p.algorithm, vecfl.everyone(), **AUTO)
    state, metrics = sim.round(sim.start())
    assert (metrics["system/client_steps"], metrics["train/clients"]) == (0, 0)
    _, metrics = sim.round(state)
    assert metrics["train/clients"] == 7


def negate(x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    return -x


def with_augment(task: Task, transform) -> Task:
    other = copy.deepcopy(task)
    other.augment = (transform,)
    return other


def with_loss(task: Task, loss) -> Task:
    other = copy.deepcopy(task)
    other.loss = loss
    return other


def test_a_choice_that_disagrees_by_now_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = Wanted("auto", 1, 1, 2)
    first = arrange(wanted, probe())
    assert arrange(wanted, second := probe()) == first and not second.seconds
    other = replace(first, backend="loop" if first.backend == "vmap" else "vmap")
    monkeypatch.setattr(
        Probe, "disagreement", lambda self, a: 1.0 if a.backend == first.backend else 0.0
    )
    assert arrange(wanted, third := probe()).backend != first.backend
    assert third.seconds and other.backend in {a.backend for a in third.seconds}
    assert "was chosen before, but disagrees with the loop now" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", '{"KEY": {"backend": "vmap"}}', '{"KEY": 3}'])
def test_a_damaged_file_of_choices_is_measured_anew(
    content: str, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = Wanted("auto", 1, 1, 2)
    name = choices.key(probe().facts() | {"wanted": vars(wanted)})
    home.parent.mkdir()
    home.write_text(content.replace("KEY", name))
    p = probe()
    chosen = arrange(wanted, p)
    assert len(p.seconds) == 3 and chosen in p.seconds
    assert Arrangement(**json.loads(home.read_text())[name]) == chosen
    assert caplog.text.count("measuring anew") == (content != "[]")


def test_a_choice_that_cannot_be_kept_is_taken_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vecfl")
    (tmp_path / "vecfl").write_text("a file where the folder should be")
    p = probe()
    assert arrange(Wanted("auto", 1, 1, 2), p) in p.seconds
    assert "not kept" in caplog.messages[-1] and str(tmp_path / "vecfl") in caplog.messages[-1]


def test_a_backend_that_cannot_train_the_module_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: VmapBackend, *_: object) -> None:
        raise InputError("module 'x' cannot be vectorised")

    monkeypatch.setattr(VmapBackend, "_try", refuse)
    p = probe()
    assert arrange(Wanted("auto", 1, 1, None), p).backend == "loop"
    with pytest.raises(InputError, match="cannot be vectorised"):
        arrange(Wanted("vmap", 1, 1, "auto"), probe())


def test_where_every_backend_is_out_the_last_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: Probe, a: Arrangement) -> None:
        raise InputError(f"no {a.backend}")

    monkeypatch.setattr(Probe, "time", refuse)
    with pytest.raises(InputError, match="^no stacked$"):
        arrange(Wanted("auto", 1, 1, None), probe())


def test_processes_are_no_more_than_the_clients_of_a_cohort() -> None:
    """Eight clients here; where sizes differ, all of them may come."""
    with pytest.raises(InputError, match="^slots=1000000000: give at most 8, the clients of a co"):
        simulate(slots=10**9)
    assert simulate(slots=20, workers=8).arrangement.slots == 20  # some idle
    p = probe()
    for sampler, most in ((vecfl.uniform(3), 3), (vecfl.poisson(0.3), 8)):
        parts = p.task, p.data, p.algorithm, sampler
        assert Simulation(*parts, workers=most, processes=most).arrangement.processes == most
        assert Simulation(*parts, workers=most + 1).arrangement.workers == most + 1  # one idles
        for kind in ({"workers": most + 1, "processes": most + 1}, {"workers": 10**6}):
            with pytest.raises(InputError, match=f"^workers=\\d+: give at most {most}, the "):
                Simulation(*parts, **kind)


def test_a_device_that_is_not_here_is_named() -> None:
    for name in ("cuda", "gpu"):
        with pytest.raises(InputError, match=f"^device='{name}': expected a device of this mach"):
            simulate(device=name)


def test_a_candidate_that_fails_is_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a fork cannot train, say; what fails first, fails by the loop on one core too."""
    caplog.set_level(logging.INFO, "vecfl")

    def fail(*_: object) -> None:
        raise RuntimeError("no fork\nis to be had")

    monkeypatch.setattr(Crew, "train", fail)
    wanted = Wanted("loop", "auto", None, 2)
    with operator_threads(2):
        assert arrange(wanted, p := probe()).processes == 1
        assert {(a.workers, a.threads) for a in p.seconds} == {(1, 1), (1, 2)}
        out = "loop, 2 processes of 2 slots and 1 operator thread is out: no fork"
        assert out in caplog.messages
        with pytest.raises(RuntimeError, match="no fork"):
            arrange(Wanted("auto", 1, 1, 2), replace(p := probe(), task=with_loss(p.task, fail)))


def test_what_fails_in_float64_is_out_and_the_next_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vecfl")
    pretend(monkeypatch, lambda a: 2.0 - a.workers / 2 + a.threads / 4)
    failing = {(2, 1), (1, 1)}

    def disagreement(self: Probe, a: Arrangement) -> float:
        if (a.workers, a.threads) in failing:
            raise RuntimeError("no fork")
        return 0.0

    monkeypatch.setattr(Probe, "disagreement", disagreement)
    wanted = Wanted("loop", "auto", None, 2)
    with operator_threads(2):
        first = arrange(wanted, probe())
        assert (first.workers, first.threads) == (1, 2)
        assert caplog.text.count("is out: no fork") == 2
        failing.add((1, 2))  # by now what was chosen before fails too, and all others
        with pytest.raises(RuntimeError, match="no fork"):
            arrange(wanted, probe())
        assert f"{first} was chosen before: no fork" in caplog.text


ALGORITHMS = [fedavg(lr=0.1, batches=Batches(4, epochs=2)), fedsgd(lr=0.1, size=4)]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_backends_and_workers_agree_in_float64(problem: str, algorithm) -> None:
    for a in (Arrangement("vmap", 1, 1, 5), Arrangement("vmap", 2, 1, 2)):
        assert probe(problem, algorithm).disagreement(a) < 1e-12
    assert probe(problem, algorithm).disagreement(Arrangement("loop", 2, 1, 1)) < 1e-12


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_a_backend_that_disagrees_is_out(
    algorithm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = VmapBackend.gradients

    def wrong(self: VmapBackend, *args, **kwargs):
        grads, *rest = right(self, *args, **kwargs)
        return [g * (1 + 1e-6) for g in grads], *rest

    monkeypatch.setattr(VmapBackend, "gradients", wrong)
    pretend(monkeypatch, lambda a: {"vmap": 1.0, "loop": 2.0, "stacked": 3.0}[a.backend])
    assert probe(algorithm=algorithm).disagreement(Arrangement("vmap", 1, 1, 2)) > 1e-7
    assert arrange(Wanted("auto", 1, 1, None), probe(algorithm=algorithm)).backend == "loop"
    assert "backend vmap is out" in caplog.text
    with pytest.raises(InputError, match="from the loop on one worker"):
        arrange(Wanted("vmap", 1, 1, "auto"), probe(algorithm=algorithm))


@pytest.mark.parametrize("backend", ["loop", "vmap", "stacked"])
@pytest.mark.parametrize(("workers", "slots"), [(1, 1), (1, 2), (3, 2), (1, 5), (2, 3)])
def test_slot_steps_are_those_that_a_round_executes(backend: str, workers: int, slots: int) -> None:
    p = probe()
    trainer = Trainer(p.task, p.data, p.algorithm, Arrangement(backend, workers, 1, slots), 3)
    plan = trainer.plan(p.cohort)
    server = p.algorithm.init(p.task.layout.flatten(p.task.module), p.task.layout)
    fold = trainer.train(Job(server, 0, plan, p.data.columns))
    assert fold.executed == slot_steps(trainer, plan)


def test_a_part_is_scaled_to_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    # 8, 4 and 100 examples in batches of 4: 2, 1 and 25 steps. With one slot the loop would first
    # be timed on two steps of the first client. If every step takes a second, that is more than
    # a part may take, so nothing longer is timed, and the round is expected to take 28 seconds.
    p = probe(algorithm=fedavg(lr=0.1, batches=Batches(4)), sizes=(8, 4, 100))
    timed = []

    def clock(self: Probe, trainer: Trainer, plan) -> float:
        timed.append(plan.steps.tolist())
        return float(plan.steps.sum())

    monkeypatch.setattr(Probe, "_clock", clock)
    p.time(a := Arrangement("loop", 1, 1, 1))
    assert (timed, p.seconds[a]) == ([[2]], 28.0)


def test_idle_slots_count_where_they_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2, 1 and 25 steps on two slots: 25 | 2 + 1, so 50 slot-steps. Two steps of a client for each
    # slot are 4; at a second each they are too long to time more, and a round takes 50 seconds.
    p = probe(algorithm=fedavg(lr=0.1, batches=Batches(4)), sizes=(8, 4, 100))
    monkeypatch.setattr(Probe, "_clock", lambda self, trainer, plan: slot_steps(trainer, plan))
    p.time(a := Arrangement("vmap", 1, 1, 2))
    assert p.seconds[a] == 50.0
    # On four slots 28 of clients, and 25 - 2 of the slot that stays beside the last client; where
    # the step is captured, 25 of each slot.
    p.time(a := Arrangement("vmap", 1, 1, 4))
    assert p.seconds[a] == 51.0
    trainer = p.trainer(a)
    trainer.arrangement = replace(a, graphs=True)
    assert slot_steps(trainer, p.plan(trainer)) == 100


def test_the_whole_cohort_is_timed_where_it_is_short() -> None:
    p = probe()
    a = Arrangement("vmap", 1, 1, 2)
    sizes = [plan.steps.tolist() for plan, _ in p._parts(p.trainer(a))]
    assert sizes == [[2, 2], [4, 2], [4, 0, 2, 12, 2, 2, 4, 6]]
    p.time(a)
    assert 0 < p.seconds[a] < 60


@pytest.mark.parametrize(
    "kind, line",
    [
        (
            {"backend": "scan"},
            "backend 'scan' is not known; choose loop, vmap, stacked or auto",
        ),
        ({"workers": 0}, "workers must be an integer of at least 1, not 0"),
        ({"workers": "all"}, "workers must be an integer of at least 1, not 'all'"),
        ({"threads": -1}, "threads must be an integer of at least 1, not -1"),
        ({"slots": 1.5}, "slots must be an integer of at least 1, not 1.5"),
        ({"slots": True}, "slots must be an integer of at least 1, not True"),
    ],
)
def test_bad_values_are_named(kind: dict, line: str) -> None:
    with pytest.raises(InputError) as error:
        simulate(**kind)
    assert str(error.value) == line
