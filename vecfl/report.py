"""What a run came to, read from its `metrics.jsonl`: a closing summary and a picture."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vecfl.budget import EPSILON, draw_epsilon, spent
from vecfl.errors import InputError
from vecfl.files import atomic_file
from vecfl.track import with_clients

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, Any]]

# Safe for colour-blind readers (Okabe and Ito 2008).
TEST, TRAIN, CLIENTS, WORST = "#0072B2", "#009E73", "#E69F00", "#D55E00"
NAMED = ("#CC79A7", "#56B4E9", "#000000")  # evaluations with names of their own

LOSSES = ("client/loss_p90", "train/loss", "eval/loss")
SPREAD = {
    "mean": "client/accuracy_mean",
    "median": "client/accuracy_p50",
    "10th percentile": "client/accuracy_p10",
    "worst": "client/accuracy_worst",
}


def read_metrics(run_dir: Path | str) -> Rows:
    """The lines of `metrics.jsonl`, one a round; null becomes NaN.

    A last line without its end, left by a process that was killed while writing, is dropped.
    Raises `InputError` where there is no round to read and for a line that is not JSON.
    """
    path = Path(run_dir, "metrics.jsonl")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected the directory of a run") from error
    if not lines:
        raise InputError(f"{path}: no round has finished yet")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from error
        rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


def summary(run_dir: Path | str) -> str:
    """The result of a run in a few lines: accuracy, loss, spread over clients, speed, files.

    Raises `InputError` as `read_metrics` does.
    """
    rows = read_metrics(run_dir)
    latest = {key: value for row in rows for key, value in with_clients(row).items()}
    when, _ = _series([with_clients(row) for row in rows], "train/loss")
    ago = f" (round {when[-1]})" if when and when[-1] != rows[-1]["round"] else ""
    trained = [row for row in rows if row["round"]]  # row 0 is that of the first model
    rounds, accuracy = _series(rows, "eval/accuracy")
    best = max(((a, -r) for r, a in zip(rounds, accuracy, strict=True) if a == a), default=None)
    lines = {
        "test accuracy": _list(latest, "{:.1%}", {"final": "eval/accuracy"}),
        "other accuracy": _list(latest, "{:.1%}", {n: f"{n}/accuracy" for n in _named(rows)}),
        "loss": _list(latest, "{:#.3g}", {"test": "eval/loss", "train": "train/loss"}) + ago,
        "client accuracy": _list(latest, "{:.1%}", SPREAD),
        "server": _late(latest),
        "privacy": spent(latest),
        "dropped clients": sum(row["train/dropped_clients"] for row in trained),
        "training": _speed(trained) if trained else "",
        "files": f"{run_dir}: {', '.join(_files(run_dir))}",
    }
    if best:
        lines["test accuracy"] += f", best {best[0]:.1%} in round {-best[1]}"
    return "\n".join(f"{name:<16}{text}" for name, text in lines.items() if text)


def draw_curves(run_dir: Path | str) -> Path:
    """Write `curves.png`: accuracy with its spread over clients, loss, and epsilon, by round.

    Raises `InputError` as `read_metrics` does, and where matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    rows = [with_clients(row) for row in read_metrics(run_dir)]
    private = any(EPSILON in row for row in rows)
    figure = Figure(figsize=(15 if private else 11, 4.6), layout="constrained")
    accuracy, loss, *more = figure.subplots(1, 3 if private else 2)
    _draw_accuracy(accuracy, rows)
    _draw_loss(loss, rows)
    for axes in more:
        draw_epsilon(axes, rows)
    for axes in (accuracy, loss, *more):
        axes.set_xlabel("communication round")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(0, max(2, rows[-1]["round"]) * 1.02)  # whole rounds, even of one evaluation
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    name = f"{Path(run_dir).resolve().name}, after round {rows[-1]['round']}"
    figure.suptitle(name, x=0.01, ha="left", color="0.4", fontsize=10)
    path = Path(run_dir, "curves.png")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)
    return path


