"""The page of benchmarks says what rows say: made-up ones, in which a second is not what it was."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.common import plots
from benchmarks.common.found import Ratio, newest, number, partner
from benchmarks.common.rows import ROOT

RUN = {"cpu": "abacus", "cores": 2, "torch": "9.9", "python": "3.99", "commit": "abc"}


def row(p50: float, day: int = 1, **known: Any) -> dict[str, Any]:
    """One whose percentiles are a tenth below and a tenth above the median."""
    times = {"p20_ms": p50 * 0.9, "p50_ms": float(p50), "p80_ms": p50 * 1.1}
    return {**known, **times, **RUN, "date": f"2031-01-0{day}"}


def timed(arrangement: str, p50: float, day: int = 1, workload: str = "mlp-100") -> dict[str, Any]:
    return row(p50, day, workload=workload, arrangement=arrangement, loss=0.5)


def contest(rival: str, setting: str, p50: float, **more: Any) -> dict[str, Any]:
    known = {"workload": "lstm", "rival": rival, "setting": setting, "same_work": True}
    return row(p50, clients_per_s=round(1e4 / p50, 2), **known | more)


def page(folder: Path, **results: list[dict[str, Any]]) -> str:
    """The text of the page of some rows."""
    for name, rows in results.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "page" / "all.md"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["page.py", "--results", str(folder), "--out", str(out)])
        runpy.run_path(f"{ROOT}/benchmarks/page.py", run_name="__main__")
    return out.read_text()


def line(text: str, start: str) -> list[str]:
    """The cells of the first line of a table that starts so."""
    found = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def section(text: str, head: str) -> str:
    """What stands below a heading, up to the next one."""
    return text.split(f"# {head}\n", 1)[1].split("\n#", 1)[0]


def test_a_ratio_and_its_spread() -> None:
    """100 against 40 ms: 2.5; at worst 90 / 44, at best 110 / 36."""
    ratio = Ratio.of(row(40), row(100))
    assert (ratio.value, ratio.verdict) == (2.5, "faster")
    assert (ratio.low, ratio.high) == pytest.approx((90 / 44, 110 / 36))
    assert str(ratio) == "x2.50 (2.05 to 3.06)"
    assert Ratio.of(row(100), row(40)).verdict == "**slower**"
    assert Ratio.of(row(100), row(110)).verdict == "**within the spread**"  # 99 / 110 < 1
    assert Ratio.of(row(100), row(90)).verdict == "**within the spread**"


def test_the_newest_row_and_rows_of_one_run() -> None:
    old, new = timed("auto", 50), timed("auto", 40, day=2)
    assert newest([old, new], "workload", "arrangement") == {("mlp-100", "auto"): new}
    base, skipped = timed("tuned 1", 100), {**timed("tuned 1", 1), "skipped": "why"}
    del skipped["p50_ms"]
    rows = [base, old, new, skipped]
    assert partner(rows, old, arrangement="tuned 1") == base
    assert partner(rows, new, arrangement="tuned 1") is None  # on another day


def test_numbers_have_three_digits_that_count() -> None:
    said = [number(n) for n in (12345.6, 123.456, 12.344, 1.234, 0.1234, 0.001234, 0.0)]
    assert said == ["12,346", "123", "12.3", "1.23", "0.123", "0.00123", "0"]
    assert [number(n) for n in (1234, 5, None, "many")] == ["1,234", "5", "-", "many"]


def test_the_engine_against_the_loop(tmp_path: Path) -> None:
    """The files are older last: dates count. Of the run of day 2, auto is 100 / 40 = 2.5 and
    60 / 40 = 1.5 and 80 / 40 = 2 times faster; ResNet's is slower than the loop on two threads."""
    resnet = [("tuned 1", 300.0), ("tuned 2", 100.0), ("auto", 200.0)]
    rows = [timed("tuned 1", 100, 2), timed("tuned 2", 60, 2), timed("auto", 40, 2)]
    rows += [
        timed("tuned 2 processes", 80, 2),
        timed("stacked 1", 30, 2),
        timed("tuned 1", 999),
        timed("auto", 998),
    ]
    rows += [timed(how, ms, 2, "resnet-4") for how, ms in resnet]
    rows.append({**RUN, "date": "2031-01-02", "skipped": "a | b"})
    rows[-1] |= {"workload": "mlp-100", "arrangement": "vmap 1"}
    text = page(tmp_path, round_time=rows)
    cells = line(text, "mlp-100")
    assert cells[1:3] == ["100 (90.0 to 110)", "60.0 (54.0 to 66.0)"]
    assert cells[3:5] == ["80.0 (72.0 to 88.0)", "40.0 (36.0 to 44.0)"]
    assert cells[5:7] == ["x2.50 (2.05 to 3.06), faster", "x1.50 (1.23 to 1.83), faster"]
    assert cells[7:9] == ["x2.00 (1.64 to 2.44), faster", "stacked 1: 30.0 (27.0 to 33.0)"]
    assert "999" not in text and "998" not in text
    assert line(text, "resnet-4")[6] == "x0.50 (0.41 to 0.61), **slower**"
    lost = "- resnet-4 against the plain loop, 2 threads: x0.50 (0.41 to 0.61), **slower**"
    assert section(text, "Not faster").strip() == lost
    assert "resnet-4 against the plain loop, 1 thread: x1.50" in section(text, "Faster")
    assert "resnet-4 against the plain loop, 2 processes" in section(text, "Not measured")
    assert line(text, "mlp-100 | vmap 1")[2] == "a / b"
    assert "cpu abacus, 2 cores, torch 9.9, commit abc, date 2031-01-02, python 3.99" in text
    assert line(text, "lstm-10")[1:] == ["not measured"] * 8
    assert (tmp_path / "page" / "all" / "engine.png").stat().st_size > 10_000
    assert "(all/engine.png)" in text


