"""What a federated dataset looks like: sizes and labels of its clients, in words and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vecfl.data.columns import in_words, quantiles
from vecfl.data.dataset import FederatedDataset
from vecfl.data.files import among
from vecfl.data.partition import categories
from vecfl.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE = "#0072B2", "#D55E00"  # safe for colour-blind readers (Okabe and Ito 2008)
ALPHA = 0.75
MOST_CLIENTS, MOST_CLASSES = 60, 40  # that are drawn
LEGEND = {0.1: "10 %", 0.5: "50 %", 1.0: "all of the client's examples"}  # by area
NO_LABEL = "label=None leaves labels out"
MOST_LISTED = 12  # classes in the text


def describe(dataset: FederatedDataset, label: str | None = "y") -> str:
    """A few lines: clients, examples, how sizes differ, and how labels differ, over clients.

    The Gini coefficient of the sizes is 0 where all are equal; the effective number of clients is
    (sum of sizes)^2 / (sum of squared sizes). Entropies are in bits, clients without examples
    aside. `label` is a column of n integers, or None for data without; InputError for others.
    """
    sizes = np.sort(dataset.sizes.numpy())
    n, clients = dataset.num_examples, dataset.num_clients
    empty = int((sizes == 0).sum())
    rank = np.arange(1, clients + 1)
    gini = float(((2 * rank - clients - 1) * sizes).sum() / (clients * n))
    effective = n**2 / float((sizes.astype(np.float64) ** 2).sum())
    columns = ", ".join(
        f"{name} {str(c.dtype).removeprefix('torch.')} {list(c.shape[1:])}"
        for name, c in dataset.columns.items()
    )
    lines = {
        "clients": f"{clients:,}" + (f", {empty:,} of them without examples" if empty else ""),
        "examples": f"{n:,}, columns {columns}",
        "examples a client": in_words(sizes),
        "evenness": f"Gini {gini:.3f}, effective number of clients {effective:,.1f}",
    }
    if label is not None:
        lines |= _label_lines(dataset, label)
    return "\n".join(f"{name:<19}{text}" for name, text in lines.items())


def draw_partition(dataset: FederatedDataset, path: Path | str, label: str | None = "y") -> Path:
    """Write a .png: each client's size and its mix of classes, and a histogram of all sizes.

    The area of a bubble is the share of a class in the client's own examples; there are none
    without a label. Clients stand from the largest to the smallest; of many, evenly spaced ones are
    drawn. Raises InputError where matplotlib is missing, for a label that `describe` refuses, for
    another ending, and where the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise InputError(f"{path}: a picture is written as PNG; expected a name that ends in .png")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            'draw_partition needs matplotlib, which is not installed: pip install "vecfl[plot]"'
        ) from error
    sizes = dataset.sizes.numpy()
    drawn = np.argsort(-sizes, kind="stable")[: (sizes > 0).sum()]  # the largest first
    if len(drawn) > MOST_CLIENTS:
        drawn = drawn[np.linspace(0, len(drawn) - 1, MOST_CLIENTS).round().astype(np.int64)]
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    if label is None:
        places = figure.subplot_mosaic("ac", width_ratios=[2.6, 1])
        below = places["a"]
    else:
        places = figure.subplot_mosaic("ac;bc", width_ratios=[2.6, 1], height_ratios=[1, 2.8])
        below = places["b"]
        _draw_mixes(below, dataset, label, drawn)
    _draw_sizes(places["a"], sizes[drawn])
    _name_clients(below, dataset, drawn)
    _draw_histogram(places["c"], sizes)
    for axes in places.values():
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a file to write") from error
    return path