def check_matplotlib() -> None:
    """Raise `InputError` where matplotlib is missing: before a run, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError('curves.png needs matplotlib: pip install "vecfl[plot]"')


def _series(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """The rounds that have this metric, and its values there."""
    having = [row for row in rows if key in row]
    return [row["round"] for row in having], [row[key] for row in having]


def _named(rows: Rows) -> list[str]:
    """The names of evaluations other than eval, in their order: each has a loss."""
    losses = [key for row in rows for key in row if key.endswith("/loss")]
    names = dict.fromkeys(key.removesuffix("/loss") for key in losses)
    return [name for name in names if name not in ("train", "eval")]


def _list(latest: dict[str, Any], form: str, keys: dict[str, str]) -> str:
    """ "mean 98.1%, worst 83.3%", of the metrics that there are."""
    return ", ".join(
        f"{name} {form.format(latest[key])}" for name, key in keys.items() if key in latest
    )


def _late(latest: dict[str, Any]) -> str:
    """How far a server that waits for messages has come."""
    if "late/steps" not in latest:
        return ""
    steps, buffered, waiting = (latest[f"late/{n}"] for n in ("steps", "buffered", "waiting"))
    rounds = f"{steps} steps in {latest['round']} rounds"
    return f"{rounds}; {buffered} messages are in the buffer, {waiting} on their way"


def _speed(rows: Rows) -> str:
    seconds = sum(row["system/round_s"] for row in rows)
    clients = sum(row["system/clients_per_s"] * row["system/round_s"] for row in rows)
    busy = sum(row["system/slot_efficiency"] for row in rows) / len(rows)
    last = rows[-1]
    several = ("processes",) * (last.get("system/processes", 1) > 1)
    names = ("backend", "workers", *several, "threads", "slots")
    how = ", ".join(f"{n} {last[f'system/{n}']}" for n in names if f"system/{n}" in last)
    speed = f"{seconds:.1f} s, {clients / seconds:,.0f} clients/s"
    return f"rounds {last['round']}, {speed}, {how} ({busy:.0%} busy)"


def _files(run_dir: Path | str) -> list[str]:
    return sorted(path.name for path in Path(run_dir).iterdir() if path.name[0] != ".")


def _draw_accuracy(axes: Axes, rows: Rows) -> None:
    rounds, low = _series(rows, "client/accuracy_p10")
    _, high = _series(rows, "client/accuracy_p90")
    if rounds:
        band = "10th to 90th percentile of clients"
        axes.fill_between(rounds, low, high, color=CLIENTS, alpha=0.25, linewidth=0, label=band)
    _line(axes, rows, "client/accuracy_p50", label="median client", color=CLIENTS)
    _line(
        axes,
        rows,
        "client/accuracy_worst",
        label="worst client",
        color=WORST,
        linestyle=":",
    )
    _draw_test(axes, rows, "accuracy")
    _draw_named(axes, rows, "accuracy")
    final = _series(rows, "eval/accuracy")[1][-1:]
    axes.set_title(" ".join(["Accuracy", *(f"(test data: {value:.1%})" for value in final)]))
    axes.set_ylabel("accuracy (share of examples or tokens)")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylim(0, 1.02)


def _draw_loss(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "client/loss_p90", label="90th percentile of clients", color=CLIENTS)
    _line(axes, rows, "train/loss", label="training, mean of the cohort", color=TRAIN, linewidth=1)
    _draw_test(axes, rows, "loss")
    _draw_named(axes, rows, "loss")
    final = _series(rows, "eval/loss")[1][-1:]
    axes.set_title(" ".join(["Loss", *(f"(test data: {value:#.3g})" for value in final)]))
    axes.set_ylabel("mean loss per example or token")
    losses = (*LOSSES, *(f"{name}/loss" for name in _named(rows)))
    drawn = [value for key in losses for value in _series(rows, key)[1] if math.isfinite(value)]
    if min(drawn, default=0) > 0:
        axes.set_ylabel("mean loss per example or token (log scale)")
        axes.set_yscale("log", subs=[2, 5] if max(drawn) < 1e4 * min(drawn) else [])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")


def _draw_test(axes: Axes, rows: Rows, metric: str) -> None:
    label = ", ".join(["test data", *_same_as_test(rows, metric)])
    _line(axes, rows, f"eval/{metric}", label=label, color=TEST, linewidth=2.5)


def _same_as_test(rows: Rows, metric: str) -> list[str]:
    """The evaluations whose curve is that of the test data, as where all of them are unseen."""
    tested = _series(rows, f"eval/{metric}")
    return [name for name in _named(rows) if _series(rows, f"{name}/{metric}") == tested]


def _draw_named(axes: Axes, rows: Rows, metric: str) -> None:
    same = _same_as_test(rows, metric)
    for name, color in zip(_named(rows), itertools.cycle(NAMED), strict=False):
        if name in same:
            continue
        # Dashed: it may lie on another line.
        _line(axes, rows, f"{name}/{metric}", label=name, color=color, linewidth=2, linestyle="--")


def _line(axes: Axes, rows: Rows, key: str, **style: Any) -> None:
    rounds, values = _series(rows, key)
    if values:
        axes.plot(rounds, values, marker="o" if len(values) == 1 else None, **style)
