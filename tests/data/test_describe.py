"""What is said and drawn of a dataset, from a hand-made one."""

import re
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from vecfl.data import FederatedDataset, describe, draw_partition
from vecfl.data.__main__ import summary
from vecfl.data.describe import _draw_histogram, _draw_mixes, _draw_sizes, _name_clients
from vecfl.errors import InputError


def refused(message: str):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


def dataset(labels, ids=()):
    """Clients with these labels, a list for each."""
    y = torch.tensor([label for client in labels for label in client])
    offsets = torch.tensor([0, *(len(client) for client in labels)]).cumsum(0)
    return FederatedDataset({"x": torch.zeros(len(y), 2), "y": y}, offsets, ids)


FOUR = [[0, 0, 0, 0], [0, 5], [5, 5], []]


def test_the_text_by_hand():
    # Sizes 0, 2, 2, 4: Gini = sum (2 i - 5) size_i / (4 * 8) = (-2 + 2 + 12) / 32 = 0.375;
    # 64 / (4 + 4 + 16) = 2.67 effective clients. Label 0: 5 of 8. Classes 1, 2, 1 and entropies
    # 0, 1, 0 of those with examples; of all, -(5/8 log2 5/8 + 3/8 log2 3/8) = 0.954.
    assert describe(dataset(FOUR)).splitlines() == [
        "clients            4, 1 of them without examples",
        "examples           8, columns x float32 [2], y int64 []",
        "examples a client  min 0, 10 % 0, median 2, 90 % 4, max 4",
        "evenness           Gini 0.375, effective number of clients 2.7",
        "label y            2 classes; 0: 62.5%, 5: 37.5%",
        "classes a client   min 1, 10 % 1, median 1, 90 % 2, max 2",
        "label entropy      min 0.00, 10 % 0.00, median 0.00, 90 % 1.00, max 1.00 bits; "
        "all examples 0.95",
    ]


def test_equal_clients_are_even():
    text = describe(dataset([[0, 1], [1, 0], [0, 1]]), label=None)
    assert text.splitlines()[0] == "clients            3"
    assert text.splitlines()[-1] == (
        "evenness           Gini 0.000, effective number of clients 3.0"
    )


def test_of_many_classes_the_most_frequent_are_listed():
    # Class c has c + 1 of 1 + 2 + ... + 20 = 210 examples; the 12 listed are 8..19, in all
    # 9 + ... + 20 = 174, and the others 36 of 210 = 17.1 %.
    labels = [[c] * (c + 1) for c in range(20)]
    (line,) = (line for line in describe(dataset(labels)).splitlines() if "label y" in line)
    assert line.startswith("label y            20 classes; 19: 9.5%, 18: 9.0%, ")
    assert line.endswith(", 8: 4.3%, 8 others: 17.1%")


def test_labels_that_are_no_classes_are_refused(tmp_path):
    with refused("label: no column 'z'; it has ['x', 'y']; label=None leaves labels out"):
        describe(dataset(FOUR), "z")
    message = "column 'x': expected n > 0 integers or strings, got shape [8, 2] of float32; "
    message += "label=None leaves labels out"
    with refused(message):
        describe(dataset(FOUR), "x")
    with refused(message):
        draw_partition(dataset(FOUR), tmp_path / "a.png", "x")


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(FOUR, id="four"),
        pytest.param([[3]], id="one"),
        pytest.param([[k % 7, 2] for k in range(200)], id="many clients"),
        pytest.param([list(range(90))], id="many classes"),
        pytest.param([[0] * 5000, *([[1]] * 30)], id="a giant"),
        pytest.param([[0] * k for k in range(0, 90)], id="a ramp"),
    ],
)
def test_every_dataset_has_a_picture(tmp_path, labels):
    path = tmp_path / "partition.png"
    assert draw_partition(dataset(labels), str(path)) == path
    image = imread(path)
    assert image.shape[:2] == (810, 1800)
    assert 0.01 < (image[..., :3].min(-1) < 0.9).mean() < 0.5  # neither blank nor black


