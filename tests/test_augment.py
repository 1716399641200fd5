"""Crop, flip, normalise and own transforms: values on paper, draws, backends, what is refused."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vecfl
from vecfl import Batches, InputError, Simulation, Task
from vecfl.augment import Transform, augmented, draw
from vecfl.evaluate import evaluate, evaluate_clients
from vecfl.random import Kind, philox, stream

from .oracles import bridge
from .oracles import philox as words_of
from .oracles.augment import Transforms, augment
from .oracles.dropout import Place
from .oracles.loop import Columns, Setting
from .oracles.tasks import AUGMENTED, SIZES

SEED, HALF, TOP = 2**40 + 3, 2**31, 2**32 - 1
THIRD = 1431655765  # 2^32 / 3 = 1431655765.33
G = torch.Generator().manual_seed(4)
IMAGES = {"x": torch.rand(6, 2, 3, 4, generator=G), "y": torch.arange(6) % 3}
STREAMS = stream(Kind.DROPOUT, client=torch.tensor([3, 8]), round=5, occurrence=7, step=9)


def four(*words: Sequence[int]) -> Tensor:
    """Words [n, 4] that begin with these, and go on with ones that nobody should read."""
    return torch.tensor([[*w, *(12345,) * (4 - len(w))] for w in words])


# ------------------------------------------------------------------ on paper


def test_crop_by_hand() -> None:
    """[[1, 2], [3, 4]] between zeros is 4 x 4: a window of 2 x 2 has nine places. Top and left are
    word * 3 div 2^32: 0 up to THIRD, 1 from there to 2 THIRD, 2 from 2 THIRD + 1."""
    image = torch.tensor([[1.0, 2], [3, 4]])
    zero, one, two = (0, THIRD), (THIRD + 1, 2 * THIRD), (2 * THIRD + 1, TOP)
    expected = {
        (zero, zero): [[0, 0], [0, 1]],
        (zero, one): [[0, 0], [1, 2]],
        (zero, two): [[0, 0], [2, 0]],
        (one, zero): [[0, 1], [0, 3]],
        (one, one): [[1, 2], [3, 4]],
        (one, two): [[2, 0], [4, 0]],
        (two, zero): [[0, 3], [0, 0]],
        (two, one): [[3, 4], [0, 0]],
        (two, two): [[4, 0], [0, 0]],
    }
    x = torch.stack((image, 10 * image)).expand(9, 2, 2, 2)
    right = torch.tensor(list(expected.values()), dtype=torch.float32)
    for end in (0, 1):  # the first and the last word of each offset
        words = four(*((top[end], left[end]) for top, left in expected))
        assert torch.equal(vecfl.crop(1)(x, words), torch.stack((right, 10 * right), 1))


def test_crop_of_another_memory_format() -> None:
    x, words = torch.rand(5, 3, 6, 7), torch.randint(2**32, (5, 4))
    last = x.to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    assert torch.equal(vecfl.crop(2)(last, words), vecfl.crop(2)(x, words))


def test_flip_by_hand() -> None:
    """Left becomes right where word 0 is below 2^31; rows stay where they are."""
    image = torch.tensor([[[1.0, 2, 3], [4, 5, 6]]])
    mirrored = torch.tensor([[[3.0, 2, 1], [6, 5, 4]]])
    words = four((0,), (HALF - 1,), (HALF,), (TOP,))
    expected = torch.stack((mirrored, mirrored, image, image))
    assert torch.equal(vecfl.flip()(image.expand(4, 1, 2, 3), words), expected)


def test_normalise_by_hand() -> None:
    """(0.75 - 0.25) / 0.5 = 1 and (0.75 - 1) / 0.125 = -2; bytes count from 0 to 1."""
    transform = vecfl.normalise([0.25, 1.0], [0.5, 0.125])
    x = torch.full((3, 2, 4, 5), 0.75)
    right = torch.tensor([1.0, -2]).view(2, 1, 1).expand_as(x)
    assert torch.equal(transform(x), right)
    assert torch.equal(transform(x.expand(2, 3, 2, 4, 5)), right.expand(2, 3, 2, 4, 5))
    white = {"x": torch.full((2, 1, 2, 2), 255, dtype=torch.uint8), "y": torch.tensor([0, 1])}
    task = Task(head(4), vecfl.cross_entropy, example=white, augment=[vecfl.normalise([0.5], [2])])
    assert torch.equal(task.prepare(white)["x"], torch.full((2, 1, 2, 2), 0.25))


def test_order_matters() -> None:
    """Cropped before normalise(1, 2) the edge is black, -1/2; behind it 0, the mean."""
    x, both = torch.ones(1, 1, 2, 2), (vecfl.crop(1), vecfl.normalise([1.0], [2.0]))
    edges = []
    for transforms in (both, both[::-1]):
        results = [augmented(x, transforms, STREAMS[0], seed) for seed in range(40)]
        edges.append({v for r in results for v in r.flatten().tolist()})
    assert edges == [{0.0, -0.5}, {0.0}]


# ------------------------------------------------------------------ draws


def test_the_counter_by_hand() -> None:
    """Example 2 of client 8 at place 3: block 2, client 8, 5 << 10 | 7, 4 << 28 | 3 << 20 | 9."""
    counter = torch.tensor([2, 8, 5 * 1024 + 7, 4 * 2**28 + 3 * 2**20 + 9])
    words = draw(SEED, STREAMS, [1, 3], 4)
    assert [w.shape for w in words] == [(2 * 4, 4)] * 2
    assert torch.equal(words[1][4 + 2], philox(counter, SEED))


NAMES = st.lists(
    st.sampled_from([("crop", 1), ("crop", 2), ("flip",), ("normalise", (0.5, -1.0), (0.2, 3.0))]),
    min_size=1,
    max_size=4,
)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**20 - 1), st.integers(1, 6), NAMES)
@settings(deadline=None, max_examples=60)
def test_examples_are_those_of_the_oracle(
    seed: int, step: int, size: int, names: list[tuple]
) -> None:
    clients = (5, 0, 2**32 - 1)
    x = torch.rand(len(clients), size, 2, 3, 4, dtype=torch.float64)
    streams = stream(Kind.DROPOUT, client=torch.tensor(clients), round=6, step=step)
    ours = augmented(x, bridge.transforms(tuple(names)), streams, seed)
    for s, client in enumerate(clients):
        theirs = augment(x[s].numpy(), tuple(names), Place(seed, 6, client, step=step))
        assert np.array_equal(ours[s].numpy(), theirs)
        alone = augmented(x[s], bridge.transforms(tuple(names)), streams[s], seed)
        assert torch.equal(alone, ours[s])


@pytest.mark.parametrize("valid", [1, 3, 5])
def test_examples_that_follow_change_nothing(valid: int) -> None:
    transforms, x = (
        (vecfl.crop(2), vecfl.flip(), vecfl.normalise([0.3] * 2, [0.5] * 2)),
        IMAGES["x"],
    )
    whole = augmented(x, transforms, STREAMS[0], SEED)
    assert torch.equal(augmented(x[:valid], transforms, STREAMS[0], SEED), whole[:valid])


def test_offsets_and_flips_are_evenly_drawn() -> None:
    """Pixel (r, c) of an image of 11 x 11 holds 11 r + c, so the centre of a crop(4) tells its
    offset, and the pixel beside it the flip: it holds 1 less or 1 more. 162 steps of 512 examples
    fill 81 x 2 cells with 512 each. Chi-square with 161 degrees of freedom exceeds 261.1 with
    p = 1e-6 over seeds.
    """
    streams = stream(Kind.DROPOUT, client=9, step=torch.arange(162))
    x = torch.arange(121.0).view(1, 1, 1, 11, 11).expand(162, 512, 1, 11, 11)
    out = augmented(x, (vecfl.crop(4), vecfl.flip()), streams, SEED)
    centre, beside = out[:, :, 0, 5, 5].flatten().long(), out[:, :, 0, 5, 4].flatten().long()
    top, left = centre // 11 - 1, centre % 11 - 1
    cells = (2 * (9 * top + left) + (beside > centre)).bincount(minlength=162)
    assert len(cells) == 162 and set((centre - beside).tolist()) == {-1, 1}
    assert ((cells - 512.0) ** 2 / 512).sum() < 261.1


@pytest.mark.parametrize("other", ["client", "round", "occurrence", "step", "position", "seed"])
def test_the_same_image_looks_different_elsewhere(other: str) -> None:
    """Two looks of 162 agree with p = 1/162: among 1,024 pairs 6.3 are expected, more than 30 have
    p = 6e-12 by Poisson's law."""
    streams = stream(Kind.DROPOUT, client=torch.arange(1024), step=3)
    x = torch.arange(1.0, 122).view(1, 1, 1, 11, 11).expand(1024, 2, 1, 11, 11)
    transforms = (vecfl.crop(4), vecfl.flip())
    here = augmented(x, transforms, streams, SEED)
    if other == "position":
        pairs = here.unbind(1)
    else:
        place = {"client": torch.arange(1024), "step": 3} | (
            {"client": torch.arange(1024) + 1024} if other == "client" else {other: 4}
        )
        moved = streams if other == "seed" else stream(Kind.DROPOUT, **place)
        there = augmented(x, transforms, moved, SEED + (other == "seed"))
        pairs = here[:, 0], there[:, 0]
    agree = int((pairs[0] == pairs[1]).flatten(1).all(1).sum())
    assert agree <= 30
    assert torch.equal(augmented(x, transforms, streams, SEED), here)