def test_rivals_at_their_best(tmp_path: Path) -> None:
    """vecfl takes 100 ms; BlazeFL 80 at best, Flower 500; pfl is within the spread; the loop did
    something else."""
    rows = [contest("vecfl", "auto", 100), contest("blazefl", "2 threads", 80)]
    rows += [contest("blazefl", "1 thread", 200), contest("pfl", "2 processes", 105)]
    rows += [contest("flower", "2 actors", 500, versions={"flwr": "1.41"})]
    rows += [contest("plain", "1 thread", 300, same_work=False)]
    text = page(tmp_path, rivals=rows)
    told = "x0.80 (0.65 to 0.98), **slower**"
    assert line(text, "lstm | blazefl")[2:] == [
        "2 threads",
        "125",
        "80.0 (72.0 to 88.0)",
        "yes",
        told,
    ]
    assert line(text, "lstm | pfl")[6] == "x1.05 (0.86 to 1.28), **within the spread**"
    assert line(text, "lstm | flower")[6] == "x5.00 (4.09 to 6.11), faster"
    assert line(text, "lstm | vecfl")[3:5] == ["100", "100 (90.0 to 110)"]
    assert line(text, "lstm | plain")[5] == "**no**"
    assert "lstm against plain, which did NOT THE SAME WORK: x3.00" in section(text, "Faster")
    assert section(text, "Not faster").count("\n- ") == 2
    assert line(text, "lstm | fedjax")[2:] == [
        "not measured",
        "-",
        "not measured",
        "-",
        "not measured",
    ]
    assert "| lstm | jax |" not in text and "- flower: flwr 1.41" in text
    assert "1 thread | 50.0" not in text


def test_what_is_missing_is_not_measured(tmp_path: Path) -> None:
    text = page(tmp_path, memory=[])
    heads = ("vecfl against a plain loop", "Rivals", "Large cohorts from a store on disk")
    for head in (*heads, "Scaling", "Memory of a round", "On a GPU"):
        assert section(text, head).strip().endswith("Not measured.")
    assert section(text, "Faster").strip() == "Nothing that was measured."
    assert "bash benchmarks/all.sh" in section(text, "How to reproduce")
    assert "![" not in text and [p.name for p in (tmp_path / "page").iterdir()] == ["all.md"]


def test_no_page_without_any_row_file(tmp_path: Path, capsys: Any) -> None:
    """A mistyped folder leaves the page that there is."""
    page(tmp_path, memory=[])
    (tmp_path / "memory.jsonl").rename(tmp_path / "notes.jsonl")
    (tmp_path / "page" / "all.md").write_text("good")
    with pytest.raises(SystemExit) as ended:
        page(tmp_path)
    assert ended.value.code == 2 and "no rows here" in capsys.readouterr().err
    assert (tmp_path / "page" / "all.md").read_text() == "good"


def test_a_line_is_of_the_run_of_auto(tmp_path: Path) -> None:
    """What another commit or day measured is left out, even if it is newer and faster; without
    auto the newest run counts."""
    loops = [timed("tuned 1", 100), {**timed("tuned 2", 50), "commit": "old"}]
    rows = [*loops, timed("auto", 40), timed("stacked 1", 10, 2)]
    rows += [timed("tuned 1", 7, 1, "resnet-4"), timed("vmap 1", 9, 2, "resnet-4")]
    text = page(tmp_path, round_time=rows)
    one, two, processes, auto, *ratios, best = line(text, "mlp-100")[1:]
    assert (one[:3], two, processes, auto[:2]) == ("100", "not measured", "not measured", "40")
    assert ratios == ["x2.50 (2.05 to 3.06), faster", "not measured", "not measured"]
    assert best == "auto: 40.0 (36.0 to 44.0)"
    resnet = line(text, "resnet-4")
    assert resnet[1:8] == ["not measured"] * 7 and resnet[8].startswith("vmap 1: 9.00")
    assert line(text, "mlp-100 | stacked 1")[-1] == "2031-01-02, commit abc"
    assert line(text, "mlp-100 | tuned 2")[-1] == "2031-01-01, commit old"