def test_the_picture_shows_the_data():
    # The clients by size: "a" (4 examples), "c" (2), "b" (2); areas by their own shares.
    data = dataset(FOUR, ["a", "b", "c", "d"])
    axes = Figure().subplots(3)
    _draw_sizes(axes[0], np.array([4, 2, 2]))
    _draw_mixes(axes[1], data, "y", np.array([0, 2, 1]))
    _name_clients(axes[1], data, np.array([0, 2, 1]))
    _draw_histogram(axes[2], data.sizes.numpy())
    assert [bar.get_height() for bar in axes[0].patches] == [4, 2, 2]
    dots, *legend = axes[1].collections
    full = dots.get_sizes().max()  # the area of a client with one class
    assert [part.get_sizes()[0] / full for part in legend] == [0.1, 0.5, 1.0]
    named = [text.get_text() for text in axes[1].get_legend().get_texts()]
    assert named == ["10 %", "50 %", "all of the client's examples"]
    areas = dots.get_sizes() / dots.get_sizes().max()
    found = {tuple(xy): a for xy, a in zip(dots.get_offsets().tolist(), areas, strict=True)}
    assert found == {(0, 0): 1, (1, 1): 1, (2, 0): 0.5, (2, 1): 0.5}
    assert [text.get_text() for text in axes[1].get_xticklabels()] == ["a", "c", "b"]
    assert [text.get_text() for text in axes[1].get_yticklabels()] == ["0", "5"]
    assert axes[1].get_xlabel() == "3 of 4 clients, from the largest to the smallest"
    # Sizes 2, 2 and 4, in bins of one number each.
    assert [bar.get_height() for bar in axes[2].patches] == [2, 0, 1]
    assert axes[2].get_title() == "All 4 clients by size\n1 without examples"
    assert axes[2].get_legend_handles_labels()[1] == ["median 2"]


def test_there_is_one_median(monkeypatch, tmp_path):
    # Sizes 0, 1, 4, 9: the median is the lower of the middle two, 1, wherever it is said. With
    # sizes 0, 0, 0, 9 it is 0, though all clients in the histogram have 9.
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    for sizes, median in (((0, 1, 4, 9), 1), ((0, 0, 0, 9), 0)):
        data = dataset([[0] * k for k in sizes])
        draw_partition(data, tmp_path / "a.png")
        assert figures[-1].axes[1].get_legend_handles_labels()[1] == [f"median {median}"]
        for text in (describe(data), repr(data), summary(data)):
            assert re.search(rf"median {median}\b", text)


def test_bubbles_of_few_classes_do_not_touch(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    draw_partition(dataset([[k % 2] for k in range(60)]), tmp_path / "a.png")
    figures[0].draw_without_rendering()
    axes = figures[0].axes[2]
    left, right = axes.transData.transform([(0, 0), (1, 0)])[:, 0] * 72 / figures[0].dpi
    diameter = axes.collections[0].get_sizes().max() ** 0.5
    assert 0.6 * (right - left) < diameter <= right - left


def test_without_labels_sizes_are_drawn(tmp_path):
    windows = FederatedDataset({"y": torch.zeros(3, 80)}, torch.tensor([0, 1, 3]))
    with pytest.raises(InputError, match="got shape .3, 80. of float32; label=None leaves labels"):
        draw_partition(windows, tmp_path / "a.png")
    draw_partition(windows, tmp_path / "a.png", label=None)
    assert imread(tmp_path / "a.png").shape[:2] == (810, 1800)


@pytest.mark.parametrize("name", ["a.xyz", "a.pdf", "a"])
def test_a_picture_is_named_png(tmp_path, name):
    path = tmp_path / name
    with refused(f"{path}: a picture is written as PNG; expected a name that ends in .png"):
        draw_partition(dataset(FOUR), path)
    assert not path.exists()


def test_of_many_clients_sixty_are_drawn(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    # 119 clients of 119, 118, ..., 1 examples: of places 0..118 every second, so 119, 117, ..., 1.
    draw_partition(dataset([[0] * k for k in range(1, 120)]), tmp_path / "a.png")
    sizes, _, mixes = figures[0].axes
    assert [bar.get_height() for bar in sizes.patches] == list(range(119, 0, -2))
    assert mixes.get_xlabel() == "60 of 119 clients, from the largest to the smallest"
    assert len(mixes.get_xticks()) == 0
    draw_partition(dataset(FOUR), tmp_path / "a.png")  # the client without examples stands aside
    assert figures[1].axes[2].get_xlabel() == "3 of 4 clients, from the largest to the smallest"


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    path = tmp_path / "nowhere" / "a.png"
    with refused(f"{path}: No such file or directory; expected a file to write"):
        draw_partition(dataset(FOUR), path)


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with refused(
        'draw_partition needs matplotlib, which is not installed: pip install "vecfl[plot]"'
    ):
        draw_partition(dataset(FOUR), tmp_path / "a.png")
