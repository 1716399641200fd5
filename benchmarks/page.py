"""What do the benchmarks say, in one page?

    python benchmarks/page.py

Reads benchmarks/results, or --results, and writes docs/benchmarks.md, or --out, with plots in a
folder beside it that has its name. Of rows with the same workload and arrangement the newest
counts; vecfl and the plain loop are compared within the newest run of a workload. Ratios are of two
rows of one run. What has no row is said to be not measured.

Takes a few seconds.
"""

import re
from pathlib import Path

from benchmarks.common import plots, sections
from benchmarks.common.command import Parser, command
from benchmarks.common.found import (
    NONE,
    Found,
    Ratio,
    machines,
    newest,
    number,
    of_one_run,
    partner,
    read,
    table,
    time_of,
)
from benchmarks.common.rows import RESULTS, ROOT
from benchmarks.common.sections import Page
from benchmarks.common.workloads import COHORTS
from vecfl.errors import InputError

WORKLOADS = [f"{name}-{n}" for name, cohorts in COHORTS.items() for n in cohorts]
PLAIN = {"tuned 1": "1 thread", "tuned 2": "2 threads", "tuned 2 processes": "2 processes"}
LOOPS = (*PLAIN, "written 1", "written 2")
RIVALS = ("plain", "pfl", "flower", "blazefl", "fedjax", "jax")
ROWS = (
    *("round_time", "rivals", "limits", "scale", "scaling", "ranks", "bandwidth"),
    *("private_rounds", "memory", "gpu"),
)
CONTESTS = ("logistic", "emnist", "cifar", "lstm")
INTRO = """# Benchmarks

Written by `python benchmarks/page.py` from the rows in `benchmarks/results`; not by hand. Times are
medians, with the 20th and 80th percentile in brackets. A ratio is of two rows of one run; its
brackets hold the 20th percentile of one over the 80th of the other, both ways. "Faster" is said
where all of that is above 1, "slower" where all is below; the rest is within the spread.
"""
REPRODUCE = """## How to reproduce

```
bash benchmarks/rivals/install.sh    # once: an environment for each rival, 4 GB
bash benchmarks/all.sh
```

The second command measures everything, in some hours on two cores that nobody else uses, adds rows
to `benchmarks/results` and writes this page. It needs 3 GB of disk for a million clients. Rivals
without an environment, and the GPU where there is none, are left out.
"""


def engine(page: Page) -> None:
    """Against a plain loop over the clients."""
    rows = read(page.results, "round_time")
    by = newest(rows, "workload", "arrangement")
    names = list(dict.fromkeys([*WORKLOADS, *(name for name, _ in by)]))
    lines, every = list[list[object]](), list[list[object]]()
    used, seen = list[Found](), list[Found]()  # rows of the first table and of the second
    bars: dict[str, list[float | None]] = {f"the loop on {on}": [] for on in PLAIN.values()}
    for name in names:
        known = {how: row for (work, how), row in by.items() if work == name}
        mine = of_one_run(known, "auto")
        auto = mine.get("auto", {})
        timed = [row for row in mine.values() if "p50_ms" in row]
        ours = [row for row in timed if row["arrangement"] not in LOOPS]
        best = min(ours, key=lambda row: row["p50_ms"], default={})
        ratios = [against(rows, auto, workload=name, arrangement=how) for how in PLAIN]
        for how, ratio in zip(PLAIN, ratios, strict=True):
            page.judge(f"{name} against the plain loop, {PLAIN[how]}", ratio)
            bars[f"the loop on {PLAIN[how]}"].append(value_of(ratio))
        times = [time_of(mine.get(how, {})) for how in (*PLAIN, "auto")]
        fastest = f"{best['arrangement']}: {time_of(best)}" if best else NONE
        lines.append([name, *times, *map(judged, ratios), fastest])
        every += [arrangement(rows, name, row) for row in known.values()]
        used, seen = [*used, *mine.values()], [*seen, *known.values()]
    page.add("## vecfl against a plain loop\n\n`python benchmarks/round_time.py`")
    page.add("A line is of one run: what that did not time is not measured.")
    if used:
        path = page.picture("engine", "How many times faster vecfl is than a plain loop")
        title = f"vecfl (auto) against a plain loop over the clients\n{machines(used)}"
        plots.bars(path, title, "how many times faster vecfl is (1: as fast)", names, bars)
    head = ["workload-cohort", *(f"plain loop, {on}, ms" for on in PLAIN.values())]
    head += ["vecfl auto, ms", *(f"against {on}" for on in PLAIN.values()), "fastest of vecfl, ms"]
    page.add(table(head, lines if used else [], used))
    head = [
        "workload-cohort",
        "arrangement",
        "ms",
        "against tuned 1",
        "clients/s",
        "client steps/s",
    ]
    head += ["samples/s", "peak MiB", "loss", "ran on", "measured"]
    page.add("### All arrangements\n", "The newest row of each, which may be of different runs.\n")
    page.add(table(head, every, seen))


