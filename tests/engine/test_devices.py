"""Steps keep to their device and ask it for nothing: tried on "meta", whose tensors hold no values.

An operation that mixes devices raises there, and so does whatever needs a value on the host, where
a GPU would be waited for.
"""

import pytest
import torch

import vecfl
from vecfl import Batches, Task, fedprox
from vecfl.engine import Slots, make_backend, make_update, stacked
from vecfl.optim import ClientOptimizer
from vecfl.schedule import make_plan
from vecfl.tape import Tape

from ..oracles.bridge import dataset, transforms
from ..oracles.tasks import AUGMENTED, LAYERED, PROBLEMS

ALL = PROBLEMS | AUGMENTED | LAYERED

META = torch.device("meta")


@pytest.mark.parametrize("full", [False, True], ids=["batches", "full batch"])
@pytest.mark.parametrize(
    "optimizer", [vecfl.sgd(), vecfl.momentum(nesterov=True), vecfl.adam()], ids=lambda o: o.name
)
@pytest.mark.parametrize("plain", [False, True], ids=["pull and clip", "plain"])
@pytest.mark.parametrize(
    "name, problem",
    [(name, p) for name in ("loop", "vmap") for p in PROBLEMS | AUGMENTED]
    + [("stacked", p) for p in ("images", "mixed", "lstm", "gru")]
    + [("stacked-grouped", "cnn"), ("stacked-unfold", "cnn")],
)
def test_steps_stay_on_their_device(
    name: str,
    problem: str,
    plain: bool,
    optimizer: ClientOptimizer,
    full: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the check looks at values
    monkeypatch.setattr(stacked, "check", lambda task, _: stacked.stacked(task))
    p, batches = ALL[problem], Batches(4, epochs=2, full=full)
    data = dataset(p.clients((8, 5, 7)))
    corrections = {"mu": 0.0} if plain else {"mu": 0.1, "clip": 0.5}
    rule = fedprox(lr=0.1, batches=batches, optimizer=optimizer, **corrections).rule
    augment = transforms(p.augment)
    task = Task(p.build(), p.loss, example=data.examples(2), augment=augment)
    task = task.to(META, torch.float32)
    w = task.layout.flatten(task.module)
    slots = Slots(task.layout, rule, 3, META, torch.float32)
    slots.start_(torch.arange(3, device=META), w, None)
    backend, columns = make_backend(name, task, data.examples(2)), data.to(META).columns
    update = make_update(rule, task.layout.param_views(w), 0)
    plan = make_plan(batches, data.offsets, torch.arange(3), seed=0, round=0)
    (block,) = Tape(plan, batches, 3, seed=0, round=0, draws=task.keyed).blocks()
    with torch.no_grad():
        assert backend.run_(slots, block, columns, update) == 12