# ------------------------------------------------------------------ rounds


class Seen(nn.Module):
    """w times its input, summed: the gradient of w is the input."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.w).flatten(1).sum(1)


def head(features: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 3))


def total(output: Tensor, batch: Columns) -> tuple[Tensor, Tensor]:
    return output, torch.ones_like(output)


KINDS = [("loop", 1, 1), ("loop", 3, 1), ("loop", 1, 3), ("vmap", 3, 1), ("vmap", 2, 2)]
BOTH: Transforms = (("crop", 2), ("flip",), ("normalise", (0.1, 0.2), (0.5, 0.25)))


@pytest.mark.parametrize("backend, slots, workers", KINDS)
def test_a_client_sees_its_images_as_the_contract_says(
    backend: str, slots: int, workers: int
) -> None:
    """w = 0, lr = 1, one example, two epochs: a client sends what it saw, the sum of two looks at
    its image, those of its steps 0 and 1. The gradient does not depend on w."""
    clients = [
        {"x": torch.rand(1, 2, 4, 5, generator=G, dtype=torch.float64), "y": torch.zeros(1)}
        for _ in range(5)
    ]
    setting = Setting(rounds=2, seed=SEED, lr=1.0, epochs=2, augment=BOTH)
    kind: dict[str, Any] = {"backend": backend, "slots": slots, "workers": workers}
    run = bridge.run_vecfl(Seen(2, 4, 5).double(), total, clients, setting, **kind)
    for t in range(2):
        for k, columns in enumerate(clients):
            looks = [augment(columns["x"].numpy(), BOTH, Place(SEED, t, k, step=s)) for s in (0, 1)]
            assert not np.array_equal(*looks)
            [(row, _)] = run.updates[t][k]
            torch.testing.assert_close(
                row, torch.from_numpy(sum(looks)).flatten(), rtol=1e-12, atol=1e-12
            )


@pytest.mark.parametrize("problem", AUGMENTED)
def test_slots_and_workers_change_no_bits(problem: str) -> None:
    """Of the loop, and of dense layers side by side in two slots or more."""
    together = [("vmap", s, w) for s, w in ((2, 1), (3, 1), (len(SIZES) + 2, 1), (2, 2))]
    kinds = {"loop": [("loop", s, w) for s, w in ((1, 1), (3, 1), (9, 1), (1, 3))]}
    if problem == "images":
        kinds |= {"vmap": together, "stacked": [("stacked", *rest) for _, *rest in together]}
    p = AUGMENTED[problem]
    setting = Setting(rounds=1, seed=SEED, optimizer="adam", lr=0.05, epochs=2, augment=p.augment)
    for variants in kinds.values():
        first: dict[int, Tensor] = {}
        for backend, slots, workers in variants:
            kind: dict[str, Any] = {"backend": backend, "slots": slots, "workers": workers}
            run = bridge.run_vecfl(p.build(), p.loss, p.clients(), setting, **kind)
            rows = {k: row for k, [(row, _)] in run.updates[0].items()}
            assert {k for k, row in rows.items() if row.any()} == {0, 2, 3, 4, 5, 6}
            first = first or rows
            torch.testing.assert_close(rows, first, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["loop", "vmap", "stacked"])
def test_a_nan_stays_with_its_client(backend: str) -> None:
    """Client 3 is the longest: it sits first, and idle slots copy its examples."""
    p, runs = AUGMENTED["images"], []
    setting = Setting(rounds=1, seed=SEED, epochs=2, augment=p.augment)
    for spoil in (1.0, float("nan")):
        clients = p.clients()
        clients[3]["x"][0] *= spoil
        run = bridge.run_vecfl(p.build(), p.loss, clients, setting, backend=backend, slots=3)
        runs.append({k: row for k, [(row, _)] in run.updates[0].items() if k != 3})
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_the_loss_sees_what_the_module_sees() -> None:
    """A module that gives back its input has loss 0 where its target is the augmented image."""

    def reconstruction(output: Tensor, batch: Columns) -> tuple[Tensor, None]:
        return (output - batch["x"]).square().flatten(1).sum(1), None

    module = nn.Conv2d(2, 2, 1, bias=False)
    nn.init.dirac_(module.weight)
    for backend in ("loop", "vmap"):
        sim = simulation(module, [vecfl.crop(1)], backend=backend, loss=reconstruction)
        _, metrics = sim.round(sim.start())
        assert metrics["train/loss"] == 0


def simulation(
    module: nn.Module,
    transforms: Sequence[Transform],
    backend: str = "loop",
    loss: Callable = vecfl.cross_entropy,
    columns: Columns = IMAGES,
) -> Simulation:
    data = vecfl.FederatedDataset.from_arrays(columns, torch.tensor([0, 0, 0, 1, 1, 2]))
    task = Task(module, loss, example=data.examples(2), augment=transforms)
    work = vecfl.fedavg(lr=0.1, batches=Batches(2))
    return Simulation(task, data, work, vecfl.everyone(), backend=backend, slots=2, seed=5)


# ------------------------------------------------------------------ evaluation and copies


def test_evaluation_normalises_and_does_no_more() -> None:
    """The same model on images that were normalised before, by a task that augments nothing."""
    module, mean, std = head(24), torch.tensor([0.3, 0.6]), torch.tensor([0.5, 0.25])
    shape = (2, 1, 1)
    before = IMAGES | {"x": (IMAGES["x"] - mean.view(shape)) / std.view(shape)}
    transforms = (vecfl.crop(2), vecfl.flip(), vecfl.normalise([0.3, 0.6], [0.5, 0.25]))
    ours, plain = simulation(module, transforms), simulation(module, [], columns=before)
    w = ours.task.layout.flatten(ours.task.module)
    assert evaluate(ours.task, w, IMAGES) == evaluate(plain.task, w, before)
    found = evaluate_clients(ours.task, w, ours.data)
    for name, right in evaluate_clients(plain.task, w, plain.data).items():
        assert np.array_equal(found[name], right)
    assert ours.evaluate(ours.start(), IMAGES) == plain.evaluate(plain.start(), before)
    raw = simulation(module, [])
    assert raw.evaluate(raw.start(), IMAGES) != plain.evaluate(plain.start(), before)


@pytest.mark.parametrize("backend", ["loop", "vmap", "stacked"])
def test_normalise_alone_trains_as_on_images_that_were_normalised_before(backend: str) -> None:
    columns = IMAGES | {"x": (IMAGES["x"] - 0.5) / 0.25}
    transforms, module = [vecfl.normalise([0.5, 0.5], [0.25, 0.25])], head(24)
    ours, plain = (
        simulation(module, transforms, backend),
        simulation(module, [], backend, columns=columns),
    )
    assert not ours.task.keyed
    model, _ = ours.round(ours.start())
    right, _ = plain.round(plain.start())
    assert torch.equal(model.server["w"], right.server["w"])


def test_copies_augment_alike_in_their_dtype() -> None:
    task = Task(
        head(24), vecfl.cross_entropy, example=IMAGES, augment=[vecfl.crop(2), vecfl.flip()]
    )
    task.draws.seed = SEED
    single = task.prepare(IMAGES, STREAMS[0])["x"]
    double = task.to("cpu", torch.float64).prepare(IMAGES, STREAMS[0])["x"]
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert torch.equal(single.double(), double) and not torch.equal(single, IMAGES["x"])


def test_keyed_says_whether_a_step_augments_at_random() -> None:
    def keyed(*transforms: Transform) -> bool:
        return Task(head(24), vecfl.cross_entropy, example=IMAGES, augment=transforms).keyed

    assert not keyed() and not keyed(vecfl.normalise([0, 0], [1, 1]))
    assert keyed(vecfl.crop(1)) and keyed(vecfl.normalise([0, 0], [1, 1]), vecfl.flip())


# ------------------------------------------------------------------ transforms of one's own


def negate(x: Tensor, words: Tensor) -> Tensor:
    """-x where word 0 has its highest bit."""
    sign = 1 - 2 * (words[:, 0] >> 31)
    return x * sign.view(-1, *(1,) * (x.dim() - 1))


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_a_transform_of_ones_own_takes_any_input(backend: str) -> None:
    """Features [5], no images. w = 0, lr = 1, one step: clients send x or -x, by their words."""
    x = torch.rand(40, 5, generator=G) + 1
    data = vecfl.FederatedDataset.from_arrays({"x": x}, torch.arange(40))
    task = Task(Seen(5), total, example=data.examples(2), augment=[negate])
    updates: list[dict] = [{}]
    work = bridge.recorded(vecfl.fedavg(lr=1.0, batches=Batches(1)), updates)
    sim = Simulation(task, data, work, vecfl.everyone(), backend=backend, slots=4, seed=SEED)
    sim.round(sim.start())
    drawn = [int(words_of.words(SEED, words_of.AUGMENT, 1, client=k)[0]) for k in range(40)]
    signs = [-1.0 if word >= HALF else 1.0 for word in drawn]
    assert {-1.0, 1.0} == set(signs)
    assert {k: row.tolist() for k, [(row, _)] in updates[0].items()} == {
        k: (sign * x[k]).tolist() for k, sign in enumerate(signs)
    }
    assert torch.equal(task.prepare({"x": x})["x"], x)  # evaluation


def test_the_first_of_several_inputs_is_augmented() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(24 + 4, 3)

        def forward(self, image: Tensor, other: Tensor) -> Tensor:
            return self.head(torch.cat((image.flatten(1), other.flatten(1)), 1))

    columns = {"image": IMAGES["x"], "other": torch.rand(6, 1, 2, 2), "y": IMAGES["y"]}
    task = Task(
        Two(),
        vecfl.cross_entropy,
        example=columns,
        inputs=("image", "other"),
        augment=[vecfl.crop(2)],
    )
    ready = task.prepare(columns, STREAMS[0])
    assert ready["other"] is columns["other"]
    assert not torch.equal(ready["image"], columns["image"])


# ------------------------------------------------------------------ what is refused


def mixup(x: Tensor, words: Tensor) -> Tensor:
    return (x + x.flip(0)) / 2


def draws_itself(x: Tensor, words: Tensor) -> Tensor:
    return x + torch.rand(())


def draws_from_numpy(x: Tensor, words: Tensor) -> Tensor:
    return x + float(np.random.default_rng().random())


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "no padding": (lambda: vecfl.crop(0), "crop takes a padding of at least 1 pixel, not 0"),
    "half a pixel": (lambda: vecfl.crop(1.5), "crop takes a padding of at least 1 pixel, not 1.5"),
    "std of 0": (
        lambda: vecfl.normalise([0.5], [0.0]),
        "normalise takes finite means and positive stds, not [0.5] and [0.0]",
    ),
    "mean of nan": (
        lambda: vecfl.normalise([float("nan")], [1.0]),
        "normalise takes finite means and positive stds, not [nan] and [1.0]",
    ),
    "no std": (
        lambda: vecfl.normalise([0.5, 0.5], [1.0]),
        "normalise takes mean and std of every channel, not 2 and 1",
    ),
    "no channel": (
        lambda: vecfl.normalise([], []),
        "normalise takes mean and std of every channel, not 0 and 0",
    ),
    "a number": (
        lambda: vecfl.normalise(0.5, 1.0),
        "normalise takes mean and std as one number per channel: [0.5]",
    ),
    "no tuple": (
        lambda: tried(vecfl.crop(4)),
        "augment takes a tuple of transforms, such as (crop(4), flip()), not Crop(padding=4)",
    ),
    "no transform": (
        lambda: tried(["flip"]),
        "augment takes a tuple of transforms, such as (crop(4), flip()), not ['flip']",
    ),
    "too many": (lambda: tried([vecfl.flip()] * 257), "augment takes 256 transforms at most"),
    "a builder": (
        lambda: tried([vecfl.flip]),
        "augment failed on the example batch [4, 2, 3, 4]: flip() takes 0 positional arguments but "
        "2 were given",
    ),
    "other channels": (
        lambda: tried([vecfl.normalise([0.5], [1.0])]),
        "normalise: mean and std have 1 number each, but images [2, 3, 4] [C, H, W] have 2 "
        "channels",
    ),
    "padded too far": (
        lambda: tried([vecfl.crop(3)]),
        "crop(3) may leave nothing of an image of 3 x 4: pad by less",
    ),
    "another shape": (
        lambda: tried([vecfl.flip(), lambda x, words: x[:, :, 1:]]),
        "augment[1] must keep shape and dtype, but makes [2, 2, 4] torch.float64 of [2, 3, 4] "
        "torch.float64",
    ),
    "mixup": (
        lambda: tried([mixup]),
        "the module, the loss or augment mixes the examples of a batch: one more example changes "
        "the loss or gradient of the others, so padding would change results; keep examples apart",
    ),
    "another dtype": (
        lambda: tried([lambda x, words: x.float()]),
        "augment[0] must keep shape and dtype, but makes [2, 3, 4] torch.float32 of [2, 3, 4] "
        "torch.float64",
    ),
    "a generator of its own": (
        lambda: tried([draws_from_numpy]),
        "augment draws from a random generator, which differs between backends; use the words "
        "that it is given",
    ),
    "torch's generator": (
        lambda: tried([draws_itself]),
        "augment draws from a random generator, which differs between backends; use the words "
        "that it is given",
    ),
} | {
    f"{name} of no images": (
        lambda t=transform: tried([t], x=torch.rand(6, 24)),
        f"{name} takes images [C, H, W], but an example of the first input is [24]",
    )
    for name, transform in {
        "crop": vecfl.crop(1),
        "flip": vecfl.flip(),
        "normalise": vecfl.normalise([0.5], [0.5]),
    }.items()
} | {
    "integers": (
        lambda: tried([vecfl.normalise([0, 0], [1, 1])], x=torch.ones(6, 2, 3, 4).long()),
        "normalise takes uint8 or floats, not torch.int64",
    ),
}  # fmt: skip


def tried(transforms: Any, x: Tensor = IMAGES["x"]) -> Task:
    columns = IMAGES | {"x": x}
    return Task(head(24), vecfl.cross_entropy, example=columns, augment=transforms)


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_is_refused(case: tuple[Callable[[], object], str]) -> None:
    made, message = case
    with pytest.raises(InputError) as error:
        made()
    assert str(error.value) == message


@pytest.mark.parametrize("backend", ["loop", "vmap", "stacked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_transform_may_write_into_its_images(backend: str, dtype: torch.dtype) -> None:
    def erase(x: Tensor, words: Tensor) -> Tensor:
        x[..., :2, :2] = 0
        return x

    def erased(x: Tensor, words: Tensor) -> Tensor:
        keep = torch.ones_like(x[0])
        keep[..., :2, :2] = 0
        return x * keep

    data = vecfl.FederatedDataset.from_arrays(
        {"x": torch.rand(6, 2, 3, 4).to(dtype), "y": torch.arange(6) % 2}, [0, 0, 0, 1, 1, 1]
    )
    before, models = data.columns["x"].clone(), []
    for transform in (erase, erased):
        torch.manual_seed(0)
        task = Task(head(24), vecfl.cross_entropy, example=data.examples(4), augment=[transform])
        work = vecfl.fedavg(lr=0.5, batches=Batches(2, epochs=2))
        sim = Simulation(task, data, work, vecfl.everyone(), backend=backend, dtype=dtype)
        models.append(sim.round(sim.start())[0].server["w"])
    assert torch.equal(*models) and torch.equal(data.columns["x"], before)


def test_evaluation_data_of_other_channels_are_refused() -> None:
    sim = simulation(
        nn.Sequential(nn.AdaptiveAvgPool3d((1, 3, 4)), head(12)), [vecfl.normalise([0, 0], [1, 1])]
    )
    other = {"x": torch.rand(3, 1, 3, 4), "y": torch.tensor([0, 1, 2])}
    with pytest.raises(
        InputError, match=r"mean and std have 2 numbers each, but images \[1, 3, 4\] "
    ):
        sim.evaluate(sim.start(), other)
