"""The README's snippets run: those on formats on small files, the others one after the other."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import vecfl
from tests.data.files import hdf5_file, packed, parquet_file, tff_file
from tests.data.test_examples import batch
from tests.data.test_flute import GOOD
from tests.data.test_leaf import document
from tests.persist.tiny import arguments, make_simulation, run
from vecfl.data import FederatedDataset

ROOT = Path(__file__).resolve().parents[1]
SECTION = re.compile(r"<!-- formats: .*?-->(.*)<!-- /formats -->", re.DOTALL)
README = (ROOT / "README.md").read_text("utf-8")
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SNIPPETS = PYTHON.findall(SECTION.findall(README)[0])
OTHERS = PYTHON.findall(SECTION.sub("", README))
AUGMENTATION, LOADING = (
    OTHERS.pop(next(k for k, text in enumerate(OTHERS) if word in text))
    for word in ("vecfl.crop", "load_run")
)


def write_leaf() -> None:
    femnist = document(f1={"x": [[0.5] * 784], "y": [3]})
    shakespeare = document(HAMLET={"x": ["to be or not" * 6 + "to be or"], "y": ["n"]})
    for name, content in (("femnist", femnist), ("shakespeare", shakespeare)):
        for part in ("train", "test"):
            folder = Path(f"leaf/{name}/data/{part}")
            folder.mkdir(parents=True)
            (folder / "all.json").write_text(json.dumps(content))


def write_tff() -> None:
    emnist = {"f1": {"pixels": np.zeros((2, 28, 28), np.float32), "label": [1, 2]}}
    shakespeare = {"HAMLET": {"snippets": ["to be, or not", "aye"]}}
    for name, clients in (("emnist", emnist), ("shakespeare", shakespeare)):
        Path(f"tff/{name}").mkdir(parents=True)
        for part in ("train", "test"):
            tff_file(Path(f"tff/{name}/{name}_{part}.h5"), clients)


def write_parquet() -> None:
    for name in ("femnist", "cifar10"):
        Path(f"hf/{name}").mkdir(parents=True)
    image = packed(np.zeros((28, 28)))
    parquet_file(Path("hf/femnist/0.parquet"), image=[image], writer_id=["f1"], character=[5])
    images = [packed(np.zeros((32, 32, 3)))] * 40
    for part in ("train", "test"):
        path = Path(f"hf/cifar10/{part}-0.parquet")
        parquet_file(path, img=images, label=[k % 10 for k in range(40)])


def write_tables() -> None:
    Path("cleveland.csv").write_text("age,chol,target\n63,233,1\n")
    Path("hungarian.csv").write_text("age,chol,target\n28,?,0\n")
    for name in ("a", "b"):
        Path(f"{name}.csv").write_text("user,speed,activity\n7,1.5,walks\n8,0.5,sits\n")
    np.savez("phones.npz", features=np.ones((2, 3)), activity=[0, 1], user=[7, 8])


def write_cifar() -> None:
    Path("cifar-100-binary").mkdir()
    Path("cifar-100-binary/train.bin").write_bytes(batch(1, 2) * 10)
    Path("cifar-100-binary/test.bin").write_bytes(batch(1, 2))


def write_flute() -> None:
    Path("flute").mkdir()
    hdf5_file(Path("flute/train_data.hdf5"), GOOD)


WRITERS = [write_leaf, write_tff, write_flute, write_parquet, write_tables, None, write_cifar]
CASES = [*WRITERS, write_leaf]  # the last one reads LEAF again, by content


def test_the_snippet_on_augmentation_runs() -> None:
    names = {"vecfl": vecfl, "torch": torch, "nn": torch.nn}
    exec(compile(AUGMENTATION, "README.md, augmentation", "exec"), names)
    # A word of 0 leaves an image as it is, 2^31 takes a quarter of it.
    words = torch.tensor([[0, 9, 9, 9], [2**31, 9, 9, 9]])
    assert names["darken"](torch.ones(2, 1, 1, 1), words).flatten().tolist() == [1, 0.75]
    assert names["task"].augment == names["augment"] and len(names["augment"]) == 4


def test_the_snippet_on_a_run_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(arguments("runs/a", rounds=2))
    module = make_simulation(arguments("other", seed=1)).task.module
    capsys.readouterr()
    exec(compile(LOADING, "README.md, runs", "exec"), {"vecfl": vecfl, "module": module})
    assert capsys.readouterr().out.startswith("True 2 0 0.")
    expected = torch.load("runs/a/model.pt")
    assert all(torch.equal(t, expected[name]) for name, t in module.state_dict().items())


def test_every_snippet_has_its_files() -> None:
    assert len(SNIPPETS) == len(CASES) == 8
    assert all(len(snippet.strip().splitlines()) <= 6 for snippet in SNIPPETS)


@pytest.mark.parametrize("k", range(len(CASES)))
def test_a_snippet_runs(k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if (write := CASES[k]) is not None:
        write()
    names = {"torch": torch}
    exec(compile(SNIPPETS[k], f"README.md, snippet {k}", "exec"), names)
    assert any(isinstance(value, FederatedDataset) for value in names.values())


def test_the_other_snippets_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names: dict[str, object] = {}
    assert len(OTHERS) == 14
    for k, snippet in enumerate(OTHERS):
        exec(compile(snippet, f"README.md, snippet {k} outside of formats", "exec"), names)
        if k == 0:
            assert 0 <= names["metrics"]["client/accuracy_worst"] <= 1
    assert names["data"].num_clients == 100 and (tmp_path / "partition.png").exists()
    assert names["metrics"]["train/lost_clients"] <= names["metrics"]["train/cohort"]
    assert names["columns"]["accuracy"].shape == (100,)
    assert [one.every for one in names["evaluations"]] == [1, 10]
    assert (
        names["two"].arrangement.processes == 2 and names["rough"].arrangement.precision == "bf16"
    )
    assert (tmp_path / "half.ckpt").exists()
    assert names["state"].table.gather(torch.arange(100))["visits"].sum() == 10
