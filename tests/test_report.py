"""The summary and the picture of a run, from hand-made metrics."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from vecfl import report
from vecfl.errors import InputError
from vecfl.report import draw_curves, read_metrics, summary
from vecfl.track import Jsonl, with_clients

ROUND: dict[str, Any] = {
    "train/loss": 0.25,
    "train/clients": 20,
    "train/dropped_clients": 0,
    "system/clients_per_s": 10.0,
    "system/round_s": 2.0,
    "system/slots": 4,
    "system/slot_efficiency": 0.5,
    "system/client_steps": 30,
    "system/backend": "vmap",
    "system/workers": 2,
    "system/threads": 1,
}
EVALUATION = {
    "eval/loss": 0.5,
    "eval/accuracy": 0.9,
    "client/loss_p90": 1.0,
    "client/accuracy_mean": 0.8,
    "client/accuracy_p10": 0.25,
    "client/accuracy_p50": 0.85,
    "client/accuracy_p90": 1.0,
    "client/accuracy_worst": 0.125,
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    tracker = Jsonl(path / "metrics.jsonl")
    for rnd, row in enumerate(rows, start=1):
        tracker.log({"round": rnd} | row)
    tracker.close()
    return path


def test_summary(tmp_path: Path) -> None:
    faster = {"system/clients_per_s": 40.0, "system/round_s": 0.5, "system/slot_efficiency": 1.0}
    worse = {"eval/accuracy": 0.875, "train/dropped_clients": 3}
    (tmp_path / "model.pt").touch()
    write(tmp_path, [ROUND | EVALUATION, ROUND | faster | EVALUATION | worse])
    # 2 s * 10 / s + 0.5 s * 40 / s = 40 clients in 2.5 s: 16 / s; (50% + 100%) / 2 = 75% busy.
    assert summary(tmp_path).splitlines() == [
        "test accuracy   final 87.5%, best 90.0% in round 1",
        "loss            test 0.500, train 0.250",
        "client accuracy mean 80.0%, median 85.0%, 10th percentile 25.0%, worst 12.5%",
        "dropped clients 3",
        "training        rounds 2, 2.5 s, 16 clients/s, "
        "backend vmap, workers 2, threads 1, slots 4 (75% busy)",
        f"files           {tmp_path}: metrics.jsonl, model.pt",
    ]


def test_processes_are_told_where_they_are_several(tmp_path: Path) -> None:
    for number, said in ((1, "workers 2, threads"), (2, "workers 2, processes 2, threads 1,")):
        (tmp_path / str(number)).mkdir()
        assert said in summary(
            write(tmp_path / str(number), [ROUND | {"system/processes": number}])
        )


def test_summary_of_a_run_that_diverged_says_so(tmp_path: Path) -> None:
    lost = {"eval/accuracy": math.nan, "eval/loss": math.inf, "train/loss": math.nan}
    lines = summary(write(tmp_path, [ROUND | EVALUATION, ROUND | lost])).splitlines()
    assert lines[:2] == [
        "test accuracy   final nan%, best 90.0% in round 1",
        "loss            test nan, train nan",
    ]


def test_summary_without_evaluation_leaves_it_out(tmp_path: Path) -> None:
    text = summary(write(tmp_path, [ROUND]))
    assert "accuracy" not in text and "loss            train 0.250" in text


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, [ROUND, ROUND])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "train/lo')
    assert [row["round"] for row in read_metrics(tmp_path)] == [1, 2]


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(InputError, match="No such file or directory; expected the directory of a"):
        read_metrics(tmp_path)
    path.write_text("")
    with pytest.raises(InputError, match="metrics.jsonl: no round has finished yet"):
        read_metrics(tmp_path)
    path.write_text('{"round": 1}\n{"round": 2\n{"round": 3}\n')
    with pytest.raises(InputError, match="metrics.jsonl, line 2: not JSON"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([ROUND | EVALUATION] * 3, id="whole"),
        pytest.param([ROUND | EVALUATION], id="one round"),
        pytest.param([ROUND] * 3, id="no evaluation"),
        pytest.param([ROUND, ROUND | EVALUATION] * 2, id="every other round"),
        pytest.param([ROUND | dict.fromkeys(EVALUATION, math.nan)] * 3, id="not finite"),
        pytest.param([ROUND | dict.fromkeys([*EVALUATION, "train/loss"], 0.0)] * 3, id="zeros"),
        pytest.param([ROUND | EVALUATION | {"eval/loss": 10.0**k} for k in range(9)], id="wide"),
    ],
)
def test_every_run_has_a_picture(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = draw_curves(write(tmp_path, rows))
    assert path == tmp_path / "curves.png"
    image = imread(path)
    assert image.shape[:2] == (690, 1650)
    assert 0.01 < (image[..., :3].min(-1) < 0.9).mean() < 0.5  # neither blank nor black


def test_the_picture_shows_the_metrics(tmp_path: Path) -> None:
    rows = [ROUND, ROUND | EVALUATION, ROUND, ROUND | EVALUATION | {"eval/accuracy": 0.95}]
    rows = read_metrics(write(tmp_path, rows))
    accuracy, loss = Figure().subplots(1, 2)
    report._draw_accuracy(accuracy, rows)
    report._draw_loss(loss, rows)
    lines = {line.get_label(): line.get_xydata().tolist() for line in accuracy.lines}
    assert lines == {
        "median client": [[2, 0.85], [4, 0.85]],
        "worst client": [[2, 0.125], [4, 0.125]],
        "test data": [[2, 0.9], [4, 0.95]],
    }
    (band,) = accuracy.collections
    assert band.get_label() == "10th to 90th percentile of clients"
    assert {tuple(xy) for xy in band.get_paths()[0].vertices.tolist()} == {
        *((2, 0.25), (4, 0.25), (4, 1.0), (2, 1.0))
    }
    assert accuracy.get_title() == "Accuracy (test data: 95.0%)"
    lines = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert lines == {
        "90th percentile of clients": [[2, 1.0], [4, 1.0]],
        "training, mean of the cohort": [[1, 0.25], [2, 0.25], [3, 0.25], [4, 0.25]],
        "test data": [[2, 0.5], [4, 0.5]],
    }
    assert loss.get_title() == "Loss (test data: 0.500)"
    assert loss.get_yscale() == "log" and loss.get_ylabel().endswith("(log scale)")


def test_an_evaluation_with_a_name_has_its_own_lines(tmp_path: Path) -> None:
    first = ROUND | EVALUATION | {"unseen/loss": 2.0, "unseen/accuracy": 0.5}
    second = ROUND | {"unseen/loss": 1e-9, "unseen/accuracy": 0.625, "old/loss": 1.0}
    write(tmp_path, [first, second | {"old/accuracy": 0.25}])
    assert summary(tmp_path).splitlines()[1] == "other accuracy  unseen 62.5%, old 25.0%"
    accuracy, loss = Figure().subplots(1, 2)
    report._draw_accuracy(accuracy, read_metrics(tmp_path))
    report._draw_loss(loss, read_metrics(tmp_path))
    (line,) = (line for line in accuracy.lines if line.get_label() == "unseen")
    assert line.get_xydata().tolist() == [[1, 0.5], [2, 0.625]]
    (line,) = (line for line in loss.lines if line.get_label() == "unseen")
    assert line.get_xydata().tolist() == [[1, 2.0], [2, 1e-9]]
    # 2 is more than 10^4 times 1e-9: the axis counts it, and leaves out its minor ticks.
    assert len(loss.yaxis.get_minor_locator()._subs) == 0


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        draw_curves(write(tmp_path, [ROUND]))
    assert str(caught.value) == 'curves.png needs matplotlib: pip install "vecfl[plot]"'


def test_metrics_survive_the_way_through_the_file(tmp_path: Path) -> None:
    write(tmp_path, [ROUND | EVALUATION])
    assert read_metrics(tmp_path) == [{"round": 1} | ROUND | EVALUATION]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"round": 1} | ROUND | EVALUATION


NOBODY = {"train/loss": math.nan, "train/clients": 0}


def test_rounds_without_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of the loss goes on over rounds in which nobody took part."""
    rows = [ROUND, ROUND | NOBODY, ROUND | {"train/loss": 0.125}, ROUND | NOBODY | EVALUATION]
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_curves(write(tmp_path, rows))
    assert "loss            test 0.500, train 0.125 (round 3)" in summary(tmp_path).splitlines()
    _, loss = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert lines["training, mean of the cohort"] == [[1, 0.25], [3, 0.125]]
    # where all who came were dropped, the run diverged
    dropped = {"round": 1} | NOBODY | {"train/dropped_clients": 2}
    assert "train/loss" in with_clients(dropped)
    assert "train/loss" not in with_clients(dropped | {"train/dropped_clients": 0})


def test_an_evaluation_of_all_test_data_is_one_line(tmp_path: Path) -> None:
    """That of unseen clients is all of the test, and that of others is not."""
    unseen = {"unseen/loss": 0.5, "unseen/accuracy": 0.9, "other/loss": 1.0, "other/accuracy": 0.0}
    write(tmp_path, [ROUND | EVALUATION | unseen, ROUND | EVALUATION | unseen])
    for draw in (report._draw_accuracy, report._draw_loss):
        axes = Figure().subplots()
        draw(axes, read_metrics(tmp_path))
        labels = [line.get_label() for line in axes.lines]
        assert "test data, unseen" in labels and "other" in labels and "unseen" not in labels


def test_a_server_that_waits_for_messages(tmp_path: Path) -> None:
    row = {"round": 4, "train/loss": 1.0, "train/dropped_clients": 0, "late/steps": 0}
    row |= {"late/buffered": 15, "late/waiting": 3, "system/round_s": 1.0}
    row |= {"system/clients_per_s": 1.0, "system/slot_efficiency": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert "server          0 steps in 4 rounds; 15 messages are in the buffer, 3 on their way" in (
        summary(tmp_path).splitlines()
    )