def _cells(
    dataset: FederatedDataset, label: str
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The classes [C]; and client, class and examples of each pair that occurs."""
    if label not in dataset.columns:
        hint = f"{among(label, list(dataset.columns))}; {NO_LABEL}"
        raise InputError(f"label: no column {label!r}; {hint}")
    try:
        labels = categories(dataset.columns[label], f"column {label!r}")
    except InputError as error:
        raise InputError(f"{error}; {NO_LABEL}") from error
    values, index = np.unique(labels, return_inverse=True)
    owner = np.repeat(np.arange(dataset.num_clients), dataset.sizes.numpy())
    cell, count = np.unique(owner * len(values) + index, return_counts=True)
    return values, cell // len(values), cell % len(values), count


def _label_lines(dataset: FederatedDataset, label: str) -> dict[str, str]:
    values, client, index, count = _cells(dataset, label)
    sizes = dataset.sizes.numpy()
    total = np.bincount(index, count, minlength=len(values))
    share = total / total.sum()
    listed = np.argsort(-total, kind="stable")[:MOST_LISTED]
    if len(values) <= MOST_LISTED:
        listed = np.arange(len(values))
    histogram = ", ".join(f"{values[c]}: {share[c]:.1%}" for c in listed)
    others = len(values) - len(listed)
    if others:
        histogram += f", {others:,} others: {1 - share[listed].sum():.1%}"
    some = sizes > 0
    p = count / sizes[client]
    entropy = np.bincount(client, -p * np.log2(p), minlength=len(sizes))[some]
    classes = np.bincount(client, minlength=len(sizes))[some]
    pooled = -(share * np.log2(share)).sum()
    return {
        f"label {label}": f"{len(values):,} classes; {histogram}",
        "classes a client": in_words(classes),
        "label entropy": f"{in_words(entropy + 0.0, '{:.2f}')} bits; all examples {pooled:.2f}",
    }


def _draw_sizes(axes: Axes, sizes: NDArray[np.int64]) -> None:
    axes.bar(range(len(sizes)), sizes, color=BLUE, alpha=ALPHA, width=0.7)
    if _spread_out(sizes):
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlim(-1, len(sizes))
    axes.set_xticks([])
    axes.set_ylabel("examples")
    axes.set_title("Sizes of the clients", fontsize=11)


def _draw_mixes(
    axes: Axes, dataset: FederatedDataset, label: str, clients: NDArray[np.int64]
) -> None:
    values, client, index, count = _cells(dataset, label)
    frequent = np.argsort(-np.bincount(index, count), kind="stable")[:MOST_CLASSES]
    rows = np.sort(frequent)
    column, row = np.full(dataset.num_clients, -1), np.full(len(values), -1)
    column[clients], row[rows] = np.arange(len(clients)), np.arange(len(rows))
    drawn = (column[client] >= 0) & (row[index] >= 0)
    share = (count / dataset.sizes.numpy()[client])[drawn]
    # Points: the axes are about 560 wide and 200 high, and no two bubbles touch.
    most = min(560 / (len(clients) + 1), 200 / len(rows), 20) ** 2
    style: dict[str, Any] = {"color": BLUE, "alpha": ALPHA, "linewidth": 0}
    axes.scatter(column[client[drawn]], row[index[drawn]], share * most, **style)
    for part, name in LEGEND.items():
        axes.scatter([], [], part * most, label=name, **style)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9)
    axes.set_xlim(-1, len(clients))
    axes.set_ylim(-0.8, len(rows) - 0.2)
    axes.set_yticks(range(len(rows)), [str(values[c]) for c in rows])
    axes.tick_params(axis="y", labelsize=9 if len(rows) <= 20 else 5, length=0)
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    some = "" if len(rows) == len(values) else f" ({len(rows)} most frequent of {len(values):,})"
    axes.set_ylabel(f"class ({label}){some}")


def _name_clients(axes: Axes, dataset: FederatedDataset, clients: NDArray[np.int64]) -> None:
    """What stands below the clients."""
    axes.set_xticks([])
    if len(clients) <= 20:
        axes.set_xticks(range(len(clients)), [str(dataset.client_ids[k]) for k in clients])
    which = f"{len(clients)} of {dataset.num_clients:,} clients"
    if len(clients) == dataset.num_clients:
        which = f"all {len(clients)} clients"
    axes.set_xlabel(f"{which}, from the largest to the smallest")


def _draw_histogram(axes: Axes, sizes: NDArray[np.int64]) -> None:
    from matplotlib.ticker import MaxNLocator

    some = sizes[sizes > 0]
    low, high, median = int(some.min()), int(some.max()), int(quantiles(sizes)[2])
    bins: NDArray[Any] = np.linspace(low, high, 31)
    if _spread_out(some):
        bins = np.unique(np.geomspace(low, high + 1, 31).round()) - 0.5
        axes.set_xscale("log")
    elif high - low < 40:
        bins = np.arange(low, high + 2) - 0.5
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.hist(some, bins.tolist(), color=BLUE, alpha=ALPHA)
    axes.axvline(median, color=ORANGE, linewidth=1.5, label=f"median {median:,}")
    axes.legend(frameon=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel("examples of a client")
    axes.set_ylabel("clients")
    empty = len(sizes) - len(some)
    without = f"\n{empty:,} without examples" if empty else ""
    axes.set_title(f"All {len(sizes):,} clients by size{without}", fontsize=11)


def _spread_out(sizes: NDArray[np.int64]) -> bool:
    """Whether sizes need a logarithmic axis."""
    return bool(sizes.max() > 20 * np.median(sizes))
