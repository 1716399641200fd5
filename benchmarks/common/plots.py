"""The plots of the page of benchmarks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from benchmarks.common.found import Found

Series = dict[str, list[tuple[Any, Found]]]  # (place on the axis, row) of each line or bar
AXES = {
    "cohort": "clients in the cohort",
    "slots": "slots",
    "parameters": "parameters",
    "population": "clients in the population",
}


def save(path: Path, draw: Callable[[Figure], None], size: tuple[float, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def bars(
    path: Path, title: str, unit: str, names: Sequence[str], values: dict[str, list[float | None]]
) -> None:
    """A group for each name, and in it a bar for each key of `values` [names]; a line at 1.

    Names and keys without any value are left out; a bar missing beside others is not measured.
    """
    kept = [i for i in range(len(names)) if any(found[i] for found in values.values())]
    names = [names[i] for i in kept]
    values = {label: [found[i] for i in kept] for label, found in values.items() if any(found)}

    def draw(figure: Figure) -> None:
        ax, height = figure.subplots(), 0.8 / max(1, len(values))
        for i, (label, found) in enumerate(values.items()):
            some = [(n, v) for n, v in enumerate(found) if v is not None]
            at = [n + (i - (len(values) - 1) / 2) * height for n, _ in some]
            drawn = ax.barh(at, [v for _, v in some], height, label=label)
            ax.bar_label(drawn, fmt="%.3g", padding=2, fontsize=7)
            for n in set(range(len(names))) - {n for n, _ in some}:
                y = n + (i - (len(values) - 1) / 2) * height
                ax.text(
                    0, y, "  not measured", fontsize=7, color="gray", verticalalignment="center"
                )
        ax.set_yticks(range(len(names)), names)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set(title=title, xlabel=unit)
        ax.margins(x=0.1)
        ax.set_ylim(len(names) - 0.4, -0.6)
        if values:
            figure.legend(loc="outside lower center", ncols=3, fontsize=8)

    save(path, draw, (8, 1.5 + 0.2 * len(names) * (len(values) + 1)))


def first(point: tuple[Any, Found]) -> Any:
    return point[0]


def lines(ax: Axes, series: Series, value: str) -> None:
    """`value` of rows over their place, on two logarithmic axes; bars: 20th to 80th percentile."""
    for label, points in series.items():
        points = sorted(points, key=first)
        rows = [row for _, row in points]
        y = [row[value] for row in rows]
        scale = [row[value] * row["p50_ms"] for row in rows]  # a rate is this, over a time
        below = [v - s / row["p80_ms"] for v, s, row in zip(y, scale, rows, strict=True)]
        above = [s / row["p20_ms"] - v for v, s, row in zip(y, scale, rows, strict=True)]
        x = [place for place, _ in points]
        ax.errorbar(x, y, (below, above), marker="o", markersize=4, capsize=2, label=label)
    ax.set(xscale="log", yscale="log", ylabel="clients a second")
    rates = [row[value] for points in series.values() for _, row in points]
    ax.set_ylim(min(rates) / 2, max(rates) * 2)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    plain(ax, series)


def plain(ax: Axes, series: Series) -> None:
    """Ticks of x where something was measured, and numbers without powers."""
    ax.set_xscale("log")
    ax.set_xticks(sorted({place for points in series.values() for place, _ in points}))
    ax.xaxis.set_minor_locator(NullLocator())
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    ax.tick_params(labelsize=8)
    ax.tick_params("x", rotation=30)
    ax.grid(alpha=0.3)


def scaling(path: Path, found: dict[str, Series]) -> None:
    """Clients a second over each axis."""

    def draw(figure: Figure) -> None:
        places = figure.subplots(1, len(found), squeeze=False)[0]
        for ax, (axis, series) in zip(places, found.items(), strict=True):
            lines(ax, series, "clients_per_s")
            ax.set(title=f"by {axis}", xlabel=AXES.get(axis, axis))
        figure.suptitle("Clients a second, one axis at a time\n(bars: 20th to 80th percentile)")

    save(path, draw, (max(5, 4 * len(found)), 3.8))


def scale(path: Path, title: str, series: Series) -> None:
    """Clients a second, and memory, over the cohort."""

    def draw(figure: Figure) -> None:
        rate, memory = figure.subplots(1, 2)
        lines(rate, series, "clients_per_s")
        rate.set(yscale="linear")
        rate.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
        for label, points in series.items():
            points = sorted(points, key=first)
            x, y = [n for n, _ in points], [row["anon_peak_mib"] for _, row in points]
            memory.plot(x, y, marker="o", markersize=4, label=label)
        memory.set(ylabel="anonymous memory at most, MiB")
        plain(memory, series)
        for ax in (rate, memory):
            ax.set(xlabel=AXES["cohort"])
            ax.set_ylim(0, 1.1 * ax.dataLim.ymax)
        handles, labels = memory.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
        figure.suptitle(title)

    save(path, draw, (9, 3.8))