def against(rows: list[Found], row: Found, **other: str) -> Ratio | None:
    """`row` against the row of the same run with these values, where both were timed."""
    base = partner(rows, row, **other) if "p50_ms" in row else None
    return Ratio.of(row, base) if base else None


def value_of(ratio: Ratio | None) -> float | None:
    return ratio.value if ratio else None


def judged(ratio: Ratio | None) -> str:
    return NONE if ratio is None else f"{ratio}, {ratio.verdict}"


def arrangement(rows: list[Found], name: str, row: Found) -> list[object]:
    """The cells of one arrangement of a workload."""
    ratio = against(rows, row, workload=name, arrangement="tuned 1")
    ran = "; ".join(
        ", ".join(f"{key} {value}" for key, value in one.items()) for one in row.get("ran", ())
    )
    rates = ("clients_per_s", "client_steps_per_s", "samples_per_s", "peak_mib", "loss")
    told = [number(row.get(rate)) for rate in rates]
    when = f"{row['date']}, commit {row['commit']}"
    return [name, row["arrangement"], time_of(row), ratio or "-", *told, ran, when]


def rivals(page: Page) -> None:
    """vecfl against each rival, both at their best settings."""
    rows = read(page.results, "rivals")
    by, bars = newest(rows, "workload", "rival", "setting"), dict[str, list[float | None]]()
    lines, used = list[list[object]](), list[Found]()
    for work in CONTESTS:
        best = fastest([row for (name, *_), row in by.items() if name == work])
        for rival in ("vecfl", *RIVALS):
            row = best.get(rival, {})
            ratio = against_vecfl(rows, work, row) if rival != "vecfl" else None
            bars.setdefault(rival, []).append(value_of(ratio))
            used += [row] if row else []
            if rival != "vecfl" and (rival != "jax" or work == "logistic"):
                other = ", which did NOT THE SAME WORK" if row.get("same_work") is False else ""
                page.judge(f"{work} against {rival}{other}", ratio)
            elif not row:
                continue
            same = {True: "yes", False: "**no**", None: "-"}[row.get("same_work")]
            cells = [row.get("setting", NONE), number(row.get("clients_per_s")), time_of(row), same]
            lines.append([work, rival, *cells, "-" if rival == "vecfl" else judged(ratio)])
    del bars["vecfl"]
    page.add("## Rivals\n\n`python benchmarks/rivals/compare.py`, each at its best setting")
    if used:
        path = page.picture("rivals", "How many times faster vecfl is than each rival")
        title = f"vecfl against rivals, each at its best setting\n{machines(used)}"
        plots.bars(path, title, "how many times faster vecfl is (1: as fast)", CONTESTS, bars)
    head = ["workload", "who", "setting", "clients/s", "ms a round", "same work"]
    page.add(table([*head, "vecfl against it"], lines if used else [], used))
    versions = {row["rival"]: row["versions"] for row in used if "versions" in row}
    for rival, known in versions.items():
        page.add(f"- {rival}: " + ", ".join(f"{name} {value}" for name, value in known.items()))


def fastest(rows: list[Found]) -> dict[str, Found]:
    """The row of each rival's best setting."""
    best: dict[str, Found] = {}
    for row in rows:
        if row["p50_ms"] < best.get(row["rival"], row | {"p50_ms": float("inf")})["p50_ms"]:
            best[row["rival"]] = row
    return best


def against_vecfl(rows: list[Found], work: str, row: Found) -> Ratio | None:
    """vecfl against a rival's row, in the same run."""
    ours = partner(rows, row, workload=work, rival="vecfl") if row else None
    return Ratio.of(ours, row) if ours else None


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    usual = ROOT / "docs" / "benchmarks.md"
    parser.add_argument("--out", type=Path, default=usual, help="the page")
    args = parser.parse_args()
    if not any((args.results / f"{name}.jsonl").exists() for name in ROWS):
        wanted = ", ".join(f"{name}.jsonl" for name in ROWS)
        raise InputError(f"{args.results}: no rows here; expected some of {wanted}")
    page = Page(args.results, args.out)
    for section in (engine, rivals, *sections.ALL):
        section(page)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join([INTRO, page.short(), *page.text, "", REPRODUCE])
    args.out.write_text(re.sub(r"\n{3,}", "\n\n", text))
    print(args.out)


if __name__ == "__main__":
    command(main)