def test_bars_that_are_missing_are_said_to_be(tmp_path: Path, monkeypatch: Any) -> None:
    drawn = list[Any]()

    def look(path: Path, draw: Any, size: tuple[float, float]) -> None:
        draw(figure := Figure())
        drawn.append(figure.axes[0])

    monkeypatch.setattr(plots, "save", look)
    plots.bars(
        tmp_path, "title", "unit", ["a", "b", "c"], {"x": [1, None, None], "y": [2, None, 3]}
    )
    (ax,) = drawn
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "c"]
    said = [text for text in ax.texts if "not measured" in text.get_text()]
    assert [text.get_position() for text in said] == [(0, 1 - 0.2)]  # of x, for c
    assert ax.get_ylim() == (1.6, -0.6)


def test_sections_of_vecfl_alone(tmp_path: Path) -> None:
    scaling = [
        row(10.0 * n, axis="cohort", value=n, cohort=n, population=1000, parameters=5, slots=2)
        | {"workers": 1, "processes": 1, "clients_per_s": 100.0, "client_steps_per_s": 600.0}
        for n in (10, 100)
    ]
    scale = [
        row(ms, workload="logistic", cohort=n, population=50_000, parameters=10, ran={"slots": 9})
        | {"ms_per_client": ms / n, "of_smallest": ratio, "clients_per_s": 1e3 * n / ms}
        | {"anon_peak_mib": 200.0 + n, "grown_bytes_per_client": 7, "client_steps_per_s": 3.0}
        | {"wait_ms": 17.25}
        for n, ms, ratio in ((10, 5.0, 1.0), (50, 30.0, 1.2))
    ]
    wide = {"device": "cpu", "kernels": "reference", "numbers": 1000}
    band = [row(2, operation="noise", gb_s=1.5, of_a_copy=0.25, **wide)]
    dp = {"unit": "client", "mechanism": "clip_by_norm", "backend": "vmap", "fastest": "stacked"}
    private = [row(30, workload="logistic", cohort=9, slots=3, **dp)]
    for name, ratio in (("of_plain", 1.25), ("of_fastest", 2.5)):
        private[0] |= {name: ratio, f"{name}_p20": ratio - 0.125, f"{name}_p80": ratio + 0.5}
    memory = [row(1, workload="logistic", cohort=3, malloc="default", slots=4)]
    memory[0] |= {"peak_mib": 300.5, "growth_mib": 1.5}
    ranks = [{**RUN, "date": "2031-01-01", "workload": "wide", "parameters": 7, "cohort": 4}]
    ranks[0] |= {"ranks": 2, "round": row(50)}
    us = {"plain loop": 90.0, "vecfl": 30.5, "products": 7.0, "once a client": 3.0}
    limits = [{**RUN, "date": "2031-01-01", "workload": "mlp", "slots": 6, "speedup": 2.95}]
    limits[0] |= {"client_step": {name: {"p50_us": t} for name, t in us.items()}}
    limits[0] |= {"by_products_alone": 12.86}
    limits += [{**RUN, "date": "2031-01-01", "workload": "lstm", "share": 0.8, "at_most": 1.25}]
    gpu = [row(4, measure="round", workload="cnn", cohort=10, arrangement="vmap", speedup=11.5)]
    found = {"scaling": scaling, "scale": scale, "bandwidth": band, "memory": memory}
    text = page(tmp_path, **found, ranks=ranks, gpu=gpu, limits=limits, private_rounds=private)
    assert line(text, "cohort | 100")[-3:] == ["1,000 (900 to 1,100)", "100", "600"]
    assert line(text, "logistic | 50")[4:6] == ["0.6", "x1.2"]
    assert line(text, "logistic | 50")[-3:] == ["7 of 40", "17.2", "slots 9"]
    assert "The store holds 50,000 clients." in text and "million" not in text.split("# How to")[0]
    assert line(text, "cpu | reference | 1,000 | noise")[-2:] == ["1.5", "0.25"]
    cells = line(text, "logistic | 9 | client | clip_by_norm | vmap")[5:]
    assert cells[:2] == ["3", "30.0 (27.0 to 33.0)"]
    assert cells[2:] == ["x1.25 (1.12 to 1.75)", "x2.50 (2.38 to 3.00)", "stacked"]
    assert line(text, "logistic | 3")[2:] == ["default", "4", "300.5", "1.5"]
    assert line(text, "wide | 7 | 4 | 2")[-1] == "50.0 (45.0 to 55.0)"
    assert line(text, "lstm | 0.8")[2:] == ["x1.25"]
    assert line(text, "mlp | 6")[2:] == ["90.0", "30.5", "7.00", "3.00", "x2.95", "x12.86"]
    assert line(text, "cnn | round | 10 | - | vmap")[-1] == "11.5"
    plots = {path.stem for path in (tmp_path / "page" / "all").iterdir()}
    assert plots == {"scaling", "scale", "bandwidth"}
