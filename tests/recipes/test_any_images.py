"""The recipe of MNIST's writers on data of other formats, on small files of them."""

import csv
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.data.files import packed, parquet_file, tff_file
from tests.data.real import DATA, real
from vecfl.data import FederatedDataset, hold_out, read
from vecfl.data import __main__ as command

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "mnist_writers.py"
PEOPLE = ["ann", "bob", "cleo", "dan", "eve"]


def pixels(seed: int, n: int = 4, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 28, 28], a bar of which shows the class, and the classes [n]."""
    images = np.random.default_rng(seed).integers(0, 100, (n, 28, 28)).astype(np.uint8)
    y = np.arange(n) % classes
    for image, label in zip(images, y, strict=True):
        image[5 * label : 5 * label + 5] = 255
    return images, y


def leaf(path: Path, people: list[str], classes: int = 3) -> Path:
    """Floats in [0, 1], 784 an image."""
    data = {}
    for k, who in enumerate(people):
        x, y = pixels(k, classes=classes)
        data[who] = {"x": (x.reshape(4, 784) / 255).tolist(), "y": y.tolist()}
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps({"users": people, "num_samples": [4] * len(people)} | {"user_data": data})
    )
    return path


def leaf_pair(path: Path) -> Path:
    path.mkdir()
    leaf(path / "train" / "a.json", PEOPLE[:4])
    leaf(path / "test" / "a.json", [*PEOPLE[3:], "fay"])
    return path


def leaf_file(path: Path) -> Path:
    return leaf(path.with_suffix(".json"), PEOPLE)


def tff_pair(path: Path) -> Path:
    path.mkdir()
    for part, people in (("train", PEOPLE), ("test", PEOPLE)):
        clients = {}
        for k, who in enumerate(people):
            x, y = pixels(k)
            clients[who] = {"pixels": (x / 255).astype(np.float32), "label": y.astype(np.int32)}
        tff_file(path / f"fed_{part}.h5", clients)
    return path


def hugging_face(path: Path) -> Path:
    drawn = [pixels(k) for k in range(len(PEOPLE))]
    return parquet_file(
        path.with_suffix(".parquet"),
        image=[packed(image) for x, _ in drawn for image in x],
        writer_id=list(np.repeat(PEOPLE, 4)),
        hsf_id=[0] * 20,
        character=[int(label) for _, y in drawn for label in y],
    )


def table(path: Path) -> Path:
    """Whole numbers of 0 to 255."""
    path = path.with_suffix(".csv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["who", "class", *(f"pixel{i}" for i in range(784))])
        for k, who in enumerate(PEOPLE):
            x, y = pixels(k)
            writer.writerows([who, c, *row] for c, row in zip(y, x.reshape(4, 784), strict=True))
    return path


def archive(path: Path) -> Path:
    """uint8 [n, 28, 28]; the clients have a name of their own."""
    x, y = (np.concatenate(part) for part in zip(*map(pixels, range(5)), strict=True))
    np.savez(path.with_suffix(".npz"), x=x, y=y, who=np.repeat(PEOPLE, 4))
    return path.with_suffix(".npz")


def store(path: Path) -> Path:
    command.convert(leaf_file(path), path)
    return path


def stores(path: Path) -> Path:
    command.convert(leaf_pair(path.with_name("leaf")), path)
    return path


BOTH = {"unseen_clients", "unseen_examples"}
KNOWN: dict[Any, tuple[str, set[str]]] = {
    leaf_pair: ("", BOTH),
    leaf_file: ("", {"unseen_clients"}),
    tff_pair: ("", {"unseen_examples"}),
    hugging_face: ("--client=writer_id --label=character", {"unseen_clients"}),
    table: ("--client=who --label=class", {"unseen_clients"}),
    archive: ("--client=who", {"unseen_clients"}),
    store: ("", {"unseen_clients"}),
    stores: ("", BOTH),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the recipe, two rounds unless told, and gives the metrics of the last; out is `out`."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str, out: str = "out") -> dict[str, Any]:
        common = ["--rounds=2", "--cohort=2", "--backend=loop", "--workers=1", "--slots=1"]
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *common, *flags, f"--out={out}"])
        runpy.run_path(str(RECIPE), run_name="__main__")
        last: dict[str, Any] = json.loads(Path(out, "metrics.jsonl").read_text().splitlines()[-1])
        return last

    return run


@pytest.mark.parametrize("write", KNOWN, ids=lambda write: write.__name__)
def test_data_of_every_format(run: Any, tmp_path: Path, write: Any) -> None:
    flags, parts = KNOWN[write]
    last = run(f"--data={write(tmp_path / 'data')}", *flags.split())
    assert {key.split("/")[0] for key in last if key.startswith("unseen")} == parts
    assert torch.load("out/model.pt")["1.weight"].shape == (3, 784)  # three classes
    settings = yaml.safe_load(Path("out/config.yaml").read_text())
    held_out = write not in (leaf_pair, tff_pair, stores)
    assert settings["test_clients"] == (0.2 if held_out else None)


def test_pixels_are_scaled_whatever_they_came_in(run: Any, tmp_path: Path) -> None:
    # The same images as floats in [0, 1], as whole numbers in CSV, as images of bytes and as bytes.
    losses = []
    for write in (leaf_file, table, hugging_face, archive):
        path = write(tmp_path / write.__name__)
        last = run(f"--data={path}", *KNOWN[write][0].split(), out=write.__name__ + "-run")
        losses.append([last["train/loss"], last["unseen_clients/loss"]])
    assert losses == [pytest.approx(losses[0], rel=1e-4)] * 4
    # The loss of a model of zeros is log 3 for three classes; pixels of 0 to 255 would explode.
    assert 0.01 < losses[0][0] < 3


def test_training_and_test_images_are_scaled_alike(tmp_path: Path) -> None:
    # The test images happen to have no pixel above 1: they are bytes all the same.
    recipe = runpy.run_path(str(RECIPE))
    for kind in (torch.uint8, torch.int64, torch.float32):
        bright = torch.tensor([0, 255, 7, 1]).repeat(196).view(1, 784).to(kind)
        dark = torch.tensor([0, 1, 1, 0]).repeat(196).view(1, 784).to(kind)
        largest = max(recipe["checked_images"](data_of(x), "here") for x in (bright, dark))
        made = [recipe["images"](data_of(x), largest).columns["x"] for x in (bright, dark)]
        assert [x.dtype for x in made] == [torch.uint8] * 2 and made[1].max() == 1
        # Alone they are black and white: 1 is white, whatever they came in.
        alone = recipe["images"](data_of(dark), recipe["checked_images"](data_of(dark), "here"))
        assert alone.columns["x"].dtype == torch.float32 and alone.columns["x"].max() == 1


def data_of(x: torch.Tensor) -> FederatedDataset:
    return FederatedDataset.from_arrays({"x": x, "y": torch.zeros(len(x)).long()}, [0] * len(x))


def test_more_classes_make_a_larger_model(run: Any, tmp_path: Path) -> None:
    # Labels 0 and 1, and among the test data 6: seven classes, by the largest label of both.
    (tmp_path / "data").mkdir()
    leaf(tmp_path / "data" / "train" / "a.json", PEOPLE, classes=2)
    last = leaf(tmp_path / "data" / "test" / "a.json", PEOPLE, classes=2)
    last.write_text(last.read_text().replace('"y": [0, 1, 0, 1]', '"y": [0, 1, 0, 6]'))
    run(f"--data={tmp_path / 'data'}", "--model=cnn", "--rounds=1")
    assert torch.load("out/model.pt")["10.weight"].shape == (7, 128)


def test_held_out_clients_by_seed(run: Any, tmp_path: Path) -> None:
    path = table(tmp_path / "data")
    options = [f"--data={path}", "--client=who", "--label=class"]
    last = run(*options, "--test-clients=0.4", "--seed=3")
    assert yaml.safe_load(Path("out/config.yaml").read_text())["data_seed"] == 3
    data = read(path, client="who", label="class")[0]
    held = hold_out(data, 3, clients=0.4).test_clients
    assert held is not None and held.num_clients == 2
    saved = torch.load("out/model.pt")
    pixels = held.columns["x"].double() / 255
    output = pixels @ saved["1.weight"].double().T + saved["1.bias"]
    right = torch.nn.functional.cross_entropy(output, held.columns["y"]).item()
    assert last["unseen_clients/loss"] == pytest.approx(right, rel=1e-5) == last["eval/loss"]
    again = run("--config=out/config.yaml", out="again")
    assert again["eval/loss"] == last["eval/loss"]
    other = run(*options, "--test-clients=0.4", "--seed=3", "--data-seed=4", out="other")
    assert other["eval/loss"] != last["eval/loss"]


def test_unseen_clients_and_unseen_examples_by_hand(run: Any, tmp_path: Path) -> None:
    # ann to dan train; dan, eve and fay test, four images each: dan's are unseen examples.
    last = run(f"--data={leaf_pair(tmp_path / 'data')}", "--cohort=4", "--lr=0.01")
    model = torch.nn.Linear(784, 3)
    saved = torch.load("out/model.pt")
    model.load_state_dict({name.removeprefix("1."): value for name, value in saved.items()})
    test = read(tmp_path / "data")[1]
    assert test is not None
    losses = {}
    for name, people in (("unseen_examples", ["dan"]), ("unseen_clients", ["eve", "fay"])):
        parts = [test.client(test.position(who)) for who in people]
        x, y = (torch.cat([part[column] for part in parts]) for column in "xy")
        losses[name] = torch.nn.functional.cross_entropy(model(x.flatten(1)), y).item()
        assert last[f"{name}/loss"] == pytest.approx(losses[name], rel=1e-5)
    assert losses["unseen_examples"] != pytest.approx(losses["unseen_clients"], rel=1e-3)
    mean = (losses["unseen_examples"] + 2 * losses["unseen_clients"]) / 3
    assert last["eval/loss"] == pytest.approx(mean, rel=1e-5)


def archive_of(**arrays: Any) -> Any:
    """Writes an NPZ archive with these arrays in place of good ones."""

    def write(path: Path) -> Path:
        x, y = pixels(0)
        good = {"x": x, "y": y, "client": np.arange(4)}
        np.savez(path.with_suffix(".npz"), **{**good, **arrays})
        return path.with_suffix(".npz")

    return write


BAD = {
    "colour": (
        archive_of(x=np.zeros((4, 3, 32, 32), np.uint8)),
        "column 'x' is [4, 3, 32, 32]; expected images [n, 1, 28, 28], [n, 28, 28] or [n, 784]",
    ),
    "negative": (
        archive_of(x=np.full((4, 784), -0.5, np.float32)),
        "column 'x' has values from -0.5 to -0.5; expected 0 to 1, or whole numbers from 0 to 255",
    ),
    "too bright": (
        archive_of(x=np.full((4, 784), 256)),
        "column 'x' has values from 256 to 256; expected 0 to 1, or whole numbers from 0 to 255",
    ),
    "between": (
        archive_of(x=np.full((4, 784), 1.5)),
        "column 'x' has values from 1.5 to 1.5; expected 0 to 1, or whole numbers from 0 to 255",
    ),
    "float labels": (
        archive_of(y=np.zeros(4)),
        "column 'y' is torch.float64 [4]; expected an integer for each image",
    ),
    "labels that are ids": (
        archive_of(y=np.arange(4) + 10**9),
        "labels from 1000000000 to 1000000003; expected classes, counted from 0, fewer than 10,000",
    ),
    "labels below 0": (
        archive_of(y=np.arange(4) - 1),
        "labels from -1 to 2; expected classes, counted from 0, fewer than 10,000",
    ),
    "one client": (
        archive_of(client=np.zeros(4, np.int64)),
        "clients: there is one client, which must train: get more clients, or hold out examples of "
        "it (samples=)",
    ),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_what_is_no_such_data_is_one_line(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    write, said = BAD[kind]
    path = write(tmp_path / "data")
    with pytest.raises(SystemExit) as caught:
        run(f"--data={path}")
    flag = "--test-clients: " if kind == "one client" else ""
    assert (caught.value.code, capsys.readouterr().err) == (2, f"error: {flag}{path}: {said}\n")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "error: {path}: CSV needs the option 'client'\n"),
        ("--client=nobody --label=class", "error: {path}: no column 'nobody'; it has ['who', 'cl"),
        ("--client=who --label=class --cohort=9", "error: --cohort: expected at most 4 (training"),
    ],
)
def test_wrong_options_are_one_line(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, said: str
) -> None:
    path = table(tmp_path / "data")
    with pytest.raises(SystemExit) as caught:
        run(f"--data={path}", *flags.split())
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.startswith(said.format(path=path))
    assert err.count("\n") == 1


def test_client_needs_data(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--client=who")
    assert capsys.readouterr().err == "error: --client: expected none without --data, got who\n"


@real("mnist_writers")
@pytest.mark.parametrize(
    ("folder", "flags", "part"),
    [
        ("leaf", "--lr=0.03", "unseen_examples"),
        ("tff", "--lr=0.03", "unseen_examples"),
        ("hf", "--client=writer_id --label=character", "unseen_clients"),
    ],
)
def test_the_writers_digits_in_other_formats(run: Any, folder: str, flags: str, part: str) -> None:
    last = run(
        f"--data={DATA / 'mnist_writers' / folder}", "--rounds=20", "--cohort=10", *flags.split()
    )
    assert last["eval/accuracy"] == last[f"{part}/accuracy"] > 0.6
